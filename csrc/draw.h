// What is drawn for a tile: the noise of a seed, and which elements a mask keeps.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "pass.h"
#include "tile.h"

namespace {

// Where a tile lies: its first element in the parameter (a multiple of TILE) and in the tensor.
struct Place {
    uint64_t index;
    int64_t local;
};

// The noise of one seed over a span.
template <int KIND, bool SPLIT>
struct Source;

template <bool SPLIT>
struct Source<ZK_GAUSSIAN, SPLIT> {
    RoundKeys keys;
    Source(uint64_t seed, const zk_tensor& t, uint64_t index)
        : keys(seed, t.stream, ZK_GAUSSIAN, (uint32_t)(index / 8 >> 32)) {}
    // acc[r] = fma(c, z, start[r]); c holds UNIT already.
    ZK_INLINE void add(F* acc, const F* start, float c, uint64_t index) {
        F z[8];
        gaussian<S, SPLIT>(z, (uint32_t)(index / 8), keys);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) acc[r] = S::fma(z[r], splat(c), start[r]);
    }
    // And mirror[r] = fma(−c, z, mirror[r]), of the same draw.
    void add_both(F* acc, F* mirror, float c, uint64_t index) {
        F z[8];
        gaussian<S, SPLIT>(z, (uint32_t)(index / 8), keys);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            acc[r] = S::fma(z[r], splat(c), acc[r]);
            mirror[r] = S::fma(z[r], -splat(c), mirror[r]);
        }
    }
    void add_small(F* acc, float c, uint64_t index) {
        F z[8];
        gaussian<S, SPLIT>(z, (uint32_t)(index / 8), keys);
        for (int r = 0; r < 8; r++) acc[r] = S::fma(z[r] * UNIT, splat(c), acc[r]);
    }
};

// Register r of a tile's c times its signs: c where the element's bit is set, −c where it is clear.
template <bool SPLIT>
inline F signed_by(const uint32_t* word, int r, float c) {
    return bits_as<F>(bits_as<U>(-splat(c)) ^ (bit_to_sign<S, SPLIT>(word, r) & 0x80000000u));
}

template <bool SPLIT>
struct Source<ZK_RADEMACHER, SPLIT> {
    RoundKeys keys;
    SignBits<S> signs;
    uint64_t row = UINT64_MAX;
    Source(uint64_t seed, const zk_tensor& t, uint64_t index)
        : keys(seed, t.stream, ZK_RADEMACHER, (uint32_t)(index / 128 >> 32)) {}
    ZK_INLINE void add(F* acc, const F* start, float c, uint64_t index) {
        F signed_c[8];
        draw(signed_c, c, index);
        for (int r = 0; r < 8; r++) acc[r] = start[r] + signed_c[r];
    }
    void add_both(F* acc, F* mirror, float c, uint64_t index) {
        F signed_c[8];
        draw(signed_c, c, index);
        for (int r = 0; r < 8; r++) {
            acc[r] += signed_c[r];
            mirror[r] -= signed_c[r];
        }
    }
    // c times the signs.
    ZK_INLINE void draw(F* signed_c, float c, uint64_t index) {
        if (__builtin_expect(index / ROW != row, 0)) {
            row = index / ROW;
            signs.fill((uint32_t)(row * S::W), keys);
        }
        // TILE is 8, 64 or 128 elements; a word holds 32.
        uint32_t word[(TILE + 31) / 32];
        for (int i = 0; i < (TILE + 31) / 32; i++)
            word[i] = signs.at((uint32_t)(index % ROW) / 32 * 32 + 32 * i);
        if (TILE < 32) word[0] >>= index % 32;
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) signed_c[r] = signed_by<SPLIT>(word, r, c);
    }
    void add_small(F* acc, float c, uint64_t index) { add(acc, acc, c, index); }
};

// 32 bits from bit `at` on, zero outside the `size` bits there are.
inline uint32_t bits_from(const uint8_t* bits, int64_t size, int64_t at) {
    uint32_t word = 0;
    for (int i = 0; i < 32; i++)
        if (at + i >= 0 && at + i < size)
            word |= (uint32_t)(bits[(at + i) >> 3] >> ((at + i) & 7) & 1) << i;
    return word;
}

template <bool SPLIT>
void keep_static(I* keep, const zk_tensor& t, const Place& at) {
    if (t.keep == ZK_KEEP_RANDOM) {
        U u[8];
        const uint64_t block = at.index / 8;
        uniform16<S, SPLIT>(u, (uint32_t)block,
                            RoundKeys(t.keep_seed, t.stream, ZK_MASK, (uint32_t)(block >> 32)));
        for (int r = 0; r < 8; r++) keep[r] = spread_sign(u[r] - t.keep_below);
    } else if (t.keep == ZK_KEEP_BITS) {
        uint32_t word[(TILE + 31) / 32];
        for (int i = 0; i < (TILE + 31) / 32; i++)
            word[i] = bits_from(t.bits, t.numel, at.local + 32 * i);
        for (int r = 0; r < 8; r++) keep[r] = spread_sign(bit_to_sign<S, SPLIT>(word, r));
    } else {
        for (int r = 0; r < 8; r++) keep[r] = select_all();
    }
}

inline I keep_magnitude(F w, float threshold) {
    // Magnitudes order as their bits; NaN lies above infinity and so above every threshold.
    const U magnitude = bits_as<U>(w) & 0x7FFFFFFFu;
    return ~spread_sign(bits_as<uint32_t>(threshold) - magnitude);
}

// The noise of all seeds of a pass.
template <int KIND, bool SPLIT>
struct Directions {
    std::vector<Source<KIND, SPLIT>> sources;
    const float* coeffs;
    std::vector<float> scaled;  // coefficients with UNIT folded in
    bool exact = true;          // whether that folding loses nothing

    Directions(const zk_pass& a, const zk_tensor& t, uint64_t index) : coeffs(a.coeffs) {
        sources.reserve(a.seed_count);
        for (int64_t k = 0; k < a.seed_count; k++) {
            sources.emplace_back(a.seeds[k], t, index);
            scaled.push_back(KIND == ZK_GAUSSIAN ? coeffs[k] * UNIT : coeffs[k]);
            exact &= coeffs[k] == 0 || std::fabs(coeffs[k]) >= SMALL;
        }
    }
    // Calls run(part) for the parts of the span that this is prepared for in turn.
    template <class Run>
    void walk(const Span& span, Run run) {
        run(span);
    }
    // Goes to a tile.
    void enter(uint64_t) {}
    // acc = start + Σ c z over seeds from … to − 1, where `exact`.
    ZK_INLINE void add(F* acc, const F* start, int64_t from, int64_t to, uint64_t index) {
        sources[from].add(acc, start, scaled[from], index);
        for (int64_t k = from + 1; k < to; k++) sources[k].add(acc, acc, scaled[k], index);
    }
    // acc += Σ c z and mirror −= Σ c z for coefficients of any size.
    void add_both(F* acc, F* mirror, uint64_t index) {
        for (size_t k = 0; k < sources.size(); k++) {
            if (exact) {
                sources[k].add_both(acc, mirror, scaled[k], index);
            } else {
                sources[k].add_small(acc, coeffs[k], index);
                sources[k].add_small(mirror, -coeffs[k], index);
            }
        }
    }
    // acc += Σ c z for coefficients of any size.
    void add_any(F* acc, int64_t from, int64_t to, uint64_t index) {
        if (exact) return add(acc, acc, from, to, index);
        for (int64_t k = from; k < to; k++) sources[k].add_small(acc, coeffs[k], index);
    }
};

// The keys of a pass's rounding, one a step, under its rounding seeds plus `number`.
inline std::vector<RoundKeys> rounding_keys(const zk_pass& a, const zk_tensor& t, uint64_t index,
                                            uint64_t number) {
    std::vector<RoundKeys> keys;
    for (int64_t step = 0; step * a.queries < a.seed_count; step++)
        keys.emplace_back(a.rounding_seeds[step] + number, t.stream, ZK_ROUNDING,
                          (uint32_t)(index / 8 >> 32));
    return keys;
}

// Memory that a pass walks along with the weights.
struct Stream {
    char* start;
    int bytes;  // an element
    bool written = true;
};

// Runs tile(pointers, place) on copies of what a span has of a tile.
template <int N, class Run>
__attribute__((noinline)) void on_copies(const Span& span, const Stream* streams, const Place& at,
                                         Run tile) {
    const int64_t from = std::max(at.local, span.begin);
    const int64_t to = std::min(at.local + TILE, span.end);
    char* tiles[N];
    char copies[N][TILE * sizeof(float)] = {};
    for (int i = 0; i < N; i++) {
        const int bytes = streams[i].bytes;
        tiles[i] = copies[i];
        std::memcpy(copies[i] + (from - at.local) * bytes, streams[i].start + from * bytes,
                    (to - from) * bytes);
    }
    tile(tiles, at);
    for (int i = 0; i < N; i++) {
        if (!streams[i].written) continue;
        const int bytes = streams[i].bytes;
        std::memcpy(streams[i].start + from * bytes, copies[i] + (from - at.local) * bytes,
                    (to - from) * bytes);
    }
}

// Calls tile(pointers, place) for every tile of a span.
template <int N, class Run>
void for_each_tile(const Span& span, const Stream* streams, Run tile) {
    const uint64_t offset = span.tensor->offset;
    Place at;
    at.index = (offset + span.begin) / TILE * TILE;
    at.local = (int64_t)(at.index - offset);
    const auto next = [&] { at.index += TILE, at.local += TILE; };
    if (at.local < span.begin) on_copies<N>(span, streams, at, tile), next();
    for (; at.local + TILE <= span.end; next()) {
        char* tiles[N];
        for (int i = 0; i < N; i++) tiles[i] = streams[i].start + at.local * streams[i].bytes;
        tile(tiles, at);
    }
    if (at.local < span.end) on_copies<N>(span, streams, at, tile);
}

}  // namespace

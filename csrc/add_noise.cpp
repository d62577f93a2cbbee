// w ← round(decay · w + Σ c z) over a span of one tensor. Compiled once for each instruction set,
// with ZK_SIMD naming its header and ZK_ENTRY its function.
#include <algorithm>
#include <cmath>
#include <vector>

#include "noise.h"
#include "pass.h"
#include ZK_SIMD

namespace {

typedef Simd S;
typedef S::F F;
typedef S::I I;
typedef S::U U;

constexpr int TILE = 8 * S::W;     // elements of one group of Gaussian blocks
constexpr int ROW = 128 * S::W;    // elements of one group of Rademacher blocks
constexpr float UNIT = 0x1p-29f;   // what `gaussian` leaves to its caller
constexpr float SMALL = 0x1p-97f;  // below it a coefficient times UNIT is not exact

inline I select_all() { return I{} - 1; }
inline F select(I keep, F yes, F no) {
    return bits_as<F>((bits_as<I>(yes) & keep) | (bits_as<I>(no) & ~keep));
}
// All ones where the top bit is set.
inline I spread_sign(U bits) { return bits_as<I>(bits) >> 31; }
inline I is_finite(F x) { return spread_sign((bits_as<U>(x) & 0x7FFFFFFFu) - 0x7F800000u); }
inline F quiet(F x) { return bits_as<F>(bits_as<U>(x) | 0x400000u); }
inline I is_nan(F x) { return spread_sign(0x7F800000u - (bits_as<U>(x) & 0x7FFFFFFFu)); }

// A tile in float32: loading is exact, storing expects values of the type, or rounds to nearest.
// bfloat16 is held split in even and odd elements, which costs one shift instead of shuffles.
template <int DTYPE>
struct Tile;

template <>
struct Tile<ZK_FLOAT32> {
    static constexpr bool SPLIT = false;
    static constexpr int BYTES = 4;
    static void load(F* w, const char* p) { std::memcpy(w, p, sizeof(F) * 8); }
    static void store(char* p, const F* w, const char*) { std::memcpy(p, w, sizeof(F) * 8); }
    static F nearest(F x) { return x; }
    static F stochastic(F x, U) { return x; }
};

template <>
struct Tile<ZK_BFLOAT16> {
    static constexpr bool SPLIT = true;
    static constexpr int BYTES = 2;
    static void load(F* w, const char* p) {
        for (int r = 0; r < 8; r += 2) {
            U raw;
            std::memcpy(&raw, p + sizeof(U) / 2 * r, sizeof raw);
            w[r] = bits_as<F>(raw << 16);
            w[r + 1] = bits_as<F>(raw & 0xFFFF0000u);
        }
    }
    static void store(char* p, const F* w, const char*) {
        for (int r = 0; r < 8; r += 2) {
            U even = round_bits(w[r]), odd = round_bits(w[r + 1]);
            if (__builtin_expect(S::any_nan(w[r], w[r + 1]), 0)) {
                even = bits_as<U>(select(is_nan(w[r]), quiet(w[r]), bits_as<F>(even)));
                odd = bits_as<U>(select(is_nan(w[r + 1]), quiet(w[r + 1]), bits_as<F>(odd)));
            }
            const U raw = (odd & 0xFFFF0000u) | (even >> 16);
            std::memcpy(p + sizeof(U) / 2 * r, &raw, sizeof raw);
        }
    }
    static F nearest(F x) {
        const F rounded = bits_as<F>(round_bits(x) & 0xFFFF0000u);
        return select(is_nan(x), quiet(x), rounded);
    }
    static F stochastic(F x, U u) {
        const F rounded = bits_as<F>((bits_as<U>(x) + u) & 0xFFFF0000u);
        return select(is_finite(x), rounded, select(is_nan(x), quiet(x), x));
    }

 private:
    static U round_bits(F x) {
        const U b = bits_as<U>(x);
        return b + 0x7FFFu + ((b >> 16) & 1u);
    }
};

template <>
struct Tile<ZK_FLOAT16> {
    static constexpr bool SPLIT = false;
    static constexpr int BYTES = 2;
    static void load(F* w, const char* p) {
        for (int r = 0; r < 8; r++) w[r] = S::load_half(p + 2 * S::W * r);
    }
    // Conversion to float32 and back sets a NaN's quiet bit. A NaN stays NaN whatever is added, so
    // its own bits may as well be kept, and where a mask is 0 they must be.
    static void store(char* p, const F* w, const char* original) {
        bool nan = false;
        for (int r = 0; r < 8; r += 2) nan |= S::any_nan(w[r], w[r + 1]);
        uint16_t before[TILE], after[TILE];
        if (__builtin_expect(nan, 0)) std::memcpy(before, original, sizeof before);
        for (int r = 0; r < 8; r++) S::store_half(p + 2 * S::W * r, w[r]);
        if (__builtin_expect(!nan, 1)) return;
        std::memcpy(after, p, sizeof after);
        for (int i = 0; i < TILE; i++)
            if ((before[i] & 0x7FFF) > 0x7C00) after[i] = before[i];
        std::memcpy(p, after, sizeof after);
    }
    static F nearest(F x) { return S::round_half(x); }
    static F stochastic(F x, U u) {
        const U sign = bits_as<U>(x) & 0x80000000u;
        const F magnitude = bits_as<F>(bits_as<U>(x) ^ sign);
        const U rounded = (bits_as<U>(magnitude) + (u & 0x1FFFu)) & ~0x1FFFu;
        // Below 2⁻¹⁴ half's steps are even: count them in units of 2⁻⁴⁰.
        const I below = spread_sign(bits_as<U>(magnitude) - bits_as<U>(F{} + 0x1p-14f));
        const F capped = select(below, magnitude, F{});
        const U steps = (bits_as<U>(S::to_int(capped * 0x1p40f)) + u) >> 16;
        const F small = S::to_float(bits_as<I>(steps)) * 0x1p-24f;
        const F either = select(below, small, bits_as<F>(rounded));
        const F signed_either = bits_as<F>(bits_as<U>(either) | sign);
        return S::round_half(select(is_finite(x), signed_either, x));
    }
};

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
    void add(F* acc, const F* start, float c, uint64_t index) {
        F z[8];
        gaussian<S, SPLIT>(z, (uint32_t)(index / 8), keys);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) acc[r] = S::fma(z[r], F{} + c, start[r]);
    }
    void add_small(F* acc, float c, uint64_t index) {
        F z[8];
        gaussian<S, SPLIT>(z, (uint32_t)(index / 8), keys);
        for (int r = 0; r < 8; r++) acc[r] = S::fma(z[r] * UNIT, F{} + c, acc[r]);
    }
};

template <bool SPLIT>
struct Source<ZK_RADEMACHER, SPLIT> {
    RoundKeys keys;
    SignBits<S> signs;
    uint64_t row = UINT64_MAX;
    Source(uint64_t seed, const zk_tensor& t, uint64_t index)
        : keys(seed, t.stream, ZK_RADEMACHER, (uint32_t)(index / 128 >> 32)) {}
    void add(F* acc, const F* start, float c, uint64_t index) {
        if (__builtin_expect(index / ROW != row, 0)) {
            row = index / ROW;
            signs.fill((uint32_t)(row * S::W), keys);
        }
        // TILE is 8, 64 or 128 elements; a word holds 32.
        uint32_t word[(TILE + 31) / 32];
        for (int i = 0; i < (TILE + 31) / 32; i++)
            word[i] = signs.at((uint32_t)(index % ROW) / 32 * 32 + 32 * i);
        if (TILE < 32) word[0] >>= index % 32;
        const U minus_c = bits_as<U>(F{} - c);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            const U flip = bit_to_sign<S, SPLIT>(word, r) & 0x80000000u;
            acc[r] = start[r] + bits_as<F>(minus_c ^ flip);
        }
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

template <int DTYPE, int KIND>
struct Pass {
    typedef Tile<DTYPE> T;
    typedef Source<KIND, T::SPLIT> Noise;
    const zk_add_noise_args& args;
    const zk_tensor& tensor;
    std::vector<Noise> noise;
    std::vector<float> scaled;  // coefficients with UNIT folded in
    std::vector<RoundKeys> rounding;
    bool plain;

    Pass(const zk_add_noise_args& a, const zk_tensor& t, uint64_t index) : args(a), tensor(t) {
        plain = !a.stochastic && !a.each_step && t.keep == ZK_KEEP_ALL;
        noise.reserve(a.seed_count);
        for (int64_t k = 0; k < a.seed_count; k++) {
            noise.emplace_back(a.seeds[k], t, index);
            scaled.push_back(KIND == ZK_GAUSSIAN ? a.coeffs[k] * UNIT : a.coeffs[k]);
            plain &= a.coeffs[k] == 0 || std::fabs(a.coeffs[k]) >= SMALL;
        }
        for (int64_t k = 0; a.stochastic && k < (a.each_step ? a.seed_count : 1); k++)
            rounding.emplace_back(a.rounding_seeds[k], t.stream, ZK_ROUNDING,
                                  (uint32_t)(index / 8 >> 32));
    }

    void tile(char* out, const char* in, const Place& at) {
        plain ? tile_plain(out, in, at) : tile_general(out, in, at);
    }

    // No mask, one rounding to nearest: what a training step does.
    void tile_plain(char* out, const char* in, const Place& at) {
        F w[8], acc[8];
        T::load(w, in);
        const float decay = args.decays[0];
        if (decay != 1)
            for (int r = 0; r < 8; r++) w[r] *= decay;
        noise[0].add(acc, w, scaled[0], at.index);
        for (int64_t k = 1; k < args.seed_count; k++) noise[k].add(acc, acc, scaled[k], at.index);
        T::store(out, acc, in);
    }

    void tile_general(char* out, const char* in, const Place& at) {
        F w[8];
        I keep[8];
        T::load(w, in);
        keep_static<T::SPLIT>(keep, tensor, at);
        const int64_t steps = args.each_step ? args.seed_count : 1;
        for (int64_t step = 0; step < steps; step++) {
            if (tensor.keep == ZK_KEEP_MAGNITUDE)
                for (int r = 0; r < 8; r++) keep[r] = keep_magnitude(w[r], tensor.keep_threshold);
            F acc[8];
            for (int r = 0; r < 8; r++) acc[r] = w[r] * args.decays[step];
            const int64_t from = args.each_step ? step : 0;
            const int64_t to = args.each_step ? step + 1 : args.seed_count;
            for (int64_t k = from; k < to; k++) noise[k].add_small(acc, args.coeffs[k], at.index);
            if (args.stochastic) {
                U u[8];
                uniform16<S, T::SPLIT>(u, (uint32_t)(at.index / 8), rounding[step]);
                for (int r = 0; r < 8; r++) acc[r] = T::stochastic(acc[r], u[r]);
            } else {
                for (int r = 0; r < 8; r++) acc[r] = T::nearest(acc[r]);
            }
            for (int r = 0; r < 8; r++) w[r] = select(keep[r], acc[r], w[r]);
        }
        T::store(out, w, in);
    }

    void run(int64_t begin, int64_t end) {
        const char* in = (const char*)tensor.in;
        char* out = (char*)tensor.out;
        const uint64_t last = tensor.offset + end;
        uint64_t index = (tensor.offset + begin) / TILE * TILE;
        for (; index < last; index += TILE) {
            const Place at = {index, (int64_t)(index - tensor.offset)};
            const int64_t from = std::max(at.local, begin), to = std::min(at.local + TILE, end);
            if (to - from == TILE) {
                tile(out + at.local * T::BYTES, in + at.local * T::BYTES, at);
                continue;
            }
            // A tile that the span covers in part runs on a copy.
            char copy[TILE * T::BYTES] = {};
            char* inside = copy + (from - at.local) * T::BYTES;
            std::memcpy(inside, in + from * T::BYTES, (to - from) * T::BYTES);
            tile(copy, copy, at);
            std::memcpy(out + from * T::BYTES, inside, (to - from) * T::BYTES);
        }
    }
};

template <int DTYPE, int KIND>
void run(const zk_add_noise_args& args, const Span& span) {
    Pass<DTYPE, KIND>(args, *span.tensor, span.tensor->offset + span.begin)
        .run(span.begin, span.end);
}

}  // namespace

void ZK_ENTRY(const zk_add_noise_args& args, const Span& span) {
    static constexpr SpanFunction table[3][2] = {
        {run<ZK_FLOAT32, ZK_GAUSSIAN>, run<ZK_FLOAT32, ZK_RADEMACHER>},
        {run<ZK_BFLOAT16, ZK_GAUSSIAN>, run<ZK_BFLOAT16, ZK_RADEMACHER>},
        {run<ZK_FLOAT16, ZK_GAUSSIAN>, run<ZK_FLOAT16, ZK_RADEMACHER>},
    };
    table[span.tensor->dtype][args.kind](args, span);
}

// Directions of rank one: a sign a row times a sign a column, so that nothing is drawn for a
// weight.
#pragma once

#include "draw.h"

namespace {

// The signs of a kind, of one seed, from any place on: a group of blocks is drawn and kept.
class SignsFrom {
    uint64_t seed, group = UINT64_MAX;
    SignBits<S> bits;

 public:
    explicit SignsFrom(uint64_t seed) : seed(seed) {}
    // Bit i is the sign of place + i, as far as the word of 32 goes that has `place`.
    uint32_t at(uint32_t kind, uint32_t stream, uint64_t place) {
        if (__builtin_expect(place / ROW != group, 0)) {
            group = place / ROW;
            const uint64_t block = group * S::W;
            bits.fill((uint32_t)block, RoundKeys(seed, stream, kind, (uint32_t)(block >> 32)));
        }
        return bits.at((uint32_t)(place % ROW)) >> place % 32;
    }
};

// z = left(row) · right(column). The right signs of a span are drawn once, as a table of ±1 a seed
// in the layout of tiles; the left ones are taken into the coefficients, once a row. A term is then
// one fused multiply-add, whose product is exact.
//
// The table counts columns from that of the span's first tile on, and goes on beyond the last one
// with the first, for as long as a tile is: a tile may start at any column and go on in later rows.
template <bool SPLIT>
struct Directions<ZK_RANK1, SPLIT> {
    static constexpr bool exact = true;

    Directions(const zk_pass& a, const zk_tensor& t, uint64_t index)
        : args(a), stream(t.stream), columns(t.columns), first(index / TILE * TILE) {
        for (int64_t k = 0; k < a.seed_count; k++) left.emplace_back(a.seeds[k]);
        signed_c.resize(a.seed_count);
        enter_row(first / columns);
    }

    // Calls run(part) for the parts of the span that a table serves, with that table drawn.
    template <class Run>
    void walk(const Span& span, Run run) {
        const uint64_t offset = span.tensor->offset, last = offset + span.end;
        const uint64_t width = std::min(columns, last - first);
        const uint64_t most = std::max<uint64_t>(TILE, TABLE / args.seed_count / TILE * TILE);
        for (from = 0; from < width; from += most) {
            const uint64_t wide = std::min(most, width - from);
            draw_right(wide + TILE);
            if (wide == width) return run(span);
            for (uint64_t at = first + from; at < last; at += columns) {
                const int64_t begin = std::max(span.begin, next_tile(at) - (int64_t)offset);
                const int64_t end = std::min(span.end, next_tile(at + wide) - (int64_t)offset);
                if (begin < end) run(Span{span.tensor, begin, end});
            }
        }
    }

    // acc = start + Σ c z over seeds from … to − 1.
    void add(F* acc, const F* start, int64_t from_seed, int64_t to_seed, uint64_t index) {
        locate(index);
        F sum[8];
        for (int r = 0; r < 8; r++) sum[r] = start[r];
        for (int64_t k = from_seed; k < to_seed; k++) {
            if (__builtin_expect(column + TILE > columns, 0)) {
                F c[8];
                of_several_rows(c, k);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) sum[r] = S::fma_exact(right(k, r), c[r], sum[r]);
            } else {
                const F c = splat(signed_c[k]);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) sum[r] = S::fma_exact(right(k, r), c, sum[r]);
            }
        }
        for (int r = 0; r < 8; r++) acc[r] = sum[r];
    }
    void add_any(F* acc, int64_t from_seed, int64_t to_seed, uint64_t index) {
        add(acc, acc, from_seed, to_seed, index);
    }
    // acc += Σ c z and mirror −= Σ c z.
    void add_both(F* acc, F* mirror, uint64_t index) {
        locate(index);
        for (int64_t k = 0; k < args.seed_count; k++) {
            F c[8];
            if (column + TILE > columns)
                of_several_rows(c, k);
            else
                for (int r = 0; r < 8; r++) c[r] = splat(signed_c[k]);
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const F z = right(k, r);
                acc[r] = S::fma_exact(z, c[r], acc[r]);
                mirror[r] = S::fma_exact(z, -c[r], mirror[r]);
            }
        }
    }

 private:
    // A span's weights are read from memory that is slower than the cache that this many ±1 fit in.
    static constexpr uint64_t TABLE = 1 << 16;
    static constexpr bool PLANES = SPLIT && S::W > 1;
    struct alignas(sizeof(F)) Line {
        float x[S::W];
    };

    const zk_pass& args;
    const uint32_t stream;
    const uint64_t columns;
    const uint64_t first;  // index of the span's first tile
    std::vector<SignsFrom> left;
    std::vector<float> signed_c;  // left(row) · c of each seed
    uint64_t tile = UINT64_MAX, row, column;
    std::vector<Line> table;
    uint64_t from = 0;     // the table's first place
    uint64_t length;       // of it, for a seed
    uint64_t at[2], step;  // where the places of a tile's registers are in it

    static int64_t next_tile(uint64_t index) { return (int64_t)((index + TILE - 1) / TILE * TILE); }

    void enter_row(uint64_t number) {
        row = number;
        for (int64_t k = 0; k < args.seed_count; k++) signed_c[k] = of_row(k, row);
    }
    float of_row(int64_t k, uint64_t number) {
        return left[k].at(ZK_LEFT, stream, number) & 1 ? args.coeffs[k] : -args.coeffs[k];
    }

    void locate(uint64_t index) {
        if (index == tile) return;
        tile = index;
        if (index - row * columns >= columns) enter_row(index / columns);
        column = index - row * columns;
        const uint64_t start = first % columns;
        const uint64_t place = (column < start ? column + columns : column) - start - from;
        // Split, the even places come before the odd ones.
        at[0] = PLANES ? place / 2 + place % 2 * (length / 2) : place;
        at[1] = PLANES ? (place + 1) / 2 + (place + 1) % 2 * (length / 2) : place + S::W;
        step = PLANES ? S::W : 2 * S::W;
    }

    F right(int64_t k, int r) const {
        F x;
        std::memcpy(&x, table[0].x + k * length + at[r % 2] + step * (r / 2), sizeof x);
        return x;
    }

    // left(row) · c of each element of a tile with elements of more than one row.
    void of_several_rows(F* c, int64_t k) {
        float x[TILE];
        uint64_t number = row, end = columns - column;
        for (uint64_t i = 0; i < TILE; end += columns, number++) {
            const float one = of_row(k, number);
            for (; i < std::min<uint64_t>(end, TILE); i++) x[i] = one;
        }
        std::memcpy(c, x, sizeof x);
        if (PLANES) S::split(c);
    }

    void draw_right(uint64_t count) {
        length = (count + TILE - 1) / TILE * TILE;
        table.resize(length / S::W * args.seed_count);
        tile = UINT64_MAX;
        for (int64_t k = 0; k < args.seed_count; k++) {
            SignsFrom signs(args.seeds[k]);
            uint64_t place = (first + from) % columns;
            for (uint64_t done = 0; done < length; done += TILE) {
                uint32_t word[(TILE + 31) / 32] = {};
                for (uint64_t i = 0; i < TILE;) {
                    const uint64_t n = std::min<uint64_t>(
                        {columns - place, 32 - place % 32, 32 - i % 32, TILE - i});
                    word[i / 32] |= signs.at(ZK_RIGHT, stream, place) << i % 32;
                    i += n;
                    place = place + n == columns ? 0 : place + n;
                    // What came along beyond n is not of this place.
                    if (i % 32) word[i / 32] &= (1u << i % 32) - 1;
                }
                for (int r = 0; r < 8; r++) {
                    const F sign = signed_by<SPLIT>(word, r, 1.0f);
                    const uint64_t to =
                        PLANES ? done / 2 + r % 2 * (length / 2) + S::W * (r / 2) : done + S::W * r;
                    std::memcpy(table[0].x + k * length + to, &sign, sizeof sign);
                }
            }
        }
    }
};

}  // namespace

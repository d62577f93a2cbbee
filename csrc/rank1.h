// Directions of rank one: a sign a row times a sign a column, so that nothing is drawn for a
// weight.
#pragma once

#include <algorithm>
#include <memory>

#include "draw.h"

namespace {

// The signs of one kind and seed.
class Signs {
    const uint64_t seed;
    const uint32_t stream, kind;
    uint64_t group = UINT64_MAX;  // of blocks, the one in `bits`
    SignBits<S> bits;

    uint32_t from(uint64_t place) {
        if (__builtin_expect(place / ROW != group, 0)) {
            group = place / ROW;
            const uint64_t block = group * S::W;
            bits.fill((uint32_t)block, RoundKeys(seed, stream, kind, (uint32_t)(block >> 32)));
        }
        return bits.at((uint32_t)(place % ROW) / 32 * 32) >> place % 32;
    }

 public:
    Signs(uint64_t seed, uint32_t stream, uint32_t kind) : seed(seed), stream(stream), kind(kind) {}

    // A tile's signs from `place` on, where 0 comes after end − 1; and the place that comes next.
    uint64_t take(uint32_t* word, uint64_t place, uint64_t end) {
        for (int i = 0; i < (TILE + 31) / 32; i++) word[i] = 0;
        for (int i = 0, n; i < TILE; i += n) {
            n = std::min(std::min(TILE - i, 32 - i % 32), 32 - (int)(place % 32));
            n = (int)std::min<uint64_t>(n, end - place);
            word[i / 32] |= (from(place) & (uint32_t)((1ull << n) - 1)) << i % 32;
            place = place + n == end ? 0 : place + n;
        }
        return place;
    }
};

// Numbers that a vector loads and stores whole.
class Table {
    struct alignas(sizeof(F)) Line {
        float x[S::W];
    };
    std::unique_ptr<Line[]> lines;
    uint64_t size = 0;

 public:
    // Room for so many numbers, whatever they are; a whole number of tiles.
    void hold(uint64_t count) {
        if (count > size) lines.reset(new Line[(size = count) / S::W]);
    }
    float* at(uint64_t i) { return lines[0].x + i; }
    const float* at(uint64_t i) const { return lines[0].x + i; }
};

inline uint64_t whole_tiles(uint64_t count) { return (count + TILE - 1) / TILE * TILE; }

// z = left(row) · right(column). For a block of rows there is a table of left(row) · c, and for a
// panel of columns one of right(column) in the layout of tiles, of every seed each: a term is then
// one fused multiply-add, whose product is exact.
//
// Columns are counted from the span's first tile on, with the first after the last: a tile may
// start at any column and go on in later rows.
template <bool SPLIT>
struct Directions<ZK_RANK1, SPLIT> {
    static constexpr bool exact = true;

    Directions(const zk_pass& a, const zk_tensor& t, uint64_t index)
        : args(a),
          tensor(t),
          columns(t.columns),
          first(index / TILE * TILE),
          start(first % columns) {}

    // Calls run(part) for the parts of the span that the tables serve in turn.
    template <class Run>
    void walk(const Span& span, Run run) {
        const uint64_t offset = tensor.offset, last = offset + span.end, count = args.seed_count;
        const uint64_t width = std::min(columns, last - first);
        const uint64_t wide = std::max<uint64_t>(TILE, PANEL / count / TILE * TILE);
        const uint64_t high = std::max<uint64_t>(128, BLOCK / count / 128 * 128);
        const auto part = [&](uint64_t from, uint64_t to, int64_t ahead) {
            const int64_t begin = std::max<int64_t>(span.begin, whole_tiles(from) - offset);
            const int64_t end = std::min<int64_t>(span.end, whole_tiles(to) - offset);
            if (begin < end) run(Span{&tensor, begin, end, ahead});
        };
        if (width <= wide) draw_right(0, width);
        for (uint64_t rows = (last - 1) / columns - first / columns + 1, top = first / columns, n;
             rows > 0; rows -= n, top += n) {
            n = std::min(rows, high);
            draw_left(top, n);
            const uint64_t begin = std::max(first, top * columns);
            const uint64_t end = n == rows ? last : (top + n) * columns;
            if (width <= wide) {
                part(begin, end, 0);
                continue;
            }
            for (uint64_t x = 0; x < width; x += wide) {
                draw_right(x, std::min(wide, width - x));
                row = top, row_start = top * columns;
                for (uint64_t at = first + (begin - first) / columns * columns; at < end;
                     at += columns)
                    part(std::max(begin, at + x), std::min(end, at + x + std::min(wide, width - x)),
                         AHEAD * columns);
            }
        }
    }

    // Goes to a tile, one behind the tile before or in another part.
    ZK_INLINE void enter(uint64_t index) {
        uint64_t column = index - row_start;
        if (__builtin_expect(column >= columns, 0)) {
            row += column / columns;
            column %= columns;
            row_start = index - column;
        }
        const uint64_t place = (column < start ? column + columns : column) - start - right_from;
        // Split, the even places come before the odd ones.
        even = PLANES ? place / 2 + place % 2 * (right_length / 2) : place;
        odd = PLANES ? (place + 1) / 2 + (place + 1) % 2 * (right_length / 2) : place + S::W;
        in_one_row = column + TILE <= columns;
        if (__builtin_expect(!in_one_row, 0)) spread_rows(columns - column);
    }

    // acc = start + Σ c z over seeds from … to − 1.
    ZK_INLINE void add(F* acc, const F* start, int64_t from, int64_t to, uint64_t) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) acc[r] = start[r];
        const float* z = right.at(from * right_length);
        if (__builtin_expect(in_one_row, 1)) {
            const float *c = left_of(from), *z_even = z + even, *z_odd = z + odd;
            const uint64_t next = right_length, next_c = left_length;
            for (int64_t k = from; k < to; k++, z_even += next, z_odd += next, c += next_c) {
                const F one = splat(*c);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++)
                    acc[r] = S::fma_exact(load(r % 2 ? z_odd : z_even, r), one, acc[r]);
            }
        } else {
            for (int64_t k = from; k < to; k++, z += right_length)
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++)
                    acc[r] =
                        S::fma_exact(load(z + (r % 2 ? odd : even), r), spread_c(k, r), acc[r]);
        }
    }
    ZK_INLINE void add_any(F* acc, int64_t from, int64_t to, uint64_t index) {
        add(acc, acc, from, to, index);
    }
    // acc += Σ c z and mirror −= Σ c z.
    ZK_INLINE void add_both(F* acc, F* mirror, uint64_t) {
        const float* z = right.at(0);
        for (int64_t k = 0; k < args.seed_count; k++, z += right_length) {
            const F one = splat(*left_of(k));
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const F sign = load(z + (r % 2 ? odd : even), r);
                const F c = __builtin_expect(in_one_row, 1) ? one : spread_c(k, r);
                acc[r] = S::fma_exact(sign, c, acc[r]);
                mirror[r] = S::fma_exact(sign, -c, mirror[r]);
            }
        }
    }

 private:
    static constexpr uint64_t PANEL = 1 << 12;  // signs in a table of columns, which stays in L1
    static constexpr uint64_t BLOCK = 1 << 12;  // coefficients in one of rows
    static constexpr int64_t AHEAD = 4;  // rows from a piece to what is fetched along with it
    static constexpr bool PLANES = SPLIT && S::W > 1;
    static constexpr int STEP = PLANES ? S::W : 2 * S::W;  // to the next even or odd register

    const zk_pass& args;
    const zk_tensor& tensor;
    const uint64_t columns;
    const uint64_t first, start;  // index of the span's first tile, and its column
    Table left, right, spread;
    uint64_t top, left_length;          // the first row of `left`, and its numbers a seed
    uint64_t right_from, right_length;  // the same of `right`
    uint64_t row, row_start;            // of the tile's first element
    uint64_t even, odd;                 // where the tile's even and odd registers begin in `right`
    bool in_one_row;  // the tile is; else `spread` has left(row) · c of each of its elements

    const float* left_of(int64_t k) const { return left.at(k * left_length + (row - top)); }
    static F load(const float* z, int r) { return load_as<F>(z + STEP * (r / 2)); }
    F spread_c(int64_t k, int r) const { return load_as<F>(spread.at(k * TILE + r * S::W)); }

    void draw_left(uint64_t from, uint64_t count) {
        top = row = from, row_start = from * columns;
        left_length = whole_tiles(count + TILE / columns + 1);
        left.hold(left_length * args.seed_count);
        for (int64_t k = 0; k < args.seed_count; k++) {
            Signs signs(args.seeds[k], tensor.stream, ZK_LEFT);
            for (uint64_t done = 0, place = from; done < left_length; done += TILE) {
                uint32_t word[(TILE + 31) / 32];
                place = signs.take(word, place, UINT64_MAX);
                for (int r = 0; r < 8; r++)
                    store_as(left.at(k * left_length + done + r * S::W),
                             signed_by<false>(word, r, args.coeffs[k]));
            }
        }
    }

    void draw_right(uint64_t from, uint64_t count) {
        right_from = from;
        // Where tiles lie in one row each, none goes on beyond the last column.
        right_length = whole_tiles(count + (columns % TILE ? TILE : 0));
        right.hold(right_length * args.seed_count);
        for (int64_t k = 0; k < args.seed_count; k++) {
            Signs signs(args.seeds[k], tensor.stream, ZK_RIGHT);
            for (uint64_t done = 0, place = (start + from) % columns; done < right_length;
                 done += TILE) {
                uint32_t word[(TILE + 31) / 32];
                place = signs.take(word, place, columns);
                for (int r = 0; r < 8; r++) {
                    const uint64_t to = PLANES
                                            ? done / 2 + r % 2 * (right_length / 2) + r / 2 * S::W
                                            : done + r * S::W;
                    store_as(right.at(k * right_length + to), signed_by<SPLIT>(word, r, 1.0f));
                }
            }
        }
    }

    __attribute__((noinline)) void spread_rows(uint64_t end) {
        spread.hold(TILE * args.seed_count);
        for (int64_t k = 0; k < args.seed_count; k++) {
            float c[TILE];
            F x[8];
            const float* one = left_of(k);
            uint64_t i = 0;
            for (uint64_t to = end; i < TILE; to += columns, one++)
                for (; i < std::min<uint64_t>(to, TILE); i++) c[i] = *one;
            for (int r = 0; r < 8; r++) x[r] = load_as<F>(c + r * S::W);
            if (PLANES) S::split(x);
            for (int r = 0; r < 8; r++) store_as(spread.at(k * TILE + r * S::W), x[r]);
        }
    }
};

}  // namespace

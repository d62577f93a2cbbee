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

    // A tile's signs from `place` on, where 0 comes after end − 1; returns the place after them.
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

// Numbers that lie as vectors are loaded best, a whole number of tiles.
class Table {
    struct alignas(sizeof(F)) Line {
        float x[S::W];
    };
    std::unique_ptr<Line[]> lines;
    uint64_t size = 0;

 public:
    // Room for so many of whatever value.
    void hold(uint64_t count) {
        if (count > size) lines.reset(new Line[(size = count) / S::W]);
    }
    float* at(uint64_t i) { return lines[0].x + i; }
    const float* at(uint64_t i) const { return lines[0].x + i; }
};

inline uint64_t whole_tiles(uint64_t count) { return (count + TILE - 1) / TILE * TILE; }

// Rows row … row_end − 1 of a parameter, columns from … to − 1.
struct Rectangle {
    uint64_t row, row_end, from, to;
};

// z = left(row) · right(column). For a block of rows there is a table of left(row) · c, and for a
// panel of columns one of right(column) in the layout of tiles, of every seed each: a term is then
// one fused multiply-add, whose product is exact. A tile may start before what the tables are for,
// or end behind it, in other rows too; so they have a margin on both sides.
template <bool SPLIT>
struct Directions<ZK_RANK1, SPLIT> {
    static constexpr bool exact = true;
    const uint64_t columns;

    Directions(const zk_pass& a, const zk_tensor& t, uint64_t)
        : columns(t.columns), args(a), tensor(t) {}

    // Calls run(rectangle) for the rectangles that a span is made of, with their tables drawn.
    template <class Run>
    void rectangles(const Span& span, Run run) {
        const uint64_t begin = tensor.offset + span.begin, end = tensor.offset + span.end;
        const uint64_t row = begin / columns, last = (end - 1) / columns;
        // Of the first row what is before, and of the last one what is behind, is not the span's.
        const uint64_t head = begin - row * columns, tail = end - last * columns;
        const uint64_t from = row == last ? head : 0, to = row == last ? tail : columns;
        const uint64_t wide = std::max<uint64_t>(TILE, PANEL / args.seed_count / TILE * TILE);
        const uint64_t high = std::max<uint64_t>(TILE, BLOCK / args.seed_count / TILE * TILE);
        for (uint64_t top = row, n; top <= last; top += n) {
            n = std::min(high, last + 1 - top);
            draw_left(top, n);
            for (uint64_t x = from; x < to; x += wide) {
                const uint64_t x_end = std::min(to, x + wide);
                if (top == row || to - from > wide) draw_right(x, x_end);
                const bool headed = top == row && x < head;
                const bool tailed = top + n > last && tail < x_end;
                const uint64_t first = top + headed, behind = top + n - tailed;
                if (headed && head < x_end) run(Rectangle{row, row + 1, head, x_end});
                if (first < behind) run(Rectangle{first, behind, x, x_end});
                if (tailed && x < tail) run(Rectangle{last, last + 1, x, tail});
            }
        }
    }

    // Calls run(part) for the parts of a span that the tables serve in turn.
    template <class Run>
    void walk(const Span& span, Run run) {
        rectangles(span, [&](const Rectangle& r) {
            const int64_t start = (int64_t)(r.row * columns - tensor.offset);
            const int64_t count = r.row_end - r.row;
            row = r.row, row_start = row * columns;
            if (r.to - r.from == columns)
                return run(Span{&tensor, start, start + count * (int64_t)columns});
            for (int64_t i = 0, at = start; i < count; i++, at += columns)
                run(Span{&tensor, at + (int64_t)r.from, at + (int64_t)r.to});
        });
    }

    // Goes to a tile.
    ZK_INLINE void enter(uint64_t index) {
        if (__builtin_expect(index - row_start >= columns, 0)) find_row(index);
        const uint64_t column = index - row_start;
        uint64_t place = column - right_from + TILE;
        if (place >= right_to - right_from + TILE) place -= columns;  // that of the row before
        here = registers(place);
        in_one_row = column + TILE <= columns;
        if (__builtin_expect(!in_one_row, 0)) spread_rows(columns - column);
    }

    // acc = start + Σ c z over seeds from … to − 1.
    ZK_INLINE void add(F* acc, const F* start, int64_t from, int64_t to, uint64_t) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) acc[r] = start[r];
        const float* z = of_seed(from);
        if (__builtin_expect(in_one_row, 1)) {
            const float *c = coefficient(from, row), *even = z + here.even, *odd = z + here.odd;
            const uint64_t next = right_length, next_c = left_length;
            for (int64_t k = from; k < to; k++, even += next, odd += next, c += next_c) {
                const F one = splat(*c);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++)
                    acc[r] = S::fma_exact(load(r % 2 ? odd : even, r), one, acc[r]);
            }
        } else {
            for (int64_t k = from; k < to; k++, z += right_length)
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++)
                    acc[r] = S::fma_exact(load(z + here.of(r), r), spread_c(k, r), acc[r]);
        }
    }
    ZK_INLINE void add_any(F* acc, int64_t from, int64_t to, uint64_t index) {
        add(acc, acc, from, to, index);
    }
    // acc += Σ c z and mirror −= Σ c z.
    ZK_INLINE void add_both(F* acc, F* mirror, uint64_t) {
        for (int64_t k = 0; k < args.seed_count; k++) {
            const float* z = of_seed(k);
            const F one = splat(*coefficient(k, row));
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const F sign = load(z + here.of(r), r);
                const F c = __builtin_expect(in_one_row, 1) ? one : spread_c(k, r);
                acc[r] = S::fma_exact(sign, c, acc[r]);
                mirror[r] = S::fma_exact(sign, -c, mirror[r]);
            }
        }
    }

    // Where the signs of a tile's registers begin, among those of a seed.
    struct Registers {
        uint64_t even, odd;
        uint64_t of(int r) const { return r % 2 ? odd : even; }
    };
    // Of the tile that begins with a column of the panel.
    Registers from_column(uint64_t column) const { return registers(column - right_from + TILE); }
    const float* of_seed(int64_t k) const { return right.at(k * right_length); }
    // left(row) · c; that of the next row follows.
    const float* coefficient(int64_t k, uint64_t of_row) const {
        return left.at(k * left_length + (of_row - left_from));
    }
    static F load(const float* z, int r) { return load_as<F>(z + STEP * (r / 2)); }
    uint64_t right_length, left_length;  // numbers of a seed in the tables

 private:
    static constexpr uint64_t PANEL = 1 << 17;  // signs of columns: half of the second cache
    static constexpr uint64_t BLOCK = 1 << 12;  // coefficients of rows
    static constexpr bool PLANES = SPLIT && S::W > 1;
    static constexpr int STEP = PLANES ? S::W : 2 * S::W;  // to the next even or odd register

    const zk_pass& args;
    const zk_tensor& tensor;
    Table left, right, spread;
    uint64_t left_from, right_from, right_to;  // the first row, and the panel
    uint64_t row, row_start;                   // of the tile's first element
    Registers here;
    bool in_one_row;  // the tile is; else `spread` has left(row) · c of each of its elements

    // Split, the signs at even places come before those at odd ones.
    Registers registers(uint64_t place) const {
        if (!PLANES) return {place, place + S::W};
        return {place / 2 + place % 2 * (right_length / 2),
                (place + 1) / 2 + (place + 1) % 2 * (right_length / 2)};
    }
    F spread_c(int64_t k, int r) const { return load_as<F>(spread.at(k * TILE + r * S::W)); }

    __attribute__((noinline)) void find_row(uint64_t index) {
        row = index / columns, row_start = row * columns;
    }

    void draw_left(uint64_t from, uint64_t count) {
        const uint64_t margin = TILE / columns + 1;
        left_from = from - std::min(from, margin);
        left_length = whole_tiles(count + 2 * margin);
        left.hold(left_length * args.seed_count);
        for (int64_t k = 0; k < args.seed_count; k++) {
            Signs signs(args.seeds[k], tensor.stream, ZK_LEFT);
            for (uint64_t done = 0, place = left_from; done < left_length; done += TILE) {
                uint32_t word[(TILE + 31) / 32];
                place = signs.take(word, place, UINT64_MAX);
                for (int r = 0; r < 8; r++)
                    store_as(left.at(k * left_length + done + r * S::W),
                             signed_by<false>(word, r, args.coeffs[k]));
            }
        }
    }

    void draw_right(uint64_t from, uint64_t to) {
        right_from = from, right_to = to;
        right_length = whole_tiles(to - from) + 2 * TILE;
        right.hold(right_length * args.seed_count);
        for (int64_t k = 0; k < args.seed_count; k++) {
            Signs signs(args.seeds[k], tensor.stream, ZK_RIGHT);
            uint64_t place = (from + columns - TILE % columns) % columns;
            for (uint64_t done = 0; done < right_length; done += TILE) {
                uint32_t word[(TILE + 31) / 32];
                place = signs.take(word, place, columns);
                const Registers to = registers(done);
                for (int r = 0; r < 8; r++)
                    store_as(right.at(k * right_length + to.of(r) + STEP * (r / 2)),
                             signed_by<SPLIT>(word, r, 1.0f));
            }
        }
    }

    __attribute__((noinline)) void spread_rows(uint64_t end) {
        spread.hold(TILE * args.seed_count);
        for (int64_t k = 0; k < args.seed_count; k++) {
            float c[TILE];
            F x[8];
            const float* one = coefficient(k, row);
            for (uint64_t i = 0, to = end; i < TILE; to += columns, one++)
                for (; i < std::min<uint64_t>(to, TILE); i++) c[i] = *one;
            for (int r = 0; r < 8; r++) x[r] = load_as<F>(c + r * S::W);
            if (PLANES) S::split(x);
            for (int r = 0; r < 8; r++) store_as(spread.at(k * TILE + r * S::W), x[r]);
        }
    }
};

}  // namespace

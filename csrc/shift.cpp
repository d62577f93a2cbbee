// y ← round(bias + scale · (x · taken) · given): by how much a direction of rank one shifts a
// product's rows, and what the product with the stored weight is then added to. Compiled once for
// each instruction set.
#include <algorithm>

#include "pass.h"
#include "tile.h"

namespace {

template <int DTYPE>
struct Shift {
    typedef Tile<DTYPE> T;
    static constexpr int64_t BYTES = T::BYTES;

    // A tile of which only `count` elements are there; the others are 0.
    static void load_some(F* w, const char* p, int64_t count) {
        char copy[TILE * BYTES] = {};
        std::memcpy(copy, p, count * BYTES);
        T::load(w, copy);
    }

    static ZK_INLINE void add_products(F* sums, const F* a, const F* b) {
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) sums[r] = S::fma(a[r], b[r], sums[r]);
    }

    static float dot(const char* x, const char* signs, int64_t count) {
        F sums[8] = {}, a[8], b[8];
        int64_t i = 0;
        for (; i + TILE <= count; i += TILE) {
            T::load(a, x + i * BYTES);
            T::load(b, signs + i * BYTES);
            add_products(sums, a, b);
        }
        if (i < count) {
            load_some(a, x + i * BYTES, count - i);
            load_some(b, signs + i * BYTES, count - i);
            add_products(sums, a, b);
        }
        for (int r = 4; r > 0; r /= 2)
            for (int q = 0; q < r; q++) sums[q] += sums[q + r];
        float lanes[S::W], sum = 0;
        store_as(lanes, sums[0]);
        for (const float lane : lanes) sum += lane;
        return sum;
    }

    static ZK_INLINE void store_shifted(char* y, const F* bias, const F* signs, float c) {
        // A NaN keeps no bits of what lay there.
        static const char nothing[TILE * BYTES] = {};
        F sums[8];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) sums[r] = S::fma_exact(signs[r], splat(c), bias[r]);
        T::store(y, sums, nothing);
    }

    static void row(char* y, const char* bias, const char* signs, float c, int64_t count) {
        F b[8] = {}, s[8];
        int64_t i = 0;
        for (; i + TILE <= count; i += TILE) {
            if (bias) T::load(b, bias + i * BYTES);
            T::load(s, signs + i * BYTES);
            store_shifted(y + i * BYTES, b, s, c);
        }
        if (i == count) return;
        char copy[TILE * BYTES];
        if (bias) load_some(b, bias + i * BYTES, count - i);
        load_some(s, signs + i * BYTES, count - i);
        store_shifted(copy, b, s, c);
        std::memcpy(y + i * BYTES, copy, (count - i) * BYTES);
    }

    static void run(const zk_shift& args, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t lane = i / args.rows;
            const char* taken = (const char*)args.taken + lane * args.signs_step * BYTES;
            const char* given = (const char*)args.given + lane * args.signs_step * BYTES;
            const char* bias = (const char*)args.bias;
            if (bias) bias += lane * args.bias_step * BYTES;
            const char* x = (const char*)args.x + i * args.in * BYTES;
            char* y = (char*)args.y + i * args.out * BYTES;
            row(y, bias, given, args.scales[lane] * dot(x, taken, args.in), args.out);
        }
    }
};

}  // namespace

void ZK_ENTRY(shift)(const zk_shift& args, int64_t begin, int64_t end) {
    if (args.dtype == ZK_FLOAT32) return Shift<ZK_FLOAT32>::run(args, begin, end);
    if (args.dtype == ZK_BFLOAT16) return Shift<ZK_BFLOAT16>::run(args, begin, end);
    Shift<ZK_FLOAT16>::run(args, begin, end);
}

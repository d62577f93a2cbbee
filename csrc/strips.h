// w ← round(decay · w + Σ c z) of a rank-one direction, several rows at a time: a vector of signs
// is loaded once for all of them.
#pragma once

#include "rank1.h"

namespace {

template <int DTYPE>
class Strips {
    typedef Tile<DTYPE> T;
    typedef Directions<ZK_RANK1, T::SPLIT> Noise;
    // As many rows at a time, and registers of each, as there are registers for. As long as the
    // signs stay in the first cache, memory is read faster row by row.
    static constexpr int ROWS = S::ROWS;
    static constexpr uint64_t FEW = 1 << 11;

    const zk_pass& args;
    const zk_tensor& tensor;
    const Noise& noise;

    // R rows, V registers of each, from a column on.
    template <int R, int V>
    ZK_INLINE void strip(char* const* out, const char* const* in, uint64_t row, uint64_t column) {
        F acc[R][V];
#pragma GCC unroll 8
        for (int q = 0; q < R; q++) {
            T::template load<V>(acc[q], in[q]);
            if (args.decays[0] != 1)
#pragma GCC unroll 8
                for (int r = 0; r < V; r++) acc[q][r] *= args.decays[0];
        }
        const auto place = noise.from_column(column);
        const float *even = noise.of_seed(0) + place.even, *odd = noise.of_seed(0) + place.odd;
        const float* c = noise.coefficient(0, row);
        for (int64_t k = 0; k < args.seed_count; k++) {
            F z[V];
#pragma GCC unroll 8
            for (int r = 0; r < V; r++) z[r] = Noise::load(r % 2 ? odd : even, r);
#pragma GCC unroll 8
            for (int q = 0; q < R; q++) {
                const F one = splat(c[q]);
#pragma GCC unroll 8
                for (int r = 0; r < V; r++) acc[q][r] = S::fma_exact(z[r], one, acc[q][r]);
            }
            even += noise.right_length, odd += noise.right_length, c += noise.left_length;
        }
#pragma GCC unroll 8
        for (int q = 0; q < R; q++) T::template store<V>(out[q], acc[q], in[q]);
    }

    template <int R, int V>
    void rows(uint64_t row, uint64_t from, uint64_t to) {
        constexpr int64_t SIZE = V * S::W, BYTES = T::BYTES;
        const char* in[R];
        char* out[R];
        for (int q = 0; q < R; q++) {
            const int64_t local = (int64_t)((row + q) * noise.columns + from - tensor.offset);
            in[q] = (const char*)tensor.in + local * BYTES;
            out[q] = (char*)tensor.out + local * BYTES;
        }
        uint64_t x = from;
        for (; x + SIZE <= to; x += SIZE) {
            if (R > 1) fetch<R>(in, SIZE * BYTES, 2 * R * noise.columns * BYTES);
            strip<R, V>(out, in, row, x);
            for (int q = 0; q < R; q++) in[q] += SIZE * BYTES, out[q] += SIZE * BYTES;
        }
        if (x == to) return;
        char copies[R][SIZE * BYTES] = {};
        char* both[R];
        for (int q = 0; q < R; q++)
            both[q] = (char*)std::memcpy(copies[q], in[q], (to - x) * BYTES);
        strip<R, V>(both, both, row, x);
        for (int q = 0; q < R; q++) std::memcpy(out[q], copies[q], (to - x) * BYTES);
    }

    // Has what lies `ahead` of rows brought into the second cache; where there is none, nothing
    // happens.
    template <int R>
    static ZK_INLINE void fetch(const char* const* rows, int bytes, uint64_t ahead) {
        for (int q = 0; q < R; q++)
            for (int at = 0; at < bytes; at += 64)
                __builtin_prefetch((const void*)((uintptr_t)rows[q] + ahead + at), 0, 2);
    }

 public:
    Strips(const zk_pass& args, const zk_tensor& tensor, const Noise& noise)
        : args(args), tensor(tensor), noise(noise) {}

    // Whether a row is long enough for this to be of use.
    static bool fit(const zk_tensor& t) { return t.columns >= 8 * S::W; }

    void operator()(const Rectangle& r) {
        uint64_t row = r.row;
        if (args.seed_count * (r.to - r.from) > FEW)
            for (; row + ROWS <= r.row_end; row += ROWS) rows<ROWS, S::ACROSS>(row, r.from, r.to);
        for (; row < r.row_end; row++) rows<1, 8>(row, r.from, r.to);
    }
};

}  // namespace

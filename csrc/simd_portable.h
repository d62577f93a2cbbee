// One lane: any CPU. The members mean what they mean in simd_avx512.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Simd {
    static constexpr int W = 1;
    static constexpr int ROWS = 1, ACROSS = 8;
    static constexpr int HALVES = 1;
    typedef float F;
    typedef int32_t I;
    typedef uint32_t U;
    typedef uint64_t Word, L, P;
#if defined(__aarch64__)
    typedef __fp16 Half;  // g++ knows the other name from version 13 on
#else
    typedef _Float16 Half;
#endif

    static F fma(F a, F b, F c) { return std::fmaf(a, b, c); }
    static F fma_exact(F a, F b, F c) { return a * b + c; }
    static F to_float(I x) { return (F)x; }
    static F sqrt(F x) { return std::sqrt(x); }
    static F max(F a, F b) { return a > b ? a : b; }
    static I to_int(F x) { return (I)x; }
    static L mul(L a, L b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
    static L low(P p) { return p; }
    static L high(P p) { return p >> 32; }
    static U join(const L* x) { return (U)x[0]; }
    static U upper_halves(U even, U odd) { return (odd & 0xFFFF0000u) | (even >> 16); }
    template <int N>
    static bool any_nan(const F* x) {
        bool any = false;
        for (int r = 0; r < N; r++) any |= x[r] != x[r];
        return any;
    }
    static F load_half(const void* p) {
        Half h;
        std::memcpy(&h, p, sizeof h);
        return (F)h;
    }
    static void store_half(void* p, F x) {
        const Half h = (Half)x;
        std::memcpy(p, &h, sizeof h);
    }
    static F round_half(F x) { return (F)(Half)x; }

    template <bool SPLIT>
    static L lane_blocks(int) {
        return 0;
    }
    static void split(F*) {}
    static void unsplit(F*) {}
    // A block alone is in the order of memory, and pairs of its elements are even and odd.
    template <bool SPLIT>
    static void arrange(F*) {}
};

}  // namespace

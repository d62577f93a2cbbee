// Eight lanes: AVX2, FMA and F16C. The members mean what they mean in simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
    static constexpr int W = 8;
    static constexpr int ROWS = 2, ACROSS = 4;
    static constexpr int HALVES = 2;
    typedef float F __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    typedef uint32_t U __attribute__((vector_size(32)));
    typedef uint64_t Word;
    typedef uint64_t L __attribute__((vector_size(32)));
    typedef L P;

    static F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
    static F fma_exact(F a, F b, F c) { return fma(a, b, c); }
    static F to_float(I x) { return (F)_mm256_cvtepi32_ps((__m256i)x); }
    static F sqrt(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
    static F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
    static I to_int(F x) { return (I)_mm256_cvttps_epi32((__m256)x); }
    static L mul(L a, L b) { return (L)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
    static L low(P p) { return p; }
    static L high(P p) { return p >> 32; }
    static U join(const L* x) {
        return (U)_mm256_blend_ps((__m256)x[0], _mm256_moveldup_ps((__m256)x[1]), 0xAA);
    }
    static U upper_halves(U even, U odd) { return (odd & 0xFFFF0000u) | (even >> 16); }
    template <int N>
    static bool any_nan(const F* x) {
        __m256 any{};
#pragma GCC unroll 8
        for (int r = 0; r < N; r += 2)
            any = _mm256_or_ps(any, _mm256_cmp_ps((__m256)x[r], (__m256)x[r + 1], _CMP_UNORD_Q));
        return _mm256_movemask_ps(any) != 0;
    }
    static F load_half(const void* p) {
        return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }
    static void store_half(void* p, F x) { _mm_storeu_si128((__m128i*)p, half(x)); }
    static F round_half(F x) { return (F)_mm256_cvtph_ps(half(x)); }

    static void split(F* v) {
        for (int r = 0; r < 8; r += 2) {
            const __m256 a = (__m256)v[r], b = (__m256)v[r + 1];
            v[r] = even_lanes(_mm256_shuffle_ps(a, b, 0x88));
            v[r + 1] = even_lanes(_mm256_shuffle_ps(a, b, 0xDD));
        }
    }
    static void unsplit(F* v) {
        for (int r = 0; r < 8; r += 2) {
            const __m256 a = (__m256)v[r], b = (__m256)v[r + 1];
            const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
            v[r] = (F)_mm256_permute2f128_ps(low, high, 0x20);
            v[r + 1] = (F)_mm256_permute2f128_ps(low, high, 0x31);
        }
    }

    // Split layout: lane 4q + s has block 2s + q. Linear: block 4q + s.
    template <bool SPLIT>
    static L lane_blocks(int half) {
        if (SPLIT) return half ? L{2, 6, 3, 7} : L{0, 4, 1, 5};
        return half ? L{1, 3, 5, 7} : L{0, 2, 4, 6};
    }

    template <bool SPLIT>
    static void arrange(F* v) {
        __m256 a[4], b[4];
        if (SPLIT) {
            transpose(a, v[0], v[2], v[4], v[6]);
            transpose(b, v[1], v[3], v[5], v[7]);
            for (int s = 0; s < 4; s++) v[2 * s] = (F)a[s], v[2 * s + 1] = (F)b[s];
            return;
        }
        transpose(a, v[0], v[1], v[2], v[3]);
        transpose(b, v[4], v[5], v[6], v[7]);
        for (int s = 0; s < 4; s++) {
            v[s] = (F)_mm256_permute2f128_ps(a[s], b[s], 0x20);
            v[s + 4] = (F)_mm256_permute2f128_ps(a[s], b[s], 0x31);
        }
    }

 private:
    // Pairs a0 b0 a1 b1 to a0 a1 b0 b1.
    static F even_lanes(__m256 x) { return (F)_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xD8); }
    static __m128i half(F x) { return _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
    static void transpose(__m256* out, F v0, F v1, F v2, F v3) {
        const __m256d p = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)v0, (__m256)v1));
        const __m256d q = _mm256_castps_pd(_mm256_unpackhi_ps((__m256)v0, (__m256)v1));
        const __m256d r = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)v2, (__m256)v3));
        const __m256d s = _mm256_castps_pd(_mm256_unpackhi_ps((__m256)v2, (__m256)v3));
        out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(p, r));
        out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(p, r));
        out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(q, s));
        out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(q, s));
    }
};

}  // namespace

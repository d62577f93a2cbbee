// Sixteen lanes: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

// Of this file alone: every instruction set has a Simd, and the linker must not mix them.
namespace {

struct Simd {
    static constexpr int W = 16;  // float32 lanes
    static constexpr int ROWS = 4, ACROSS = 4;
    static constexpr int HALVES = 2;  // vectors of 64-bit lanes that fill W 32-bit lanes
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    typedef uint32_t U __attribute__((vector_size(64)));
    typedef uint64_t Word;  // a lane of the generator's state, and a vector of them
    typedef uint64_t L __attribute__((vector_size(64)));
    typedef L P;  // a product

    static F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
    // The same where a · b is exact: without such an instruction that is cheaper.
    static F fma_exact(F a, F b, F c) { return fma(a, b, c); }
    static F to_float(I x) { return (F)_mm512_cvtepi32_ps((__m512i)x); }
    static F sqrt(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
    // a > b ? a : b
    static F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
    static I to_int(F x) { return (I)_mm512_cvttps_epi32((__m512)x); }
    // Low 32 bits times low 32 bits, to 64.
    static L mul(L a, L b) { return (L)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
    // The words of a product; with rubbish above where a lane has room for it.
    static L low(P p) { return p; }
    static L high(P p) { return p >> 32; }
    // The low words of both: x[0] in the even lanes, x[1] in the odd ones.
    static U join(const L* x) {
        return (U)_mm512_mask_moveldup_ps((__m512)x[0], 0xAAAA, (__m512)x[1]);
    }
    // Each lane's upper halves, that of `odd` above that of `even`.
    static U upper_halves(U even, U odd) { return (odd & 0xFFFF0000u) | (even >> 16); }
    template <int N>
    static bool any_nan(const F* x) {
        unsigned any = 0;
#pragma GCC unroll 8
        for (int r = 0; r < N; r += 2)
            any |= _mm512_cmp_ps_mask((__m512)x[r], (__m512)x[r + 1], _CMP_UNORD_Q);
        return any != 0;
    }
    static F load_half(const void* p) {
        return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    }
    static void store_half(void* p, F x) { _mm256_storeu_si256((__m256i*)p, half(x)); }
    static F round_half(F x) { return (F)_mm512_cvtph_ps(half(x)); }

    // Linear layout to split, and back.
    static void split(F* v) {
        const __m512i even =
            _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        pairs(v, even, _mm512_add_epi32(even, _mm512_set1_epi32(1)));
    }
    static void unsplit(F* v) {
        const __m512i low =
            _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        pairs(v, low, _mm512_add_epi32(low, _mm512_set1_epi32(8)));
    }

    // Which block of a group each lane serves, for even and odd lanes, so that `arrange` needs
    // the fewest shuffles. Split layout: lane 4q + s has block 4s + q. Linear: 8(q/2) + 2s + q%2.
    template <bool SPLIT>
    static L lane_blocks(int half) {
        if (SPLIT) return half ? L{4, 12, 5, 13, 6, 14, 7, 15} : L{0, 8, 1, 9, 2, 10, 3, 11};
        return half ? L{2, 6, 3, 7, 10, 14, 11, 15} : L{0, 4, 1, 5, 8, 12, 9, 13};
    }

    // From v[i][lane] = output i of the lane's block to the order of memory. Linear: v[r] holds
    // elements 16r … 16r + 15. Split: v[2r] holds the even ones of 32r … 32r + 31, v[2r+1] the odd.
    template <bool SPLIT>
    static void arrange(F* v) {
        __m512 a[4], b[4];
        if (SPLIT) {
            transpose(a, v[0], v[2], v[4], v[6]);
            transpose(b, v[1], v[3], v[5], v[7]);
            for (int s = 0; s < 4; s++) v[2 * s] = (F)a[s], v[2 * s + 1] = (F)b[s];
            return;
        }
        transpose(a, v[0], v[1], v[2], v[3]);
        transpose(b, v[4], v[5], v[6], v[7]);
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for (int s = 0; s < 4; s++) {
            const __m512d x = _mm512_castps_pd(a[s]), y = _mm512_castps_pd(b[s]);
            v[s] = (F)_mm512_permutex2var_pd(x, low, y);
            v[s + 4] = (F)_mm512_permutex2var_pd(x, high, y);
        }
    }

 private:
    static void pairs(F* v, __m512i first, __m512i second) {
        for (int r = 0; r < 8; r += 2) {
            const __m512 a = (__m512)v[r], b = (__m512)v[r + 1];
            v[r] = (F)_mm512_permutex2var_ps(a, first, b);
            v[r + 1] = (F)_mm512_permutex2var_ps(a, second, b);
        }
    }
    static __m256i half(F x) {
        return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    // 4 × 4 transposes, one in each 128-bit lane.
    static void transpose(__m512* out, F v0, F v1, F v2, F v3) {
        const __m512d p = _mm512_castps_pd(_mm512_unpacklo_ps((__m512)v0, (__m512)v1));
        const __m512d q = _mm512_castps_pd(_mm512_unpackhi_ps((__m512)v0, (__m512)v1));
        const __m512d r = _mm512_castps_pd(_mm512_unpacklo_ps((__m512)v2, (__m512)v3));
        const __m512d s = _mm512_castps_pd(_mm512_unpackhi_ps((__m512)v2, (__m512)v3));
        out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
        out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
        out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
        out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
    }
};

}  // namespace

// Four lanes: what every 64-bit ARM CPU has. The members mean what they mean in simd_avx512.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

struct Simd {
    static constexpr int W = 4;
    static constexpr int ROWS = 4, ACROSS = 4;
    // The product of 64-bit lanes takes packed words, so the state stays packed: repacking it for
    // each product is half as many instructions again.
    static constexpr int HALVES = 1;
    typedef uint32_t Word;
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));
    typedef U L;
    struct P {
        uint64x2_t low, high;  // of lanes 0 and 1, and of 2 and 3
    };

    static F fma(F a, F b, F c) {
        return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    }
    static F fma_exact(F a, F b, F c) { return fma(a, b, c); }
    static F to_float(I x) { return (F)vcvtq_f32_s32((int32x4_t)x); }
    static F sqrt(F x) { return (F)vsqrtq_f32((float32x4_t)x); }
    // Not fmax, which makes NaN of a and NaN.
    static F max(F a, F b) {
        return (F)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a,
                            (float32x4_t)b);
    }
    static I to_int(F x) { return (I)vcvtq_s32_f32((float32x4_t)x); }
    static P mul(L a, L b) {
        const uint32x4_t x = (uint32x4_t)a, y = (uint32x4_t)b;
        return {vmull_u32(vget_low_u32(x), vget_low_u32(y)), vmull_high_u32(x, y)};
    }
    static L low(P p) {
        return (L)vuzp1q_u32(vreinterpretq_u32_u64(p.low), vreinterpretq_u32_u64(p.high));
    }
    static L high(P p) {
        return (L)vuzp2q_u32(vreinterpretq_u32_u64(p.low), vreinterpretq_u32_u64(p.high));
    }
    static U join(const L* x) { return x[0]; }
    static U upper_halves(U even, U odd) {
        return (U)vtrn2q_u16((uint16x8_t)even, (uint16x8_t)odd);
    }
    // The greatest of several numbers is NaN where one of them is.
    template <int N>
    static bool any_nan(const F* x) {
        float32x4_t most = (float32x4_t)x[0];
#pragma GCC unroll 8
        for (int r = 1; r < N; r++) most = vmaxq_f32(most, (float32x4_t)x[r]);
        const float one = vmaxvq_f32(most);
        return one != one;
    }
    static F load_half(const void* p) {
        return (F)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t*)p)));
    }
    static void store_half(void* p, F x) { vst1_u8((uint8_t*)p, vreinterpret_u8_f16(half(x))); }
    static F round_half(F x) { return (F)vcvt_f32_f16(half(x)); }

    static void split(F* v) {
        for (int r = 0; r < 8; r += 2) {
            const float32x4_t a = (float32x4_t)v[r], b = (float32x4_t)v[r + 1];
            v[r] = (F)vuzp1q_f32(a, b);
            v[r + 1] = (F)vuzp2q_f32(a, b);
        }
    }
    static void unsplit(F* v) {
        for (int r = 0; r < 8; r += 2) {
            const float32x4_t a = (float32x4_t)v[r], b = (float32x4_t)v[r + 1];
            v[r] = (F)vzip1q_f32(a, b);
            v[r + 1] = (F)vzip2q_f32(a, b);
        }
    }

    // In both layouts lane s has block s.
    template <bool SPLIT>
    static L lane_blocks(int) {
        return L{0, 1, 2, 3};
    }

    template <bool SPLIT>
    static void arrange(F* v) {
        F a[4], b[4];
        if (SPLIT) {
            transpose(a, v[0], v[2], v[4], v[6]);
            transpose(b, v[1], v[3], v[5], v[7]);
        } else {
            transpose(a, v[0], v[1], v[2], v[3]);
            transpose(b, v[4], v[5], v[6], v[7]);
        }
        for (int s = 0; s < 4; s++) v[2 * s] = a[s], v[2 * s + 1] = b[s];
    }

 private:
    static float16x4_t half(F x) { return vcvt_f16_f32((float32x4_t)x); }
    static float64x2_t twos(float32x4_t x) { return vreinterpretq_f64_f32(x); }
    static void transpose(F* out, F v0, F v1, F v2, F v3) {
        const float64x2_t p = twos(vzip1q_f32((float32x4_t)v0, (float32x4_t)v1));
        const float64x2_t q = twos(vzip2q_f32((float32x4_t)v0, (float32x4_t)v1));
        const float64x2_t r = twos(vzip1q_f32((float32x4_t)v2, (float32x4_t)v3));
        const float64x2_t s = twos(vzip2q_f32((float32x4_t)v2, (float32x4_t)v3));
        out[0] = (F)vzip1q_f64(p, r);
        out[1] = (F)vzip2q_f64(p, r);
        out[2] = (F)vzip1q_f64(q, s);
        out[3] = (F)vzip2q_f64(q, s);
    }
};

}  // namespace

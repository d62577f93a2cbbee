// A tile of weights in registers: loading, storing and rounding. Included once for each
// instruction set, with ZK_SIMD naming its header.
#pragma once

#include <cstdint>
#include <cstring>

#include "noise.h"
#include "zokernels.h"
#include ZK_SIMD

namespace {

typedef Simd S;
typedef S::F F;
typedef S::I I;
typedef S::U U;

constexpr int TILE = 8 * S::W;     // elements of one group of Gaussian blocks
constexpr int ROW = 128 * S::W;    // signs of one group of blocks
constexpr float UNIT = 0x1p-29f;   // what `gaussian` leaves to its caller
constexpr float SMALL = 0x1p-97f;  // below it a coefficient times UNIT is not exact

// x in every lane. Adding it to F{} would make +0 of −0.
inline F splat(float x) { return x - F{}; }
inline I select_all() { return I{} - 1; }
inline F select(I keep, F yes, F no) {
    return bits_as<F>((bits_as<I>(yes) & keep) | (bits_as<I>(no) & ~keep));
}
// All ones where the top bit is set.
inline I spread_sign(U bits) { return bits_as<I>(bits) >> 31; }
inline I is_finite(F x) { return spread_sign((bits_as<U>(x) & 0x7FFFFFFFu) - 0x7F800000u); }
inline F quiet(F x) { return bits_as<F>(bits_as<U>(x) | 0x400000u); }
inline I is_nan(F x) { return spread_sign(0x7F800000u - (bits_as<U>(x) & 0x7FFFFFFFu)); }

// A vector anywhere in memory, by one instruction: compilers cut up a memcpy of one, and what is
// stored in halves has to wait before it can be loaded whole.
template <class V>
using Anywhere [[gnu::aligned(1), gnu::may_alias]] = V;
template <class V>
inline V load_as(const void* p) {
    return *(const Anywhere<V>*)p;
}
template <class V>
inline void store_as(void* p, V x) {
    *(Anywhere<V>*)p = x;
}

// A tile in float32: loading is exact, storing expects values of the type, or rounds to nearest.
// bfloat16 is held split in even and odd elements, which costs one shift instead of shuffles.
template <int DTYPE>
struct Tile;

template <>
struct Tile<ZK_FLOAT32> {
    static constexpr bool SPLIT = false;
    static constexpr int BYTES = 4;
    template <int N = 8>
    static ZK_INLINE void load(F* w, const char* p) {
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) w[r] = load_as<F>(p + sizeof(F) * r);
    }
    template <int N = 8>
    static ZK_INLINE void store(char* p, const F* w, const char*) {
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) store_as(p + sizeof(F) * r, w[r]);
    }
    static F nearest(F x) { return x; }
    static F stochastic(F x, U) { return x; }
};

template <>
struct Tile<ZK_BFLOAT16> {
    static constexpr bool SPLIT = true;
    static constexpr int BYTES = 2;
    template <int N = 8>
    static ZK_INLINE void load(F* w, const char* p) {
#pragma GCC unroll 8
        for (int r = 0; r < N; r += 2) {
            const U raw = load_as<U>(p + sizeof(U) / 2 * r);
            w[r] = bits_as<F>(raw << 16);
            w[r + 1] = bits_as<F>(raw & 0xFFFF0000u);
        }
    }
    template <int N = 8>
    static ZK_INLINE void store(char* p, const F* w, const char*) {
        if (__builtin_expect(S::any_nan<N>(w), 0)) {
            F quieted[N];
            for (int r = 0; r < N; r++)
                quieted[r] = bits_as<F>(bits_as<U>(nearest(w[r])) & 0xFFFF0000u);
            return store_rounded<N>(p, quieted);
        }
        store_rounded<N>(p, w);
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
    template <int N>
    static ZK_INLINE void store_rounded(char* p, const F* w) {
#pragma GCC unroll 8
        for (int r = 0; r < N; r += 2) {
            const U raw = S::upper_halves(round_bits(w[r]), round_bits(w[r + 1]));
            store_as(p + sizeof(U) / 2 * r, raw);
        }
    }
    static U round_bits(F x) {
        const U b = bits_as<U>(x);
        return b + 0x7FFFu + ((b >> 16) & 1u);
    }
};

template <>
struct Tile<ZK_FLOAT16> {
    static constexpr bool SPLIT = false;
    static constexpr int BYTES = 2;
    template <int N = 8>
    static ZK_INLINE void load(F* w, const char* p) {
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) w[r] = S::load_half(p + 2 * S::W * r);
    }
    // Conversion to float32 and back sets a NaN's quiet bit. A NaN stays NaN whatever is added, so
    // its own bits may as well be kept, and where a mask is 0 they must be.
    template <int N = 8>
    static ZK_INLINE void store(char* p, const F* w, const char* original) {
        const bool nan = S::any_nan<N>(w);
        uint16_t before[N * S::W], after[N * S::W];
        if (__builtin_expect(nan, 0)) std::memcpy(before, original, sizeof before);
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) S::store_half(p + 2 * S::W * r, w[r]);
        if (__builtin_expect(!nan, 1)) return;
        std::memcpy(after, p, sizeof after);
        for (int i = 0; i < N * S::W; i++)
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

}  // namespace

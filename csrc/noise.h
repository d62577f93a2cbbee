// The noise, version 1, a group of W blocks at a time. zokernels/noise.py is the specification.
#pragma once

#include <cstdint>
#include <cstring>

// Compiled anew, and apart, for each instruction set.
namespace {

#define ZK_ALWAYS __attribute__((always_inline))
#define ZK_INLINE ZK_ALWAYS inline

template <class To, class From>
inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

constexpr uint64_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57;

// The round keys of one (seed, stream, kind, high word of the block). Only the low word of the
// counter varies in a group, so the half of rounds 1 to 3 that does not depend on it is worked
// out here once and folded into the keys: a tenth of the work saved.
struct RoundKeys {
    uint64_t k0[10], k1[10];

    RoundKeys() = default;
    RoundKeys(uint64_t seed, uint32_t stream, uint32_t kind, uint32_t block_high) {
        uint32_t a = (uint32_t)seed, b = (uint32_t)(seed >> 32);
        for (int r = 0; r < 10; r++, a += 0x9E3779B9, b += 0xBB67AE85) k0[r] = a, k1[r] = b;
        const uint64_t p1 = PHILOX_M1 * stream;
        const uint64_t p0 = PHILOX_M0 * ((p1 >> 32) ^ block_high ^ k0[0]);
        k1[0] ^= kind;
        k0[1] ^= (uint32_t)p1;
        k1[1] ^= p0 >> 32;
        k1[2] ^= (uint32_t)p0;
    }
};

// The words of a group of blocks: w[j] has word j of the block that each lane serves.
// Where a state's lanes are of 64 bits their high halves may hold rubbish: products ignore them.
template <class S, bool SPLIT>
ZK_INLINE void philox(typename S::U* w, uint32_t first_block, const RoundKeys& key) {
    typedef typename S::L L;
    typedef typename S::P P;
    typedef typename S::Word Word;
    const L m0 = L{} + (Word)PHILOX_M0, m1 = L{} + (Word)PHILOX_M1;
    const auto k0 = [&](int r) ZK_ALWAYS { return (Word)key.k0[r]; };
    const auto k1 = [&](int r) ZK_ALWAYS { return (Word)key.k1[r]; };
    L word[4][S::HALVES];
#pragma GCC unroll 2
    for (int h = 0; h < S::HALVES; h++) {
        P p0 = S::mul(m0, S::template lane_blocks<SPLIT>(h) + (Word)first_block);
        P p1 = S::mul(m1, S::high(p0) ^ k1(0));
        L c0 = S::high(p1) ^ k0(1), c1 = S::low(p1), c2 = S::low(p0) ^ k1(1), c3;
        p0 = S::mul(m0, c0), p1 = S::mul(m1, c2);
        c0 = S::high(p1) ^ c1 ^ k0(2), c1 = S::low(p1);
        c2 = S::high(p0) ^ k1(2), c3 = S::low(p0);
#pragma GCC unroll 7
        for (int r = 3; r < 10; r++) {
            p0 = S::mul(m0, c0), p1 = S::mul(m1, c2);
            c0 = S::high(p1) ^ c1 ^ k0(r), c1 = S::low(p1);
            c2 = S::high(p0) ^ c3 ^ k1(r), c3 = S::low(p0);
        }
        word[0][h] = c0, word[1][h] = c1, word[2][h] = c2, word[3][h] = c3;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) w[j] = S::join(word[j]);
}

// x · (c0 + c1·x² + c2·x⁴), less the last product.
template <class S>
inline typename S::F quintic(typename S::F x) {
    typedef typename S::F F;
    const F square = x * x;
    const F q = S::fma(square, F{} + 0x1.0ce94cp-123f, F{} + -0x1.15954ap-61f);
    return S::fma(q, square, F{} + 0x1.6afd5ep-2f);
}

// 8·W normals times 2²⁹, in the order of memory (see `arrange`).
template <class S, bool SPLIT>
ZK_INLINE void gaussian(typename S::F* z, uint32_t first_block, const RoundKeys& key) {
    typedef typename S::F F;
    typedef typename S::I I;
    typedef typename S::U U;
    U w[4];
    philox<S, SPLIT>(w, first_block, key);
    F v[8];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const F xl = S::to_float(bits_as<I>((w[j] << 16) | 0x8000u));
        const F xh = S::to_float(bits_as<I>((w[j] & 0xFFFF0000u) | 0x8000u));
        const F yh = xh * quintic<S>(xh), pl = quintic<S>(xl);
        v[2 * j] = S::fma(xl, pl, yh);
        v[2 * j + 1] = S::fma(xl, pl, -yh);
    }
    const F a = v[0] + v[2], b = v[0] - v[2], c = v[4] + v[6], d = v[4] - v[6];
    const F e = v[1] + v[3], f = v[1] - v[3], g = v[5] + v[7], h = v[5] - v[7];
    z[0] = a + c, z[1] = e + g, z[2] = b + d, z[3] = f + h;
    z[4] = a - c, z[5] = e - g, z[6] = b - d, z[7] = f - h;
    S::template arrange<SPLIT>(z);
}

// 8·W uniform 16-bit numbers, in the order of memory.
template <class S, bool SPLIT>
inline void uniform16(typename S::U* u, uint32_t first_block, const RoundKeys& key) {
    typedef typename S::F F;
    typename S::U w[4];
    philox<S, SPLIT>(w, first_block, key);
    F v[8];
    for (int j = 0; j < 4; j++) {
        v[2 * j] = bits_as<F>(w[j] & 0xFFFFu);
        v[2 * j + 1] = bits_as<F>(w[j] >> 16);
    }
    S::template arrange<SPLIT>(v);
    for (int r = 0; r < 8; r++) u[r] = bits_as<typename S::U>(v[r]);
}

// The signs of W neighbouring Rademacher blocks, 128 elements each.
template <class S>
struct SignBits {
    uint32_t word[4][S::W];

    __attribute__((noinline)) void fill(uint32_t first_block, const RoundKeys& key) {
        typename S::U w[4];
        // The linear layout's lanes, put back in the order of the blocks.
        philox<S, false>(w, first_block, key);
        for (int j = 0; j < 4; j++) {
            uint32_t lanes[S::W];
            std::memcpy(lanes, &w[j], sizeof lanes);
            for (int l = 0; l < S::W; l++) word[j][block_of(l)] = lanes[l];
        }
    }
    // The 32 signs that begin with element `at` (a multiple of 32) of the group.
    uint32_t at(uint32_t element) const { return word[element % 128 / 32][element / 128]; }

 private:
    static int block_of(int lane) {
        typename S::Word blocks[S::W / S::HALVES];
        const typename S::L row = S::template lane_blocks<false>(lane % S::HALVES);
        std::memcpy(blocks, &row, sizeof blocks);
        return (int)blocks[lane / S::HALVES];
    }
};

// Each lane's element's bit of `word`, moved to bit 31. Register r of a group holds elements
// W·r … (linear), or the even or odd ones of 2W·(r/2) … (split).
template <class S, bool SPLIT>
inline typename S::U bit_to_sign(const uint32_t* word, int r) {
    typename S::U lane{};
    for (int l = 0; l < S::W; l++) reinterpret_cast<uint32_t*>(&lane)[l] = (uint32_t)l;
    const bool split = SPLIT && S::W > 1;
    const uint32_t start = split ? r / 2 * 2 * S::W + r % 2 : r * S::W;
    const typename S::U shift = 31 - start % 32 - lane * (split ? 2u : 1u);
    return (typename S::U{} + word[start / 32]) << shift;
}

}  // namespace

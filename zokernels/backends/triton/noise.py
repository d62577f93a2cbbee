"""The noise, version 1, as device functions: values in, values out. See docs/noise.md.

A group of consecutive elements is a tensor of shape (ROWS, 8): a row is what one 128-bit block of
the Gaussian, mask and rounding streams serves, so that a thread that draws a block also owns its
elements and nothing moves between threads.
"""

import triton
import triton.language as tl

from zokernels.backends.triton.arithmetic import bits_of, float_of, fma_of_noise

GAUSSIAN = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
MASK = tl.constexpr(2)
ROUNDING = tl.constexpr(3)
LEFT = tl.constexpr(4)
RIGHT = tl.constexpr(5)
# A rank-one direction, as `zokernels.noise.RANK1`.
RANK1 = LEFT

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def _multiply(a, M: tl.constexpr):
    # One 32 × 32 → 64 multiplication; high and low words are then free.
    product = a.to(tl.uint64) * tl.full((), M, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(low, high, stream, KIND: tl.constexpr, seed):
    """Four words for each block.

    Args:
        low: Low words of the block numbers, uint32.
        high: Their one high word, a scalar.
        stream: Number of the parameter, a scalar.
        KIND: Kind of noise.
        seed: A scalar, int64 that holds the 64 bits.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = low
    c1 = high.to(tl.uint32)
    c2 = stream.to(tl.uint32)
    c3 = tl.full((), KIND, tl.uint32)
    # What is a scalar in the first rounds stays one: that half of their work is done once.
    for _ in tl.static_range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), _W0, tl.uint32)
        k1 += tl.full((), _W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def rows(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight tensors of shape (ROWS,) as the columns of one of shape (ROWS, 8)."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), (x0.shape[0], 8))


@triton.jit
def _quintic(x):
    c0 = tl.full((), 0.35448214411735535, tl.float32)
    c1 = tl.full((), -4.702441649242121e-19, tl.float32)
    c2 = tl.full((), 9.878241647929992e-38, tl.float32)
    return fma_of_noise(fma_of_noise(x * x, c2, c1), x * x, c0)


@triton.jit
def _pair(word):
    low = ((word << 16) | 0x8000).to(tl.int32, bitcast=True).to(tl.float32)
    high = ((word & 0xFFFF0000) | 0x8000).to(tl.int32, bitcast=True).to(tl.float32)
    y = high * _quintic(high)
    p = _quintic(low)
    return fma_of_noise(low, p, y), fma_of_noise(low, p, -y)


@triton.jit
def gaussian(low, high, stream, seed):
    """Normals times 2²⁹, of shape (ROWS, 8), for ROWS blocks."""
    w0, w1, w2, w3 = philox(low, high, stream, GAUSSIAN, seed)
    v0, v1 = _pair(w0)
    v2, v3 = _pair(w1)
    v4, v5 = _pair(w2)
    v6, v7 = _pair(w3)
    a, b, c, d = v0 + v2, v0 - v2, v4 + v6, v4 - v6
    e, f, g, h = v1 + v3, v1 - v3, v5 + v7, v5 - v7
    return rows(a + c, e + g, b + d, f + h, a - c, e - g, b - d, f - h)


@triton.jit
def uniform16(low, high, stream, KIND: tl.constexpr, seed):
    """16-bit numbers as uint32 of shape (ROWS, 8), for ROWS blocks."""
    w0, w1, w2, w3 = philox(low, high, stream, KIND, seed)
    return rows(
        w0 & 0xFFFF, w0 >> 16, w1 & 0xFFFF, w1 >> 16, w2 & 0xFFFF, w2 >> 16, w3 & 0xFFFF, w3 >> 16
    )


@triton.jit
def flips(low, high, stream, seed):
    """For signs: bit 31 set where the sign is +1, rubbish below; uint32 of shape (ROWS, 8).

    Args:
        low: Low words of the Rademacher blocks, ROWS / 16 of them.
        high: Their one high word.
        stream: Number of the parameter.
        seed: The seed.
    """
    w0, w1, w2, w3 = philox(low, high, stream, RADEMACHER, seed)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (low.shape[0] * 4, 1))
    # Row r of a word has its bits 8r … 8r + 7.
    byte = words >> (tl.arange(0, 4)[None, :] * 8).to(tl.uint32)
    byte = tl.reshape(byte, (low.shape[0] * 16, 1))
    return byte << (31 - tl.arange(0, 8))[None, :].to(tl.uint32)


@triton.jit
def uniform16_of(index, stream, KIND: tl.constexpr, seed):
    """The 16-bit numbers of elements anywhere: int64 indices, uint32 of their shape."""
    block = index >> 3
    w0, w1, w2, w3 = philox(block.to(tl.uint32), block >> 32, stream, KIND, seed)
    which = (index & 7).to(tl.uint32)
    word = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
    return (word >> ((which & 1) * 16)) & 0xFFFF


@triton.jit
def flips_along(first, COUNT: tl.constexpr, stream, KIND: tl.constexpr, seed):
    """For the signs of rows or columns: bit 31 as of `flips`; uint32 of shape (COUNT,).

    Args:
        first: Number of the first one, a scalar and a multiple of ``COUNT`` or of 128.
        COUNT: How many; a power of two.
        stream: Number of the parameter.
        KIND: ``LEFT`` or ``RIGHT``.
        seed: The seed.
    """
    number = tl.arange(0, COUNT)
    block = (first >> 7).to(tl.uint32)
    if COUNT > 128:
        block += (number >> 7).to(tl.uint32)
    # Of up to 128 signs one block has all, which is a scalar: every thread draws it for itself.
    w0, w1, w2, w3 = philox(block, first >> 39, stream, KIND, seed)
    place = ((first & 127).to(tl.uint32) + number.to(tl.uint32)) & 127
    word = tl.where(place < 64, tl.where(place < 32, w0, w1), tl.where(place < 96, w2, w3))
    return word << (31 - (place & 31))


@triton.jit
def signed(value, flip):
    """``value`` where the sign is +1, and −``value`` where it is −1."""
    return float_of(bits_of(-value) ^ (flip & 0x80000000))

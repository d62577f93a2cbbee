"""The noise against a second implementation, in exact rational arithmetic."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from zokernels import noise

LOW32 = 0xFFFFFFFF


def philox(key, counter):
    """Philox4x32-10 on Python integers."""
    k, c = list(key), list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        left, right = (second >> 32) ^ c[1] ^ k[0], (first >> 32) ^ c[3] ^ k[1]
        c = [left, second & LOW32, right, first & LOW32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def block_words(kind, seed, stream, block):
    return philox((seed % 2**32, seed >> 32), (block % 2**32, block >> 32, stream, kind))


def round32(exact):
    """The binary32 number nearest to a fraction, ties to even, as a fraction."""
    if exact == 0:
        return exact
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    return round(exact / quantum) * quantum


C0, C1, C2 = (
    Fraction(struct.unpack(">f", bytes.fromhex(h))[0]) for h in ("3eb57eaf", "a10acaa5", "020674a6")
)


def normals(words):
    """The eight normals of four words, every operation exact and then rounded to binary32."""
    v = []
    for w in words:
        x, p = [], []
        for half in (w & 0xFFFF, w >> 16):
            number = (half << 16 | 0x8000) - (half >> 15 << 32)
            x.append(round32(Fraction(number)))
            square = round32(x[-1] * x[-1])
            q = round32(square * C2 + C1)
            p.append(round32(q * square + C0))
        high = round32(x[1] * p[1])
        v += [round32(x[0] * p[0] + high), round32(x[0] * p[0] - high)]
    a, b, c, d = (round32(t) for t in (v[0] + v[2], v[0] - v[2], v[4] + v[6], v[4] - v[6]))
    e, f, g, h = (round32(t) for t in (v[1] + v[3], v[1] - v[3], v[5] + v[7], v[5] - v[7]))
    z = a + c, e + g, b + d, f + h, a - c, e - g, b - d, f - h
    return [float(round32(t) / 2**29) for t in z]


@pytest.mark.parametrize(
    ("seed", "stream", "block", "blocks"),
    [
        pytest.param(0, 0, 0, 150, id="origin"),
        pytest.param(2**64 - 1, 2**32 - 1, 2**60 - 51, 50, id="last-elements"),
        pytest.param(2**63 + 99, 2**31, 2**32 - 50, 100, id="across-the-block-high-word"),
    ],
)
def test_gaussian_equals_exact_rational_arithmetic(seed, stream, block, blocks):
    numel = min(8 * blocks, 2**63 - 1 - 8 * block)
    expected = [z for b in range(blocks) for z in normals(block_words(0, seed, stream, block + b))]
    z = noise.gaussian(numel, seed=seed, stream=stream, offset=8 * block)
    assert bits(z) == bits(torch.tensor(expected[:numel], dtype=torch.float32))


def bits(z):
    # Bits, since == does not tell +0 from -0.
    return z.view(torch.int32).tolist()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((0x00000000,) * 4, id="zeros"),
        pytest.param((0xFFFFFFFF,) * 4, id="ones"),
        pytest.param((0x7FFF7FFF,) * 4, id="largest"),
        pytest.param((0x80008000,) * 4, id="smallest"),
        pytest.param((0x7FFF8000, 0x80007FFF) * 2, id="opposite-ends"),
        pytest.param((0x0000FFFF, 0xFFFF0000, 0x12341234, 0x1234EDCB), id="cancelling-halves"),
        pytest.param((0x7FFFFFFF, 0x80000000, 0x00008000, 0xFFFF7FFF), id="int32-ends"),
    ],
)
def test_transform_of_chosen_words_equals_exact_rational_arithmetic(words):
    z = noise._hadamard_normals(tuple(torch.tensor([w]) for w in words))[0]
    assert bits(z) == bits(torch.tensor(normals(words), dtype=torch.float32))


def fma_in_binary64(a, b, c):
    """The binary64 sum a·b + c, and where rounding it to binary32 could differ from a true fma.

    The product of two binary32 numbers is exact in binary64. Rounding twice then differs from
    rounding once only where the sum is inexact and falls on the midpoint of two binary32 numbers.
    """
    product = a * b
    total = product + c
    # Knuth's TwoSum: `error` is what the sum lost, exactly.
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    midpoint = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    return total, midpoint & (error != 0)


def test_the_check_of_exactness_finds_a_case_that_rounds_twice():
    a, b, c = 2.0**-24 * (1 + 2.0**-15), 1 - 2.0**-15, 1 + 2.0**-23
    total, wrong = fma_in_binary64(np.array([a, a]), b, np.array([c, 0.0]))
    once = round32(Fraction(a) * Fraction(b) + Fraction(c))
    assert float(np.float32(total[0])) != float(once)
    assert wrong.tolist() == [True, False]


def quintic_inputs():
    return noise._float_of_int32(torch.arange(65536) << 16 | 0x8000)


def test_binary64_fma_of_the_quintic_is_exact_for_all_inputs():
    square = (quintic_inputs() ** 2).double().numpy()
    q, wrong = fma_in_binary64(square, np.float64(noise._C2), np.float64(noise._C1))
    assert not wrong.any()
    p, wrong = fma_in_binary64(q.astype(np.float32).astype(np.float64), square, noise._C0)
    assert not wrong.any()
    # The midpoint test above reads binary64 bits as if no result were subnormal in binary32.
    assert min(np.abs(q).min(), np.abs(p).min()) > 2.0**-126


def test_binary64_fma_of_the_pair_is_exact_for_all_pairs_of_halves():
    x = quintic_inputs()
    p = noise._quintic(x)
    y = (x * p).double().numpy()
    product = x.double().numpy() * p.double().numpy()
    # |x·p ± y| < 2**31, so a sum of multiples of 2**-22 has 53 bits and is exact in binary64.
    assert np.abs(product).max() + np.abs(y).max() < 2.0**31
    assert (y % 2.0**-22 == 0).all()
    inexact = np.flatnonzero(product % 2.0**-22 != 0)
    assert 0 < len(inexact) < 4096
    # y is odd in x, so that going through every y covers both signs of yh.
    assert np.array_equal(np.sort(y), np.sort(-y))
    for i in inexact:
        total, wrong = fma_in_binary64(x[i].item(), p[i].item(), y)
        assert not wrong.any()
        assert np.abs(total[total != 0]).min() > 2.0**-126

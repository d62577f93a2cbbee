"""The specification once more, an element at a time, in integers and fractions.

Nothing here uses torch or binary floating point, so it is a witness of its own for the reference.
Every operation is computed exactly and then rounded once.
"""

from __future__ import annotations

import functools
import math
import struct
from fractions import Fraction

_LOW32 = 0xFFFFFFFF
# Bits of the significand, and the exponent of the smallest normal number.
FORMATS = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}
_LARGEST = {"float32": 128, "bfloat16": 128, "float16": 16}
_C0, _C1, _C2 = (
    Fraction(struct.unpack(">f", bytes.fromhex(h))[0]) for h in ("3eb57eaf", "a10acaa5", "020674a6")
)


class NotFinite(ArithmeticError):
    """A result beyond the largest number of a format: no fraction stands for infinity."""


def round_to(exact: Fraction, dtype: str = "float32") -> Fraction:
    """The nearest number of a format, ties to even."""
    if exact == 0:
        return exact
    precision, smallest = FORMATS[dtype]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    rounded = round(exact / quantum) * quantum
    if abs(rounded) >= 2 ** _LARGEST[dtype]:
        raise NotFinite
    return rounded


def fma(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    """The sum a · b + c, rounded once to binary32."""
    return round_to(a * b + c)


def root(x: Fraction) -> Fraction:
    """The square root, rounded once to binary32."""
    if x == 0:
        return x
    # 80 bits of the root; a last bit stands for all that follow, so that ties are told apart.
    shift = max(0, 160 - x.numerator.bit_length() + x.denominator.bit_length()) // 2 * 2
    scaled, rest = divmod(x.numerator << shift, x.denominator)
    whole = math.isqrt(scaled)
    inexact = rest != 0 or whole * whole != scaled
    return round_to(Fraction(2 * whole + inexact, 2 << shift // 2))


def round_stochastic(acc: Fraction, u: int, dtype: str) -> Fraction:
    """A binary32 number rounded to 16 bits by adding u below the bits that stay."""
    if dtype == "float16" and abs(acc) < Fraction(2) ** -14:
        units = (int(abs(acc) * 2**40) + u) >> 16
        return Fraction(units if acc >= 0 else -units, 2**24)
    low = 16 if dtype == "bfloat16" else 13
    (bits,) = struct.unpack("<I", struct.pack("<f", float(acc)))
    bits = bits + (u & ((1 << low) - 1)) >> low << low
    value = struct.unpack("<f", struct.pack("<I", bits & _LOW32))[0]
    if not math.isfinite(value):
        raise NotFinite
    return round_to(Fraction(value), dtype)


@functools.lru_cache(maxsize=1 << 16)
def philox(seed: int, stream: int, kind: int, block: int) -> tuple[int, int, int, int]:
    """The four words of a block."""
    key = [seed & _LOW32, seed >> 32]
    c = [block & _LOW32, block >> 32, stream, kind]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ key[0], second & _LOW32,
             (first >> 32) ^ c[3] ^ key[1], first & _LOW32]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & _LOW32, (key[1] + 0xBB67AE85) & _LOW32]
    return c[0], c[1], c[2], c[3]


def uniform16(seed: int, stream: int, kind: int, index: int) -> int:
    """An element's 16-bit number of a kind."""
    words = philox(seed, stream, kind, index // 8)
    return words[index % 8 // 2] >> 16 * (index % 2) & 0xFFFF


def rademacher(seed: int, stream: int, index: int) -> Fraction:
    """An element's sign."""
    return Fraction(_sign(seed, stream, 1, index))


def rank1(seed: int, stream: int, index: int, columns: int) -> Fraction:
    """The sign of an element's row times that of its column, where there are any."""
    if columns == 0:
        return rademacher(seed, stream, index)
    row, column = divmod(index, columns)
    return Fraction(_sign(seed, stream, 4, row) * _sign(seed, stream, 5, column))


def _sign(seed: int, stream: int, kind: int, place: int) -> int:
    words = philox(seed, stream, kind, place // 128)
    return 2 * (words[place % 128 // 32] >> place % 32 & 1) - 1


def gaussian(seed: int, stream: int, index: int) -> Fraction:
    """An element's normal."""
    return _normals(philox(seed, stream, 0, index // 8))[index % 8]


@functools.lru_cache(maxsize=1 << 14)
def _normals(words: tuple[int, int, int, int]) -> list[Fraction]:
    v: list[Fraction] = []
    for w in words:
        x, p = [], []
        for half in (w & 0xFFFF, w >> 16):
            x.append(round_to(Fraction((half << 16 | 0x8000) - (half >> 15 << 32))))
            square = round_to(x[-1] * x[-1])
            p.append(fma(fma(square, _C2, _C1), square, _C0))
        high = round_to(x[1] * p[1])
        v += [fma(x[0], p[0], high), fma(x[0], p[0], -high)]
    for distance in (2, 4):
        v = [_butterfly(v, i, distance) for i in range(8)]
    return [z / 2**29 for z in v]


def _butterfly(v: list[Fraction], i: int, distance: int) -> Fraction:
    sign = -1 if i & distance else 1
    return round_to(v[i & ~distance] + sign * v[i | distance])

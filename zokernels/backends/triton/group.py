"""What both kernels do with a group of elements: find it, load, mask, round, store.

A program works on one group of ``ROWS`` × 8 consecutive elements of one tensor. Groups begin at
multiples of their size in the parameter, so that a group's blocks share the high word of their
numbers. `zokernels.backends.triton.table` makes the table that these functions read.
"""

import triton
import triton.language as tl

from zokernels.backends.triton import noise
from zokernels.backends.triton.arithmetic import bits_of, float_of, fma
from zokernels.backends.triton.noise import MASK, RADEMACHER

# Columns of the table, one row a tensor; all int64.
FIRST_GROUP = tl.constexpr(0)  # the program number of the tensor's first group
FIRST_INDEX = tl.constexpr(1)  # index of that group's first element in the parameter
LEAD = tl.constexpr(2)  # elements of that group that lie before the tensor
END = tl.constexpr(3)  # LEAD + number of elements
STREAM = tl.constexpr(4)
KEEP = tl.constexpr(5)  # Random: keep below; Magnitude: bits of the threshold; Bits: address
KEEP_SEED = tl.constexpr(6)
ALIGNED = tl.constexpr(7)  # 1 if every memory's FIRST element of a group is aligned to 16 bytes
MEMORY = tl.constexpr(8)  # addresses of the first group: in, out or states …
COLUMNS = tl.constexpr(13)

KEEP_ALL = tl.constexpr(0)
KEEP_RANDOM = tl.constexpr(1)
KEEP_MAGNITUDE = tl.constexpr(2)
KEEP_BITS = tl.constexpr(3)


@triton.jit
def places(ROWS: tl.constexpr):
    """The places of a group's elements in it: int32 of shape (ROWS, 8)."""
    return tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def address(row_ptr, WHICH: tl.constexpr, start, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to the group's elements in one of the tensor's memories."""
    pointer = tl.load(row_ptr + MEMORY + WHICH).to(tl.pointer_type(TYPE)) + start
    if WHOLE:
        # What the compiler can't see in a table, and needs to see for 128-bit accesses.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, inside, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """A group's elements; zero where the tensor has none."""
    if WHOLE:
        return tl.load(pointer + places(ROWS))
    else:
        return tl.load(pointer + places(ROWS), mask=inside, other=0)


@triton.jit
def store(pointer, value, inside, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Write a group's elements, where the tensor has them."""
    if WHOLE:
        tl.store(pointer + places(ROWS), value)
    else:
        tl.store(pointer + places(ROWS), value, mask=inside)


@triton.jit
def blocks(index, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Numbers of a group's ``COUNT`` blocks of ``SIZE`` elements: low words, and the high word."""
    first = index // SIZE
    return first.to(tl.uint32) + tl.arange(0, COUNT).to(tl.uint32), first >> 32


@triton.jit
def scaled_noise(index, stream, seed, KIND: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr):
    """A group's noise as `add_scaled` takes it.

    Of signs it is their bits. Gaussian coefficients hold the noise's 2⁻²⁹, unless ``SMALL``.
    """
    if KIND == RADEMACHER:
        low, high = blocks(index, 128, ROWS // 16)
        return noise.flips(low, high, stream, seed)
    else:
        low, high = blocks(index, 8, ROWS)
        z = noise.gaussian(low, high, stream, seed)
        if SMALL:
            z = z * 1.862645149230957e-09
        return z


@triton.jit
def add_scaled(acc, z, coeff, KIND: tl.constexpr):
    """fma(c, z, acc)."""
    if KIND == RADEMACHER:
        return acc + noise.signed(coeff, z)
    else:
        return fma(z, coeff, acc)


@triton.jit
def keep_static(row_ptr, index, start, inside, KEEP_KIND: tl.constexpr, ROWS: tl.constexpr):
    """Which elements a random mask or a mask of bits keeps."""
    keep = tl.load(row_ptr + KEEP)
    if KEEP_KIND == KEEP_RANDOM:
        low, high = blocks(index, 8, ROWS)
        seed = tl.load(row_ptr + KEEP_SEED)
        u = noise.uniform16(low, high, tl.load(row_ptr + STREAM), MASK, seed)
        return u < keep.to(tl.uint32)
    else:
        local = start + places(ROWS) - tl.load(row_ptr + LEAD)
        byte = tl.load(keep.to(tl.pointer_type(tl.uint8)) + (local >> 3), mask=inside, other=0)
        return ((byte.to(tl.uint32) >> (local & 7).to(tl.uint32)) & 1) != 0


@triton.jit
def keep_small(row_ptr, weight):
    """Which elements a mask by magnitude keeps: NaN lies above every threshold."""
    threshold = tl.load(row_ptr + KEEP).to(tl.uint32)
    return (bits_of(weight) & 0x7FFFFFFF) <= threshold


@triton.jit
def number(ptr):
    """A float32 whose bits an int64 holds."""
    return float_of(tl.load(ptr).to(tl.uint32))

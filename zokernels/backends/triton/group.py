"""What both kernels do with a group of elements: find it, load, mask, round, store.

A program works on one group of ``ROWS`` × 8 elements of one tensor. They are consecutive, in shape
(ROWS, 8), and begin at a multiple of their number in the parameter, so that a group's blocks share
the high word of their numbers. Of a rank-one direction a group is a tile of the parameter's matrix,
in shape (ROWS / 16, 128): a thread meets the same few columns in row after row, and has the sign of
each ready as a factor. `zokernels.backends.triton.table` makes the table that these functions read.
"""

import triton
import triton.language as tl

from zokernels.backends.triton import noise
from zokernels.backends.triton.arithmetic import bits_of, float_of, fma
from zokernels.backends.triton.noise import LEFT, MASK, RADEMACHER, RANK1, RIGHT

# Cells of the table, one row a tensor (or a rectangle of one); all int64.
FIRST_GROUP = tl.constexpr(0)  # the program number of the tensor's first group
FIRST_INDEX = tl.constexpr(1)  # index of that group's first element in the parameter
LEAD = tl.constexpr(2)  # elements of that group that lie before the tensor
END = tl.constexpr(3)  # LEAD + number of elements
STREAM = tl.constexpr(4)
KEEP = tl.constexpr(5)  # Random: keep below; Magnitude: bits of the threshold; Bits: address
KEEP_SEED = tl.constexpr(6)
ALIGNED = tl.constexpr(7)  # 1 if every memory's FIRST element of a group is aligned to 16 bytes
MEMORY = tl.constexpr(8)  # addresses of the first group: in, out or states …
# Of a matrix: a tile begins at a multiple of its height and of its width.
COLUMNS = tl.constexpr(13)  # of the whole parameter
TOP = tl.constexpr(14)  # the rectangle's first row, and the row after its last
BOTTOM = tl.constexpr(15)
FROM = tl.constexpr(16)  # its first column, and the column after its last
TO = tl.constexpr(17)
ACROSS = tl.constexpr(18)  # tiles side by side
CELLS = tl.constexpr(19)

# Columns of a tile.
WIDTH = tl.constexpr(128)
# More than this many columns of a matrix are not aligned, so that an offset in a tile is no long
# number.
MOST_COLUMNS = tl.constexpr(1 << 22)

KEEP_ALL = tl.constexpr(0)
KEEP_RANDOM = tl.constexpr(1)
KEEP_MAGNITUDE = tl.constexpr(2)
KEEP_BITS = tl.constexpr(3)


@triton.jit
def begin(row_ptr, program, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Where a program's group begins: (place, row, column) of its first element.

    Places count from the first group's first element on. Only a tile has a row and a column.
    """
    group = program - tl.load(row_ptr + FIRST_GROUP)
    if KIND == RANK1:
        across = tl.load(row_ptr + ACROSS).to(tl.uint32)
        down = group.to(tl.uint32) // across
        right = (group.to(tl.uint32) - down * across).to(tl.int64) * WIDTH
        below = down.to(tl.int64) * (ROWS // 16)
        row = (tl.load(row_ptr + TOP) & -(ROWS // 16)) + below
        column = (tl.load(row_ptr + FROM) & -WIDTH) + right
        return below * tl.load(row_ptr + COLUMNS) + right, row, column
    else:
        start = group * (ROWS * 8)
        return start, start, start


@triton.jit
def is_whole(row_ptr, start, row, column, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Whether the tensor has all of a group's elements, each eight at an aligned address."""
    aligned = tl.load(row_ptr + ALIGNED) != 0
    if KIND == RANK1:
        rows = (row >= tl.load(row_ptr + TOP)) & (row + ROWS // 16 <= tl.load(row_ptr + BOTTOM))
        columns = (column >= tl.load(row_ptr + FROM)) & (column + WIDTH <= tl.load(row_ptr + TO))
        return rows & columns & aligned
    else:
        ends = (start >= tl.load(row_ptr + LEAD)) & (start + ROWS * 8 <= tl.load(row_ptr + END))
        return ends & aligned


@triton.jit
def places(row_ptr, KIND: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """The places of a group's elements from its first one on."""
    if KIND == RANK1:
        columns = tl.load(row_ptr + COLUMNS)
        if WHOLE:
            # The table calls no tile of more columns aligned (`MOST_COLUMNS`), so that what the
            # compiler sees here makes an address one 32-bit product and a sum.
            columns = tl.multiple_of(columns.to(tl.int32) & (MOST_COLUMNS - 1), 8)
        return tl.arange(0, ROWS // 16)[:, None] * columns + tl.arange(0, WIDTH)[None, :]
    else:
        return tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def inside(row_ptr, start, row, column, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Which of a group's elements the tensor has."""
    if KIND == RANK1:
        of_rows = _between(row, row_ptr, TOP, BOTTOM, ROWS // 16)
        return of_rows[:, None] & _between(column, row_ptr, FROM, TO, WIDTH)[None, :]
    else:
        place = start + tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]
        return (place >= tl.load(row_ptr + LEAD)) & (place < tl.load(row_ptr + END))


@triton.jit
def _between(
    first, row_ptr, BEGIN: tl.constexpr, STOP: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Which of ``COUNT`` rows or columns from ``first`` on the tensor has."""
    begin = tl.maximum(tl.load(row_ptr + BEGIN) - first, 0)
    stop = tl.minimum(tl.load(row_ptr + STOP) - first, COUNT)
    # What lies before is a large number.
    number = (tl.arange(0, COUNT) - begin.to(tl.int32)).to(tl.uint32)
    return number < (stop - begin).to(tl.uint32)


@triton.jit
def address(row_ptr, WHICH: tl.constexpr, start, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """A pointer to the group's first element in one of the tensor's memories."""
    pointer = tl.load(row_ptr + MEMORY + WHICH).to(tl.pointer_type(TYPE)) + start
    if WHOLE:
        # What the compiler can't see in a table, and needs to see for 128-bit accesses.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, place, inside, WHOLE: tl.constexpr):
    """A group's elements; zero where the tensor has none."""
    if WHOLE:
        return tl.load(pointer + place)
    else:
        return tl.load(pointer + place, mask=inside, other=0)


@triton.jit
def store(pointer, place, value, inside, WHOLE: tl.constexpr):
    """Write a group's elements, where the tensor has them."""
    if WHOLE:
        tl.store(pointer + place, value)
    else:
        tl.store(pointer + place, value, mask=inside)


@triton.jit
def blocks(index, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Numbers of a group's ``COUNT`` blocks of ``SIZE`` elements: low words, and the high word."""
    first = index // SIZE
    return first.to(tl.uint32) + tl.arange(0, COUNT).to(tl.uint32), first >> 32


@triton.jit
def scaled_noise(
    row_ptr, start, column, seed, KIND: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr
):
    """A group's noise as `add_scaled` takes it.

    Of signs it is their bits, of a rank-one direction the columns' signs alone: `of_rows` gives the
    rows' to the coefficient. Gaussian coefficients hold the noise's 2⁻²⁹, unless ``SMALL``.
    """
    stream = tl.load(row_ptr + STREAM)
    index = tl.load(row_ptr + FIRST_INDEX) + start
    if KIND == RANK1:
        flips = noise.flips_along(column, WIDTH, stream, RIGHT, seed)
        return noise.signed(tl.full((), 1.0, tl.float32), flips)[None, :]
    elif KIND == RADEMACHER:
        low, high = blocks(index, 128, ROWS // 16)
        return noise.flips(low, high, stream, seed)
    else:
        low, high = blocks(index, 8, ROWS)
        z = noise.gaussian(low, high, stream, seed)
        if SMALL:
            z = z * 1.862645149230957e-09
        return z


@triton.jit
def of_rows(coeff, row_ptr, row, seed, KIND: tl.constexpr, ROWS: tl.constexpr):
    """The coefficient as `add_scaled` takes it: of a rank-one direction with each row's sign."""
    if KIND == RANK1:
        flips = noise.flips_along(row, ROWS // 16, tl.load(row_ptr + STREAM), LEFT, seed)
        return noise.signed(coeff, flips)[:, None]
    else:
        return coeff


@triton.jit
def add_scaled(acc, z, coeff, KIND: tl.constexpr):
    """fma(c, z, acc)."""
    if KIND == RADEMACHER:
        return acc + noise.signed(coeff, z)
    else:
        return fma(z, coeff, acc)


@triton.jit
def uniform16(
    row_ptr, start, place, seed, WHAT: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A group's 16-bit numbers of ``WHAT``: mask or rounding."""
    stream = tl.load(row_ptr + STREAM)
    index = tl.load(row_ptr + FIRST_INDEX) + start
    if KIND != RANK1:
        low, high = blocks(index, 8, ROWS)
        return noise.uniform16(low, high, stream, WHAT, seed)
    elif WHOLE:
        # Eight neighbours have a block to themselves.
        columns = tl.load(row_ptr + COLUMNS)
        block = tl.arange(0, ROWS // 16)[:, None] * (columns >> 3) + tl.arange(0, 16)[None, :]
        block = tl.reshape((index >> 3) + block, (ROWS,))
        u = noise.uniform16(block.to(tl.uint32), block >> 32, stream, WHAT, seed)
        return tl.reshape(u, (ROWS // 16, WIDTH))
    else:
        return noise.uniform16_of(index + place, stream, WHAT, seed)


@triton.jit
def keep_static(
    row_ptr, start, place, inside, KEEP_KIND: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Which elements a random mask or a mask of bits keeps."""
    keep = tl.load(row_ptr + KEEP)
    if KEEP_KIND == KEEP_RANDOM:
        seed = tl.load(row_ptr + KEEP_SEED)
        return uniform16(row_ptr, start, place, seed, MASK, KIND, ROWS, WHOLE) < keep.to(tl.uint32)
    else:
        local = start + place - tl.load(row_ptr + LEAD)
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

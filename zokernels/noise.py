"""The noise, version 1: z = noise(seed, stream, index), in plain PyTorch.

This file is the specification in executable form; docs/noise.md says the same in prose. Every
backend reproduces it bit for bit, so nothing here may change: logs of seeds are replayed by it.

A 128-bit block of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC'11) is drawn for a counter (block low, block high, stream, kind) under the key (seed low, seed
high), and serves `BLOCK[kind]` neighbouring elements of one parameter.
"""

from collections.abc import Sequence
from math import prod

import torch

__all__ = ["gaussian", "mask", "rademacher", "rank1"]

VERSION = 1

GAUSSIAN, RADEMACHER, MASK, ROUNDING, LEFT, RIGHT = range(6)
# A rank-one direction draws both of the last two; it goes by the number of the first.
RANK1 = LEFT
KINDS = {"gaussian": GAUSSIAN, "rademacher": RADEMACHER, "rank1": RANK1}

# Elements that one block serves, by kind; of the last two, rows and columns.
BLOCK = {GAUSSIAN: 8, RADEMACHER: 128, MASK: 8, ROUNDING: 8, LEFT: 128, RIGHT: 128}

_LOW32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85

# Odd quintic x·(c0 + c1·x² + c2·x⁴) on x = int32 that gives a uniform the moments of a normal.
_C0 = float.fromhex("0x1.6afd5ep-2")
_C1 = float.fromhex("-0x1.15954ap-61")
_C2 = float.fromhex("0x1.0ce94cp-123")
_UNIT = 2.0**-29


def gaussian(
    numel: int,
    *,
    seed: int,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal directions: elements ``offset … offset + numel − 1`` of one stream.

    Args:
        numel: Number of elements, at least 0.
        seed: Seed, 0 … 2⁶⁴ − 1.
        stream: Number of the parameter, 0 … 2³² − 1.
        offset: Position of the first element in the whole, row-major parameter.
        device: Where the result lives; it does not change a bit of it.

    Returns:
        A float32 tensor of shape ``(numel,)``.

    Raises:
        ValueError: If an argument is outside its range.
    """
    words, lead = _blocks(numel, seed, stream, offset, GAUSSIAN, device)
    return _hadamard_normals(words).reshape(-1)[lead : lead + numel]


def rademacher(
    numel: int,
    *,
    seed: int,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Random signs, +1 where the element's bit is set and −1 where it is clear.

    Takes and raises what `gaussian` does, and returns a float32 tensor of shape ``(numel,)``.
    """
    return _signs(numel, RADEMACHER, seed, stream, offset, device)


def rank1(
    shape: Sequence[int],
    *,
    seed: int,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A direction of rank one: a sign a row times a sign a column.

    A parameter is read as a matrix, by `columns_of`. One with fewer than two dimensions has the
    signs of `rademacher`.

    Args:
        shape: Shape of the parameter.
        seed: As for `gaussian`, and so are the following.
        stream: Number of the parameter.
        device: Where the result lives.

    Returns:
        A float32 tensor of that shape, all ±1.

    Raises:
        ValueError: If an argument is outside its range.
    """
    try:
        size = torch.Size(shape)
    except (TypeError, ValueError):
        size = torch.Size([-1])
    if min(size, default=0) < 0:
        raise ValueError(f"shape is {shape!r}, but it must be a list of sizes, as (768, 3072) is.")
    flat = signs_of_rank1(prod(size), columns_of(size), seed, stream, 0, device)
    return flat.view(size)


def columns_of(shape: Sequence[int]) -> int:
    """How many columns a parameter has as the matrix that a rank-one direction sees.

    Of two or three dimensions the last one is the columns and what is before it the rows; of four
    or more, as convolutions have, the first is the rows and the rest the columns. With fewer there
    is no matrix, and the answer is 0.
    """
    if len(shape) < 2:
        return 0
    return shape[-1] if len(shape) < 4 else prod(shape[1:])


def signs_of_rank1(
    numel: int, columns: int, seed: int, stream: int, offset: int, device: torch.device | str
) -> torch.Tensor:
    """Elements ``offset … offset + numel − 1`` of `rank1`, of a parameter of so many columns."""
    if columns == 0 or numel == 0:
        return _signs(numel, RADEMACHER, seed, stream, offset, device)
    check_address(numel, seed, stream, offset)
    row, column = divmod(offset, columns)
    place = torch.arange(column, column + numel, dtype=torch.int64, device=device)
    left = _signs(-(-(column + numel) // columns), LEFT, seed, stream, row, device)

    def right(start: int, end: int) -> torch.Tensor:
        return _signs(end - start, RIGHT, seed, stream, start, device)

    if numel >= columns:
        of_column = right(0, columns)[place % columns]
    elif column + numel <= columns:
        of_column = right(column, column + numel)
    else:
        # A row may be longer by far than what is asked for.
        of_column = torch.cat([right(column, columns), right(0, column + numel - columns)])
    return left[place // columns] * of_column


def mask(
    numel: int,
    keep: float,
    *,
    seed: int,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A random mask that keeps each element with probability ``round(keep · 65536) / 65536``.

    Takes and raises what `gaussian` does, and besides ``keep``, the expected share kept, 0 … 1.

    Returns:
        A bool tensor of shape ``(numel,)``: True where the element is kept.
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep is {keep}, but a share lies between 0 and 1.")
    return uniform16(numel, MASK, seed, stream, offset, device) < round(keep * 65536)


def uniform16(
    numel: int, kind: int, seed: int, stream: int, offset: int, device: torch.device | str
) -> torch.Tensor:
    """Uniform 16-bit integers, as int64 of shape ``(numel,)``: the raw draw of kinds 2 and 3."""
    words, lead = _blocks(numel, seed, stream, offset, kind, device)
    halves = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], 1)
    return halves.reshape(-1)[lead : lead + numel]


def _signs(
    numel: int, kind: int, seed: int, stream: int, offset: int, device: torch.device | str
) -> torch.Tensor:
    words, lead = _blocks(numel, seed, stream, offset, kind, device)
    bits = torch.stack(words, 1).unsqueeze(2) >> torch.arange(32, device=device) & 1
    return (bits * 2 - 1).reshape(-1)[lead : lead + numel].to(torch.float32)


# What draws the elements of a distribution that knows no rows and columns.
DRAWS = {GAUSSIAN: gaussian, RADEMACHER: rademacher}


def philox4x32(key: tuple[int, int], counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four 32-bit words for each counter.

    Args:
        key: Two 32-bit words.
        counter: Four int64 tensors of one shape, values 0 … 2³² − 1.

    Returns:
        Four int64 tensors of that shape, values 0 … 2³² − 1.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    # int64 products wrap, which keeps all 64 bits of an unsigned 32 × 32 product.
    product = a * b
    return product >> 32 & _LOW32, product & _LOW32


def _blocks(
    numel: int, seed: int, stream: int, offset: int, kind: int, device: torch.device | str
) -> tuple[tuple[torch.Tensor, ...], int]:
    """Draw every block that the elements touch.

    Returns the words, and how many elements of the first block lie before ``offset``.
    """
    check_address(numel, seed, stream, offset)
    first, lead = divmod(offset, BLOCK[kind])
    last = -(-(offset + numel) // BLOCK[kind])
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    counter = (
        block & _LOW32,
        block >> 32,
        torch.full_like(block, stream),
        torch.full_like(block, kind),
    )
    return philox4x32((seed & _LOW32, seed >> 32), counter), lead


def check_address(numel: int, seed: int, stream: int, offset: int) -> None:
    """Raise ValueError unless the arguments name elements that exist."""
    for name, value, bits in (
        ("numel", numel, 63),
        ("seed", seed, 64),
        ("stream", stream, 32),
        ("offset", offset, 63),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}, but it must be an integer.")
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} is {value}, but it must lie between 0 and 2**{bits} - 1.")
    if offset + numel >= 2**63:
        raise ValueError(
            f"offset + numel is {offset + numel}, but element indices must stay below 2**63."
        )


def _hadamard_normals(words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Eight normals from each block's four words: float32 of shape ``(blocks, 8)``."""
    v = []
    for w in words:
        xl = _float_of_int32(w << 16 | 0x8000)
        xh = _float_of_int32(w & 0xFFFF0000 | 0x8000)
        yh = xh * _quintic(xh)
        pl = _quintic(xl)
        v += [_fma(xl, pl, yh), _fma(xl, pl, -yh)]
    a, b, c, d = v[0] + v[2], v[0] - v[2], v[4] + v[6], v[4] - v[6]
    e, f, g, h = v[1] + v[3], v[1] - v[3], v[5] + v[7], v[5] - v[7]
    z = [a + c, e + g, b + d, f + h, a - c, e - g, b - d, f - h]
    return torch.stack(z, 1) * _UNIT


def _float_of_int32(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).to(torch.float32)


def _quintic(x: torch.Tensor) -> torch.Tensor:
    square = x * x
    return _fma(_fma(square, _C2, _C1), square, _C0)


def _fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    # Rounding the binary64 sum to binary32 equals a true fma for every input of this transform
    # (a test goes through all of them); in general it does not.
    b64 = b.double() if isinstance(b, torch.Tensor) else b
    c64 = c.double() if isinstance(c, torch.Tensor) else c
    return (a.double() * b64 + c64).float()

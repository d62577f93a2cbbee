"""The list of tensors of a launch, as a table in device memory, kept from call to call."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl

from zokernels.backends.plan import Pass, bits32, signed
from zokernels.backends.triton import group
from zokernels.masks import BitsOf, MagnitudeOf, MaskOf, RandomOf
from zokernels.noise import RADEMACHER, RANK1

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_KEEP_KINDS = {RandomOf: 1, MagnitudeOf: 2, BitsOf: 3}
_COLUMNS, _CELLS = int(group.COLUMNS), int(group.CELLS)
_WIDTH, _MOST_COLUMNS = int(group.WIDTH), int(group.MOST_COLUMNS)
_PER_TENSOR = ("params", "out", "mirror", "states", "streams", "offsets", "columns", "masks")
P = TypeVar("P", bound=Pass)


@dataclass(frozen=True)
class Table:
    """What a launch needs to know of its tensors; the cells are those of `group`."""

    rows: torch.Tensor
    groups: torch.Tensor
    keep_kind: int

    @property
    def programs(self) -> int:
        """How many programs there are, one a group."""
        return self.groups.numel()


def table_of(plan: Pass, memories: Sequence[Sequence[torch.Tensor]], elements: int) -> Table:
    """The table of a pass.

    Args:
        plan: The pass; all its tensors of one type.
        memories: What a program reads or writes of each tensor: lists as long as the tensors.
        elements: Elements of a group.
    """
    rows = tuple(
        (*(m.data_ptr() for m in mine), p.element_size(), *(m.element_size() for m in mine),
         p.numel(), offset, columns, stream, *_keep(mask))
        for p, offset, columns, stream, mask, *mine in zip(
            plan.params, plan.offsets, plan.columns, plan.streams, plan.masks, *memories,
            strict=True,
        )
    )  # fmt: skip
    kind = _KEEP_KINDS.get(type(plan.masks[0]), 0)
    # A perturbed forward describes each matrix by itself, some 150 to 300 a model.
    build = _build_one if len(rows) == 1 else _build
    return build(rows, len(memories), elements, kind, plan.params[0].device)


# A list's table holds a number a group, 0.1 % of its weights' memory; one tensor's next to nothing.
@functools.lru_cache(maxsize=64)
def _build(
    rows: tuple, memories: int, elements: int, keep_kind: int, device: torch.device
) -> Table:
    table, counts, first = [], [], 0
    for row in rows:
        addresses, sizes = row[:memories], row[memories + 1 : 2 * memories + 1]
        numel, offset, columns, stream, keep, keep_seed = row[2 * memories + 1 :]
        parts = _tiled if columns else _run
        for part in parts(numel, offset, columns, elements):
            starts = [a - part.lead * s for a, s in zip(addresses, sizes, strict=True)]
            aligned = part.aligned and all(a % 16 == 0 for a in starts)
            cells = [
                first, part.begin, part.lead, part.lead + numel, stream, keep, signed(keep_seed),
                int(aligned), *map(_wrapped, starts),
            ]  # fmt: skip
            cells += [0] * (_COLUMNS - len(cells))
            table.append([*cells, *part.of_matrix])
            counts.append(part.groups)
            first += part.groups
    described = torch.tensor(table, dtype=torch.int64).to(device)
    if len(table) == 1:
        return Table(described, _first(first, device), keep_kind)
    which = torch.repeat_interleave(
        torch.arange(len(table), dtype=torch.int32), torch.tensor(counts, dtype=torch.int64)
    )
    return Table(described, which.to(device), keep_kind)


class _Part(NamedTuple):
    """Groups of one tensor.

    Attributes:
        groups: How many.
        begin: Index of the first one's first element.
        lead: Elements from there to the tensor's first; less than none in its later parts.
        aligned: Whether eight neighbours lie in a row and are a block's.
        of_matrix: Its cells from `group.COLUMNS` on.
    """

    groups: int
    begin: int
    lead: int
    aligned: bool
    of_matrix: Sequence[int]


def _run(numel: int, offset: int, columns: int, elements: int) -> Iterator[_Part]:
    """A tensor in groups of consecutive elements."""
    lead = offset % elements
    groups = -(-(lead + numel) // elements) if numel else 0
    yield _Part(groups, offset - lead, lead, True, [columns] * (_CELLS - _COLUMNS))


def _tiled(numel: int, offset: int, columns: int, elements: int) -> Iterator[_Part]:
    """A tensor in tiles of its matrix: whole rows, and before and after them parts of one."""
    height = elements // _WIDTH
    aligned = columns % 8 == 0 and columns < _MOST_COLUMNS
    at, end = offset, offset + numel
    while at < end:
        row, begin = divmod(at, columns)
        rows = 1 if begin else max(1, (end - at) // columns)
        stop = min(columns, begin + end - at)
        top, left = row // height * height, begin // _WIDTH * _WIDTH
        across = -(-(stop - left) // _WIDTH)
        down = -(-(row + rows - top) // height)
        index = top * columns + left
        cells = [columns, row, row + rows, begin, stop, across]
        yield _Part(across * down, index, offset - index, aligned, cells)
        at += (stop - begin) if rows == 1 else rows * columns


def _wrapped(address: int) -> int:
    """As 64 bits hold it: of many columns a tile's first row may lie before all memory."""
    return signed(address % 2**64)


_build_one = functools.lru_cache(maxsize=4096)(_build.__wrapped__)


def _first(count: int, device: torch.device) -> torch.Tensor:
    """For so many programs the number of the first tensor."""
    return _zeros(1 << (count - 1).bit_length() if count else 0, device)[:count]


@functools.lru_cache(maxsize=64)
def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def by_type(plan: P, types: Sequence[Any]) -> Iterator[P]:
    """The plan split so that each part has one of ``types``, which are those of its tensors.

    Of a rank-one direction matrices are a part; what has no columns has Rademacher noise.
    """
    flat = [plan.kind == RANK1 and not columns for columns in plan.columns]
    sorts = list(zip(types, flat, strict=True))
    for sort in dict.fromkeys(sorts):
        chosen = [i for i, s in enumerate(sorts) if s == sort]
        some: dict[str, Any] = {"kind": RADEMACHER} if sort[1] else {}
        if len(chosen) < len(sorts):
            some |= {
                f: [getattr(plan, f)[i] for i in chosen]
                for f in _PER_TENSOR
                if getattr(plan, f, ())
            }
        yield replace(plan, **some) if some else plan


def numbers_of(
    plan: Pass, coeffs: Sequence[float], *more: Sequence[float], device: torch.device
) -> torch.Tensor:
    """Seeds, coefficients, decays, rounding seeds and what else there is, in one int64 tensor.

    A binary32 number is stored by its bits, so that one upload carries all.
    """
    values = [signed(s) for s in plan.seeds]
    values += map(bits32, coeffs)
    values += map(bits32, plan.decays)
    values += [signed(s) for s in plan.rounding_seeds]
    for numbers in more:
        values += map(bits32, numbers)
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _keep(mask: MaskOf) -> tuple[int, int]:
    match mask:
        case RandomOf(below, seed):
            return below, seed
        case MagnitudeOf(threshold):
            return bits32(threshold), 0
        case BitsOf(packed):
            return packed.data_ptr(), 0
        case _:
            return 0, 0

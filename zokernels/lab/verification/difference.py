"""The first element at which two tensors differ, with both bit patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """Where two tensors differ first.

    Args:
        tensor: Which of the tensors compared.
        index: Position of the element, counted row-major.
        expected: Bit pattern and value that it must have.
        got: Those that it has.
        count: How many elements differ.
        numel: How many there are.
    """

    tensor: str
    index: int
    expected: str
    got: str
    count: int
    numel: int

    def __str__(self) -> str:
        more = "no other does" if self.count == 1 else f"{self.count} of {self.numel} do"
        return (
            f"{self.tensor} differs at element {self.index} ({more}): "
            f"expected {self.expected}, got {self.got}."
        )


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns as integers, flat and on the CPU."""
    return t.detach().cpu().contiguous().reshape(-1).view(_INTEGERS[t.element_size()])


def first_difference(
    names: Sequence[str], expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]
) -> Difference | None:
    """The first difference, or None; of a NaN only that it is one counts."""
    for name, e, g in zip(names, expected, got, strict=True):
        if e.dtype != g.dtype or e.numel() != g.numel():
            raise ValueError(
                f"{name} has {e.numel()} elements of {e.dtype}, but {g.numel()} of {g.dtype} "
                "are to be compared with it."
            )
        differs = bits(e) != bits(g)
        if e.is_floating_point():
            differs &= ~(
                e.detach().cpu().reshape(-1).isnan() & g.detach().cpu().reshape(-1).isnan()
            )
        where = differs.nonzero().flatten()
        if len(where):
            i = int(where[0])
            return Difference(name, i, pattern(e, i), pattern(g, i), len(where), e.numel())
    return None


def pattern(t: torch.Tensor, i: int) -> str:
    """Bit pattern and value of an element, as in ``0x3f80 (1.0)``."""
    value = t.detach().cpu().reshape(-1)[i]
    number = int(bits(value)[0]) % (1 << 8 * t.element_size())
    return f"0x{number:0{2 * t.element_size()}x} ({value.item()!r})"

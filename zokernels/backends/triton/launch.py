"""How a pass is launched: the size of a group, and coefficients as the kernels take them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from zokernels import noise
from zokernels.backends.plan import Pass

# What `group.add_noise_to` leaves out of the Gaussian noise.
_UNIT = 2.0**-29
# A coefficient below this times _UNIT would not be exact.
_EXACT = 2.0**-97


class Shape(NamedTuple):
    """Rows of eight elements in a group, and warps that share it."""

    rows: int
    warps: int


# From instruction counts (docs/performance.md): more elements a thread spread the fixed work
# thinner, until registers spill.
_GAUSSIAN = {True: Shape(512, 4), False: Shape(256, 4)}
_SIGNS = {True: Shape(2048, 4), False: Shape(1024, 8)}


# What `shaped` asks for in place of the table.
_tried: Shape | None = None


@contextlib.contextmanager
def shaped(shape: Shape) -> Iterator[None]:
    """Launch in groups of another shape than the table's, to measure it: the bits are the same."""
    global _tried
    before, _tried = _tried, shape
    try:
        yield
    finally:
        _tried = before


def shape_of_add_noise(kind: int, plain: bool) -> Shape:
    """The group of an add_noise pass."""
    if _tried is not None:
        return _tried
    return (_GAUSSIAN if kind == noise.GAUSSIAN else _SIGNS)[plain]


def shape_of_update(kind: int, rule: str) -> Shape:
    """The group of an update pass."""
    if _tried is not None:
        return _tried
    if kind == noise.RADEMACHER:
        return _SIGNS[False]
    # With states memory binds, and fewer registers let more warps wait for it.
    return _GAUSSIAN[rule == "sign"]


def is_plain(plan: Pass) -> bool:
    """Whether a pass is what a training step does: no mask, one rounding to nearest."""
    return plan.masks[0] is None and not plan.stochastic and plan.steps == 1


def coefficients(plan: Pass) -> tuple[list[float], bool]:
    """The coefficients, with 2⁻²⁹ folded in unless one is too small for that; whether one is."""
    coeffs = list(plan.coeffs)
    if plan.kind != noise.GAUSSIAN:
        return coeffs, False
    if any(0 < abs(c) < _EXACT for c in coeffs):
        return coeffs, True
    return [c * _UNIT for c in coeffs], False


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments; what it reads in memory may change between runs."""

    kernel: Any
    programs: int
    device: torch.device
    arguments: tuple
    options: dict[str, Any]

    def run(self) -> None:
        """Launch on the tensors' own device."""
        if not self.programs:
            return
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            # Fusing a product and a sum would round once where the reference rounds twice.
            self.kernel[(self.programs,)](*self.arguments, **self.options, enable_fp_fusion=False)


class Deferred(NamedTuple):
    """What is not known of a launch whose numbers are in memory already.

    Attributes:
        numbers: int64: what `table.numbers_of` gives, coefficients as they are, and then whether
            the pass writes at all: 0 or 1.
        decays: Whether the weights are multiplied by the decay.
    """

    numbers: torch.Tensor
    decays: bool

"""How a pass is launched: the size of a group, and coefficients as the kernels take them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
    """Rows of eight elements in a group, warps that share it, and the most registers a thread."""

    rows: int
    warps: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As Triton takes them."""
        return dict(num_warps=self.warps, maxnreg=self.registers)


# Measured (docs/performance.md). More elements a thread spread the fixed work thinner, and take
# registers: with few warps on a multiprocessor nobody computes while others wait for memory.
_NORMAL, _NORMAL_ADDED = Shape(256, 4), Shape(256, 2, 96)
# "sign" and momentum; of float32 weights both spill with fewer registers, and need fewer warps.
_NORMAL_OF_RULE = {"sign": _NORMAL_ADDED, "momentum": Shape(256, 4, 64), "adam": _NORMAL}
_NORMAL_OF_WIDE_RULE = {"sign": Shape(256, 4, 72), "momentum": Shape(256, 4, 72), "adam": _NORMAL}
# Both sides of a direction at once.
_BOTH = {
    noise.GAUSSIAN: Shape(256, 4, 64), noise.RADEMACHER: Shape(512, 4, 96),
    noise.RANK1: Shape(1024, 4),
}  # fmt: skip
_SIGNS = {True: Shape(2048, 4), False: Shape(1024, 8)}
# Tiles of a rank-one direction: the more a thread has, the thinner its two blocks of signs a seed
# are spread. With fewer registers "adam" of float32 weights spills.
_TILE = {True: Shape(2048, 4), False: Shape(1024, 4)}
_TILE_OF_RULE = {
    "sign": Shape(1024, 4, 168), "momentum": Shape(1024, 4), "adam": Shape(512, 4, 168),
}  # fmt: skip
_TILE_OF_WIDE_RULE = _TILE_OF_RULE | {"adam": Shape(512, 4)}


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


def shape_of_add_noise(kind: int, plain: bool, mirror: bool = False) -> Shape:
    """The group of an add_noise pass."""
    if _tried is not None:
        return _tried
    if mirror:
        return _BOTH[kind]
    if kind != noise.GAUSSIAN:
        return (_TILE if kind == noise.RANK1 else _SIGNS)[plain]
    return _NORMAL_ADDED if plain else _NORMAL


def shape_of_update(kind: int, rule: str, wide: bool) -> Shape:
    """The group of an update pass; ``wide`` is of float32 weights."""
    if _tried is not None:
        return _tried
    if kind == noise.RANK1:
        return (_TILE_OF_WIDE_RULE if wide else _TILE_OF_RULE)[rule]
    if kind == noise.RADEMACHER:
        return _SIGNS[False]
    return (_NORMAL_OF_WIDE_RULE if wide else _NORMAL_OF_RULE)[rule]


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


def on_device(device: torch.device, launch: Callable[[], None]) -> None:
    """Launch on a device, which need not be the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        launch()
    else:
        with torch.cuda.device(device):
            launch()


@dataclass
class Launch:
    """A kernel with its arguments; what it reads in memory may change between runs."""

    kernel: Any
    programs: int
    device: torch.device
    arguments: tuple
    options: dict[str, Any]
    # What Triton made of it in the first run, and all that it takes.
    _compiled: Any = None
    _all: tuple = ()

    def run(self) -> None:
        """Launch on the tensors' own device."""
        if self.programs:
            on_device(self.device, self._run)

    def _run(self) -> None:
        if self._compiled is not None:
            # Triton would find the kernel by its arguments again, which takes longer than the rest.
            self._compiled[(self.programs, 1, 1)](*self._all)
            return
        # Fusing a product and a sum would round once where the reference rounds twice.
        kernel = self.kernel[(self.programs,)]
        self._compiled = kernel(*self.arguments, **self.options, enable_fp_fusion=False)
        named = self.kernel.arg_names[len(self.arguments) :]
        self._all = (*self.arguments, *(self.options[name] for name in named))


class Deferred(NamedTuple):
    """What is not known of a launch whose numbers are in memory already.

    Attributes:
        numbers: int64: what `table.numbers_of` gives, coefficients as they are, and then whether
            the pass writes at all: 0 or 1.
        decays: Whether the weights are multiplied by the decay.
    """

    numbers: torch.Tensor
    decays: bool

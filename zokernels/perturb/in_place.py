"""Perturbing the weights themselves, from a copy of them."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from zokernels.backends import shards
from zokernels.perturb.deferred import Prepared
from zokernels.perturb.direction import Direction
from zokernels.perturb.weight import Misused


class InPlace:
    """Perturbs the weights themselves, from a copy of them (1 × the trainable weights).

    Attributes:
        matrices: How many were made in memory besides: none.

    Args:
        params: What is perturbed.
        keep: Keep the copy's memory between sessions, at the same addresses.
        model: The module, where there is one: what a parameter is called.
    """

    matrices = 0

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        keep: bool = False,
        model: nn.Module | None = None,
    ):
        self.params = list(params)
        self.keep = keep
        self.model = model
        self._has_told = False
        self._kept: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] | None = None
        self._known = Prepared()
        self.seconds = 0.0

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keep the copy from here to the end of the block."""
        started = time.perf_counter()
        # As the passes read them, whatever the weights' own layout.
        dense = dict(memory_format=torch.contiguous_format)
        self.copies = self._kept or [p.detach().clone(**dense) for p in self.params]
        for copy, p in zip(self._kept, self.params, strict=bool(self._kept)):
            copy.copy_(p.detach())
        self._kept = self.copies if self.keep else []
        self.seconds += time.perf_counter() - started
        try:
            yield
        finally:
            self.copies = None
            if not self.keep:
                self._known.forget()

    def release(self) -> None:
        """Nothing is kept between sessions."""

    def run(self, direction: Direction, forward: Callable[[], float]) -> float:
        """``forward()`` at θ + scale · z."""
        with self.at(direction):
            return forward()

    @contextlib.contextmanager
    def at(self, direction: Direction) -> Iterator[None]:
        """The weights at θ + scale · z inside the block, and as they were after it."""
        with contextlib.nullcontext() if self.copies is not None else self.session():
            assert self.copies is not None
            started = time.perf_counter()
            out = [p.detach() for p in self.params]
            moved: list[int] = []
            try:
                (at,) = self._known.of([direction])
                assert at is not None
                at.fill(self.copies, out, range(len(out)))
                versions = list(map(_version, out))
                self.seconds += time.perf_counter() - started
                yield
                self._tell_of_writes(out, versions)
            finally:
                started = time.perf_counter()
                try:
                    moved = self._restore(out)
                except BaseException:
                    # Such as a Ctrl-C in the middle.
                    self._restore(out)
                    raise
                self.seconds += time.perf_counter() - started
            if moved:
                raise Misused.by_other_data(self._name(moved[0]))

    def _tell_of_writes(self, out: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
        written = [i for i, t in enumerate(out) if _version(t) != versions[i]]
        if written and not self._has_told:
            self._has_told = True
            p = self.params[written[0]]
            warnings.warn(
                f"A forward writes to the trainable parameter {self._name(written[0])!r} of shape "
                f"{tuple(p.shape)}; in a step that is undone, since what it wrote to were "
                "perturbed weights. Freeze the parameter, or write to it between the steps.",
                stacklevel=2,
            )

    def _name(self, i: int) -> str:
        named = self.model.named_parameters() if self.model is not None else ()
        return next((n for n, q in named if q is self.params[i]), f"number {i}")

    def _restore(self, out: Sequence[torch.Tensor]) -> list[int]:
        """Put the weights back, and tell whose ``p.data`` are others: made of perturbed ones."""
        assert self.copies is not None
        for target, copy in zip(out, self.copies, strict=True):
            target.copy_(copy)
        moved = [
            i
            for i, (p, before) in enumerate(zip(self.params, out, strict=True))
            if not shards.is_sharded(p) and p.data_ptr() != before.data_ptr()
        ]
        for i in moved:
            self.params[i].data = out[i]
        return moved


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version

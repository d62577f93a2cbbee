"""A direction whose seed and scales are in memory, and read there when a forward runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from zokernels import ops
from zokernels.backends.deferred import Deferred
from zokernels.backends.plan import Pass
from zokernels.perturb.direction import Direction, Move


class DeferredDirection(Direction):
    """One seed's direction, with the numbers of its passes in memory.

    Args:
        like: The parameters, their streams, the mask and the backend.
        numbers: What each pass reads, by kind of parameter: see `zokernels.backends.deferred`.
        kinds: The place in ``numbers`` of each parameter's.

    Attributes:
        is_closed: Whether every pass that a forward makes is prepared by now, so that a new one is
            an error: what prepares it can't be captured in a graph.
    """

    is_deferred = True

    def __init__(self, like: Direction, numbers: Sequence[torch.Tensor], kinds: Sequence[int]):
        # What the passes are prepared with, before their numbers are known.
        anything = [Move((1.0,))] * len(like.params)
        super().__init__(
            like.params, like.streams, anything, [0], like.dist, like.mask, like.backend
        )
        self.numbers = list(numbers)
        self.kinds = list(kinds)
        self.is_closed = False
        self._prepared: dict[tuple, list[Deferred]] = {}

    def forget(self) -> None:
        """Let go of what is prepared: its memory may not be that of the next forward."""
        self._prepared.clear()

    def fill(
        self,
        sources: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor],
        chosen: Sequence[int],
        offsets: Sequence[int] | None = None,
    ) -> None:
        """Write the moved values of the chosen parameters into ``out``, as in `Direction.fill`.

        Raises:
            RuntimeError: If the direction is closed and has no such pass.
        """
        key = (
            tuple(chosen), tuple(offsets or ()), tuple(t.data_ptr() for t in sources),
            tuple(t.data_ptr() for t in out),
        )  # fmt: skip
        if key not in self._prepared:
            if self.is_closed:
                raise RuntimeError(
                    "The forward asks for perturbed weights that it did not ask for before, so "
                    "that it can't be captured; let loss_fn do the same in every call."
                )
            self._prepared[key] = self._prepare(sources, out, chosen, offsets)
        for one in self._prepared[key]:
            one.run()

    def _prepare(
        self,
        sources: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor],
        chosen: Sequence[int],
        offsets: Sequence[int] | None,
    ) -> list[Deferred]:
        found: list[Deferred] = []
        for kind in dict.fromkeys(self.kinds[i] for i in chosen):

            def take(backend: ModuleType, plan: Pass, kind: int = kind) -> None:
                found.append(Deferred(backend, plan, self.numbers[kind], decays=False))

            places = [j for j, i in enumerate(chosen) if self.kinds[i] == kind]
            with ops.taking(take):
                super().fill(
                    [sources[j] for j in places],
                    [out[j] for j in places],
                    [chosen[j] for j in places],
                    [offsets[j] for j in places] if offsets else None,
                )
        return found

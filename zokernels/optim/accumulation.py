"""A step over several batches by accelerate's accumulation: their losses at the same points.

In ``with accelerator.accumulate(model)`` a step is called for each batch, and all but the last only
look: they leave their losses at the points of the step, and what moves the weights is the mean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from zokernels.estimators import Point


def is_partial() -> bool:
    """Whether accelerate says that further batches of this step are to come."""
    state = sys.modules.get("accelerate.state")
    return state is not None and not state.GradientState().sync_gradients


class Batches:
    """The losses of the batches of a step so far."""

    def __init__(self) -> None:
        self._losses: dict[Point, list[float]] = {}

    def __bool__(self) -> bool:
        """Whether there is a batch before the present one."""
        return bool(self._losses)

    def add(self, points: Sequence[Point], losses: Sequence[float]) -> None:
        """Keep a batch's losses."""
        for point, loss in zip(points, losses, strict=True):
            self._losses.setdefault(point, []).append(loss)

    def mean(self, points: Sequence[Point], losses: Sequence[float]) -> list[float]:
        """The means over all batches, of which these are the last one's losses."""
        every = [[*self._losses.get(p, ()), x] for p, x in zip(points, losses, strict=True)]
        return [sum(own) / len(own) for own in every]

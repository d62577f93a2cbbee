"""A step over several batches by accelerate's accumulation: their losses at the same points.

In ``with accelerator.accumulate(model)`` a step is called for each batch, and all but the last only
look: they leave their losses at the points of the step, and what moves the weights is the mean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from zokernels.estimators import Point


class Accumulating:
    """What an optimizer has for the batches of a step.

    Attributes:
        accumulates: For authors of rules: whether all that a step asks of a batch is its losses at
            the points of an estimate.
        step_was_skipped: What accelerate asks its own wrapper of an optimizer.
    """

    accumulates = True
    step_was_skipped = False
    # The wrapper would drop every closure but the last of a step. `Accelerator.prepare` leaves
    # alone what says this.
    _is_accelerate_prepared = True

    _batches: Batches

    @property
    def optimizer(self) -> Any:
        """Itself: as accelerate finds the optimizer of a scheduler in its wrappers."""
        return self

    def _is_partial(self, in_blocks: bool) -> bool:
        """Whether accelerate says that further batches of this step are to come.

        Raises:
            RuntimeError: If such a step takes more than losses at points that are known before.
        """
        state = sys.modules.get("accelerate.state")
        if state is None or state.GradientState().sync_gradients:
            return False
        if in_blocks or not self.accumulates:
            raise RuntimeError(
                f"{type(self).__name__}{' with blocks' if in_blocks else ''} can't take a step "
                "over several batches that come one by one (accelerator.accumulate): it looks "
                "at a batch again after it has seen the others. Take the parts into one closure: "
                "opt.step(lambda: sum(model(**part).loss for part in parts) / len(parts))."
            )
        return True


class Batches:
    """The losses of the batches of a step so far.

    Attributes:
        has_more: Whether further batches of the step are to come.
    """

    def __init__(self) -> None:
        self.has_more = False
        self._losses: dict[Point, list[float]] = {}

    def mean(self, points: Sequence[Point], losses: Sequence[float]) -> list[float]:
        """The means over the batches so far, of which these are the last one's losses."""
        every = [[*self._losses.get(p, ()), x] for p, x in zip(points, losses, strict=True)]
        if self.has_more:
            self._losses.update(zip(points, every, strict=True))
        return [sum(own) / len(own) for own in every]

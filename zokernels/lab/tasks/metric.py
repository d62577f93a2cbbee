"""What is reported of a task: how it is called, written and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number for each example, of which the mean is reported.

    Attributes:
        name: What ``--metric`` takes and ``metrics.json`` says.
        label: What a plot calls it.
        share: Whether it lies between 0 and 1 and more is better; else less is.
        written: Whether it is of answers that the model writes, and not of candidates.
    """

    name: str
    label: str
    share: bool = True
    written: bool = False

    def better(self, one: float, other: float) -> bool:
        """Whether the first of two values is better than the second; one that is finite is."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.isfinite(one) and not math.isfinite(other)
        return one > other if self.share else one < other

    def best(self, values: Sequence[float]) -> int:
        """The place of the best of some values, of equals the first."""
        place = 0
        for i, value in enumerate(values):
            place = i if self.better(value, values[place]) else place
        return place

    def text(self, value: float, error: float | None = None) -> str:
        """A value, and its standard error if there is one, for reading."""
        if not math.isfinite(value):
            return "not finite"
        form = ".1%" if self.share else ".4g"
        return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


ACCURACY = Metric("accuracy", "accuracy (%)")
F1 = Metric("f1", "F1 (%)", written=True)
EXACT_MATCH = Metric("exact_match", "exact match (%)", written=True)
LOSS = Metric("loss", "loss", share=False)
METRICS = {m.name: m for m in (ACCURACY, F1, EXACT_MATCH, LOSS)}

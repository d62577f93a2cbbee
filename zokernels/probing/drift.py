"""Where a run's own noise carries the weights, the curvature is another one.

A step of rate η moves every weight by noise of variance η²·E[d²]/q, so that after n of them it is
some s = η√(n·E[d²]/q) away from where it began. With R(s) = E[L(θ+sz)] − L(θ) the curvature is

    E[tr H(θ+sz)] = 2 dR/d(s²)

there, for normal z (the heat equation). The ladder of ε has R at its rungs, and what is taken from
it is by how much the curvature there is larger than at ε, along the same directions and batches.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from zokernels.probing.ladder import FACTORS, MIDDLE


@dataclass(frozen=True)
class Drift:
    """How the curvature grows with the distance from the weights.

    Attributes:
        distances: s, in the weights' own unit: the rungs of the ladder from ε on.
        growth: By how much h is larger there than at ε; it never falls, since a loss that has risen
            as far as it can curves no more.
    """

    distances: tuple[float, ...]
    growth: tuple[float, ...]

    @classmethod
    def of(cls, eps: float, rises: Sequence[Sequence[float]]) -> Drift:
        """That of a ladder.

        Args:
            eps: The run's own ε.
            rises: The mean of L± over L of each direction at each rung.
        """
        mean = [math.fsum(column) / len(column) for column in zip(*rises, strict=True)][MIDDLE:]
        distances = tuple(eps * factor for factor in FACTORS[MIDDLE:])
        here, growth = 2 * mean[0] / eps**2, [0.0]
        for j in range(1, len(distances)):
            apart = distances[j] ** 2 - distances[j - 1] ** 2
            more = 2 * (mean[j] - mean[j - 1]) / apart - here
            growth.append(max(growth[-1], more if math.isfinite(more) else math.inf))
        return cls(distances, tuple(growth))

    def at(self, distance: float) -> float:
        """The growth at a distance, between rungs by its logarithm."""
        place = bisect_right(self.distances, distance)
        if place in (0, len(self.distances)):
            return self.growth[place and place - 1]
        near, far = self.distances[place - 1], self.distances[place]
        low, high = self.growth[place - 1], self.growth[place]
        if low == high:
            return low
        return low + (high - low) * math.log(distance / near) / math.log(far / near)

"""Which ε: one at which a difference is neither lost in rounding nor bent by curvature.

Along a few directions, each on one batch, d is taken at rungs of ε half a decade apart, from a
hundredth to a hundred times the run's own. Rounding of losses and weights errs by some r/ε and the
third derivative by some c·ε², so that two neighbours differ by about the error of the worse one.
They agree where that difference is at most a tenth of d (root mean squares over the directions);
the range is the longest run of rungs each of which agrees with the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of the run's own ε, which is the middle rung.
FACTORS = tuple(10 ** (j / 2) for j in range(-4, 5))
MIDDLE = len(FACTORS) // 2
TOLERANCE = 0.1
# Of two rounds both directions, on the first of their batches.
ROUNDS = 2


@dataclass(frozen=True)
class Rung:
    """A scale of the ladder.

    Attributes:
        eps: ε.
        deviation: How far d is from that of the neighbour that agrees best, as a share of it;
            infinite where a loss was not finite, or no loss changed.
    """

    eps: float
    deviation: float


def judge(
    eps: float, slopes: Sequence[Sequence[float]]
) -> tuple[tuple[Rung, ...], tuple[float, float] | None]:
    """The ladder, and its range; None where no two neighbours agree.

    Args:
        eps: The run's own ε.
        slopes: The d of each direction at each rung.
    """
    apart = [_apart(*pair) for pair in zip(*_pairs(slopes), strict=True)]
    closest = [min(pair) for pair in zip([math.inf, *apart], [*apart, math.inf], strict=True)]
    rungs = tuple(Rung(eps * f, x) for f, x in zip(FACTORS, closest, strict=True))
    best, start = (0, 0), 0
    for i, x in enumerate([*apart, math.inf]):
        if x > TOLERANCE:
            best = max(best, (i - start, -start))
            start = i + 1
    steps, first = best[0], -best[1]
    return rungs, (rungs[first].eps, rungs[first + steps].eps) if steps else None


def _pairs(slopes: Sequence[Sequence[float]]) -> tuple[list[list[float]], list[list[float]]]:
    """By rung, the slopes of each direction; without the last rung, and without the first."""
    by_rung = [list(column) for column in zip(*slopes, strict=True)]
    return by_rung[:-1], by_rung[1:]


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    middle = math.hypot(*((a + b) / 2 for a, b in zip(one, other, strict=True)))
    if not (math.isfinite(middle) and middle > 0):
        return math.inf
    return math.hypot(*(a - b for a, b in zip(one, other, strict=True))) / middle

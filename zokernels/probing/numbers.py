"""Numbers with their errors: from rounds of forwards, each independent of the others.

A round takes two directions z₁, z₂ on the same eight batches. With d = (L(θ+εz) − L(θ−εz)) / 2ε of
a direction on a batch, and L₊, L₋, L₀ the losses there, it gives one unbiased sample each of

    ‖g‖²     the mean of d·d′ over pairs of batches of one direction, all 28 of them
    E[d²]    the mean of d², of a batch of the run's size
    h        the mean of (L₊ + L₋ − 2L₀)/ε²: the trace of the Hessian, to second order in ε
    spread   (L₊(z₁) − L₊(z₂))²/2ε², and of L₋: the variance over directions on one batch

since E zzᵀ = I. Of the four ‖g‖² has the largest error by far, since noise of the data hides it. At
equal forwards its variance goes by n + 2r + r²/(n − 1), with n batches a direction and r the ratio
of that noise to ‖g‖²; so n = 1 + r is best, and of eight it is at most twice the least for any r
from 1 to 30, where two would have up to eight times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Directions of a round, and the batches that both of them see: of a part of the weights fewer, so
# that its errors are over more rounds.
DIRECTIONS, BATCHES, BATCHES_OF_PART = 2, 8, 4
# On each batch: both sides of each direction, and the base loss.
FORWARDS = 2 * DIRECTIONS + 1
# The normal distribution's quantiles: 97.5%, and 95%.
_TWO_SIDED, _ONE_SIDED = 1.959964, 1.644854


@dataclass(frozen=True)
class Number:
    """A measured number.

    Attributes:
        value: The estimate.
        error: Its standard error, over independent rounds of two directions; for a ratio that of
            the jackknife, which leaves out one round at a time.
        directions: How many directions it is over.
    """

    value: float
    error: float
    directions: int

    @property
    def half(self) -> float:
        """Half the width of the 95% interval, by Student's t over the rounds."""
        return quantile(self.directions // DIRECTIONS - 1) * self.error

    @property
    def reach(self) -> float:
        """How far chance lifts a number that is 0, but for one case in twenty."""
        return quantile(self.directions // DIRECTIONS - 1, _ONE_SIDED) * self.error

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval."""
        return self.value - self.half, self.value + self.half

    @property
    def stands_out(self) -> bool:
        """Whether it is above 0 by more than its error explains, but for one case in twenty."""
        return self.value > self.reach

    def times(self, factor: float) -> Number:
        """The number in another unit."""
        return Number(factor * self.value, abs(factor) * self.error, self.directions)

    def __str__(self) -> str:
        return f"{brief(self.value)} ± {brief(self.error, 2)}"


class Moments(NamedTuple):
    """What a round gave, or the mean of several; with ``maximize`` of the loss's negative.

    Attributes:
        loss: L(θ).
        squared_gradient: ‖g‖².
        curvature: h.
        two_sided: E[d²] of the central difference.
        one_sided: E[d²] of the forward difference (L(θ+εz) − L(θ))/ε.
        spread: The variance of L(θ+εz)/ε over directions on one batch.
    """

    loss: float
    squared_gradient: float
    curvature: float
    two_sided: float
    one_sided: float
    spread: float


def moments(
    plus: Sequence[Sequence[float]],
    minus: Sequence[Sequence[float]],
    base: Sequence[float],
    eps: float,
) -> Moments:
    """The samples of a round.

    Args:
        plus: L(θ+εz) of each direction on each batch, of shape (2, 8).
        minus: L(θ−εz), likewise.
        base: L(θ) on each batch.
        eps: ε.
    """
    slopes = [
        [(p - m) / (2 * eps) for p, m in zip(over, under, strict=True)]
        for over, under in zip(plus, minus, strict=True)
    ]
    products = [(sum(d) ** 2 - sum(x * x for x in d)) / (len(d) * (len(d) - 1)) for d in slopes]
    sides = [*plus, *minus]
    bends = [
        (p + m - 2 * b) / eps**2
        for over, under in zip(plus, minus, strict=True)
        for p, m, b in zip(over, under, base, strict=True)
    ]
    forward = [((x - b) / eps) ** 2 for side in sides for x, b in zip(side, base, strict=True)]
    apart = [
        ((x - y) / eps) ** 2 / 2
        for first, second in (plus, minus)
        for x, y in zip(first, second, strict=True)
    ]
    return Moments(
        loss=_mean(base),
        squared_gradient=_mean(products),
        curvature=_mean(bends),
        two_sided=_mean([x * x for d in slopes for x in d]),
        one_sided=_mean(forward),
        spread=_mean(apart),
    )


def average(rounds: Sequence[Moments]) -> Moments:
    """The mean of each."""
    return Moments(*map(_mean, zip(*rounds, strict=True)))


def number(rounds: Sequence[Moments], of: Callable[[Moments], float]) -> Number:
    """A function of the moments, at their means, with the jackknife's error.

    Of a mean itself that is the plain standard error. Source: Efron and Stein, "The jackknife
    estimate of variance", Annals of Statistics 1981.

    Args:
        rounds: At least two.
        of: The function; NaN where it has no value.
    """
    n, total = len(rounds), [math.fsum(column) for column in zip(*rounds, strict=True)]
    without = [
        of(Moments(*((t - x) / (n - 1) for t, x in zip(total, r, strict=True)))) for r in rounds
    ]
    middle = _mean(without)
    error = math.sqrt((n - 1) / n * math.fsum((x - middle) ** 2 for x in without))
    return Number(of(average(rounds)), error, DIRECTIONS * n)


def brief(x: float, digits: int = 3) -> str:
    """So many significant digits, with an exponent only where it is short."""
    # Without the sign of a zero.
    return f"{float(f'{x:.{digits}g}') + 0.0:g}"


def quantile(freedom: int, normal: float = _TWO_SIDED) -> float:
    """Student's t where the normal distribution has ``normal``: its first corrections by 1/freedom.

    Source: Abramowitz and Stegun, 26.7.5; from 3 degrees of freedom on it is right to 4%.
    """
    z, f = normal, freedom
    return z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

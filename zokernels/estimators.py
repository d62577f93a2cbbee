"""Losses to (seeds, projected gradients): the randomized gradient estimate, and its scale.

Of q directions zₖ, with Lₖ = L(θ + εzₖ):

    two_sided    dₖ = (L(θ + εzₖ) − L(θ − εzₖ)) / 2ε                    2q forwards
    one_sided    dₖ = (Lₖ − L(θ)) / ε, the base loss once for all       q + 1
    population   dₖ = (Lₖ − L̄) · q / ((q − 1) ε), L̄ the mean of all Lₖ   q

and ĝ = (1/q) Σ dₖ zₖ. `scale` gives a step another length by what the dₖ themselves are.

The population's baseline is the mean of the other members, so that its estimate is unbiased as the
other two are. Sources: Spall, "Multivariate stochastic approximation using a simultaneous
perturbation gradient approximation", IEEE TAC 1992; MeZO (Malladi et al., 2023); for the
leave-one-out baseline Kool, van Hoof and Welling, "Buy 4 REINFORCE samples, get a baseline for
free!", 2019.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# A seed, and the side of its direction: 1, −1, or 0 for none.
Point = tuple[int, float]

ESTIMATORS = ("two_sided", "one_sided", "population")
NORMALIZE = (None, "std", "ema")

# Of the running mean of d².
BETA = 0.9

# What a seed is for: the direction of a query, the rounding of a step's update, or a mask that is
# drawn again every few steps.
DIRECTION, ROUNDING, SPARSITY = 0, 1, 2
# A direction that is only looked along, never stepped along.
PROBE = 3


class Moment(NamedTuple):
    """A running mean of d²: the sum of what came in, each with its weight, and of the weights.

    Their quotient is the mean without the pull of a start at 0, as Adam's bias correction has it.
    """

    total: float = 0.0
    weight: float = 0.0

    def after(self, gradients: Sequence[float]) -> Moment:
        """The mean after a step's d."""
        square = mean([d * d for d in gradients])
        return Moment(BETA * self.total + (1 - BETA) * square, BETA * self.weight + (1 - BETA))

    @property
    def root(self) -> float:
        """The root of the mean."""
        return math.sqrt(self.total / self.weight)


@dataclass
class Estimate:
    """What the forwards of a step gave.

    Attributes:
        seeds: One a query.
        losses: At the step's points, in order.
        differences: The ε · dₖ; of a rule that takes derivatives the dₖ, whose ε is 1.
        loss: The mean of the losses, or one-sided the base loss.
        side: The step to take: 1 for −η ĝ, −1 for +η ĝ, 0 for none.
        gradients: What enters the update, for each param group that the estimate is for; None where
            there is no step to take, since nothing differs.
        moments: The running mean square of each of these groups after this step; see `scale`.
    """

    seeds: list[int]
    losses: list[float]
    differences: list[float]
    loss: float
    side: int = 1
    gradients: list[list[float] | None] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    @classmethod
    def of(cls, estimator: str, seeds: Sequence[int], parts: Sequence[Sequence[float]]) -> Estimate:
        """The estimate from losses.

        Args:
            estimator: One of `ESTIMATORS`.
            seeds: One a query.
            parts: The losses at the points of `points_of`; several, where processes have shared the
                seeds out, each with the losses at the points of its own.
        """
        losses = [loss for part in parts for loss in part]
        if estimator == "population":
            parts = [losses]
        found = [d for part in parts for d in differences(estimator, part)]
        loss = losses[0] if estimator == "one_sided" else mean(losses)
        return cls(list(seeds), losses, found, loss)

    @property
    def is_finite(self) -> bool:
        """Whether every loss was a finite number, and so every difference."""
        return all(map(math.isfinite, [*self.losses, *self.differences]))


def points_of(estimator: str, seeds: Sequence[int]) -> list[Point]:
    """Where a step evaluates the loss."""
    if estimator == "two_sided":
        return [(seed, side) for seed in seeds for side in (1.0, -1.0)]
    base = [(0, 0.0)] if estimator == "one_sided" else []
    return [*base, *((seed, 1.0) for seed in seeds)]


def forwards_of(estimator: str, queries: int) -> int:
    """How many forwards a step of so many directions takes."""
    return len(points_of(estimator, range(queries)))


def differences(estimator: str, losses: Sequence[Any]) -> list[Any]:
    """The ε · dₖ of the losses at the points of `points_of`: floats, or tensors of as many each."""
    if estimator == "two_sided":
        return [(plus - minus) / 2 for plus, minus in zip(losses[::2], losses[1::2], strict=False)]
    if estimator == "one_sided":
        return [loss - losses[0] for loss in losses[1:]]
    count, middle = len(losses), mean(losses)
    # Of one member, which an earlier loss that was not finite may have left, nothing is known.
    return [(loss - middle) * count / (count - 1) if count > 1 else 0.0 for loss in losses]


def losses_along(
    losses_at: Callable[[Sequence[Point]], Sequence[float]],
    estimator: str,
    seeds: Sequence[int],
    together: int = 1,
    to_the_end: bool = False,
) -> list[float]:
    """Run the forwards of one step.

    Args:
        losses_at: The losses at some points (seed, side): θ + side · εz(seed); side 0 is θ itself.
        estimator: One of `ESTIMATORS`.
        seeds: One seed a query.
        together: How many points share a forward, and so are asked for at a time.
        to_the_end: Run all of them also where a loss is not finite, as several processes must that
            run their forwards together.

    Returns:
        The losses at the points, in order; fewer where one is not finite.
    """
    points = points_of(estimator, seeds)
    # Both sides of a direction count as one question.
    size = 2 if together == 1 and estimator == "two_sided" else together
    losses: list[float] = []
    for i in range(0, len(points), size):
        # A loss that is not finite ends the step: further forwards could not save it.
        if not to_the_end and not all(map(math.isfinite, losses)):
            break
        losses += losses_at(points[i : i + size])
    return losses


def scale(
    gradients: Sequence[float], normalize: str | None, clip: float | None, moment: Moment
) -> tuple[list[float] | None, Moment]:
    """What enters the update in the place of a step's dₖ.

    The running root counts this step's own d. ``clip`` comes first: each |d| is cut at so many of
    it. Then ``"std"`` divides by the deviation of the step's d, with q − 1 in its divisor, and
    ``"ema"`` by the running root.

    Sources: FZOO (2025) for the deviation of a step's losses, MEAZO (2026) for one running scalar
    in the place of Adam's second moments.

    Returns:
        The numbers, or None where the divisor is 0; and the running mean after this step.
    """
    found = list(gradients)
    if clip is not None or normalize == "ema":
        moment = moment.after(found)
    if clip is not None:
        most = clip * moment.root
        found = [max(-most, min(most, d)) for d in found]
    divisor = 1.0
    if normalize == "std":
        divisor = deviation(found)
    elif normalize == "ema":
        divisor = moment.root
    if divisor == 0.0:
        return None, moment
    return [d / divisor for d in found], moment


def deviation(numbers: Sequence[float]) -> float:
    """The standard deviation, with one less than their count in the divisor."""
    middle = mean(numbers)
    squares = [(x - middle) * (x - middle) for x in numbers]
    return math.sqrt(_sum(squares) / (len(numbers) - 1))


def mean(numbers: Sequence[Any]) -> Any:
    """The mean, summed in order: `sum` of newer Pythons and a device have other last bits.

    That of equal numbers is that number. Their rounded sum over their count may be another one, and
    what is left of rewards that are all the same would, over its own deviation, be a step.
    """
    first = numbers[0]
    if isinstance(first, float) and all(x == first for x in numbers):
        return first
    return _sum(numbers) / len(numbers)


def _sum(numbers: Sequence[Any]) -> Any:
    total: Any = 0.0
    for number in numbers:
        total = total + number
    return total


def derive_seed(
    run_seed: int, step: int, query: int, purpose: int = DIRECTION, block: int = 0
) -> int:
    """The 64-bit seed of a query's direction: a hash of (run seed, step, query, purpose, block).

    Block 0 has the seeds of a run without blocks.
    """
    message = struct.pack("<QQQQ", run_seed, step, query, purpose)
    if block:
        message += struct.pack("<Q", block)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")

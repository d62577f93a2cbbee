"""Losses to (seeds, projected gradients): the randomized gradient estimate.

Two-sided: d = (L(θ + εz) − L(θ − εz)) / 2ε. One-sided: d = (L(θ + εz) − L(θ)) / ε, with the base
loss computed once for all queries. Source: Spall, "Multivariate stochastic approximation using a
simultaneous perturbation gradient approximation", IEEE TAC 1992; MeZO (Malladi et al., 2023).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A seed, and the side of its direction: 1, −1, or 0 for none.
Point = tuple[int, float]

# What a seed is for: the direction of a query, the rounding of a step's update, or a mask that is
# drawn again every few steps.
DIRECTION, ROUNDING, SPARSITY = 0, 1, 2
# A direction that is only looked along, never stepped along.
PROBE = 3


@dataclass
class Estimate:
    """What the forwards of a step gave.

    ``differences[k]`` is L₊ − L₋ (over 2) or L₊ − L, before division by ε. ``side`` is the step to
    take: 1 for −η ĝ, −1 for +η ĝ, 0 for none.
    """

    seeds: list[int]
    losses: list[float]
    differences: list[float]
    loss: float
    side: int = 1

    @property
    def is_finite(self) -> bool:
        """Whether every loss was a finite number, and so every difference."""
        return all(map(math.isfinite, [*self.losses, *self.differences]))


def estimate(
    losses_at: Callable[[Sequence[Point]], Sequence[float]],
    seeds: Sequence[int],
    two_sided: bool,
    together: int = 1,
    to_the_end: bool = False,
) -> Estimate:
    """Run the forwards of one step.

    Args:
        losses_at: The losses at some points (seed, side): θ + side · εz(seed); side 0 is θ itself.
        seeds: One seed a query.
        two_sided: 2q forwards; otherwise q + 1.
        together: How many points share a forward, and so are asked for at a time.
        to_the_end: Run all of them also where a loss is not finite, as several processes must that
            run their forwards together.

    Returns:
        The seeds, losses and differences; the loss is the mean of L₊ and L₋, or the base loss.
    """
    points: list[Point] = [] if two_sided else [(0, 0.0)]
    for seed in seeds:
        points += [(seed, 1.0), (seed, -1.0)] if two_sided else [(seed, 1.0)]
    losses: list[float] = []
    # Both sides of a direction count as one question.
    size = together if together > 1 or not two_sided else 2
    for i in range(0, len(points), size):
        # A loss that is not finite ends the step: further forwards could not save it.
        if not to_the_end and not all(map(math.isfinite, losses)):
            break
        losses += losses_at(points[i : i + size])
    if two_sided:
        pairs = zip(losses[::2], losses[1::2], strict=False)
        differences = [(plus - minus) / 2 for plus, minus in pairs]
        return Estimate(list(seeds), losses, differences, sum(losses) / len(losses))
    differences = [plus - losses[0] for plus in losses[1:]]
    return Estimate(list(seeds), losses, differences, losses[0])


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

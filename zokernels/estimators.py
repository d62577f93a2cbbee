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

# What a seed is for: the direction of a query, the rounding of a step's update, or a mask that is
# drawn again every few steps.
DIRECTION, ROUNDING, SPARSITY = 0, 1, 2


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
    loss_at: Callable[[int, float], float],
    seeds: Sequence[int],
    two_sided: bool,
    *,
    to_the_end: bool = False,
) -> Estimate:
    """Run the forwards of one step.

    Args:
        loss_at: ``loss_at(seed, side)``: the loss at θ + side · εz(seed); side 0 is θ itself.
        seeds: One seed a query.
        two_sided: 2q forwards; otherwise q + 1.
        to_the_end: Run all of them also where a loss is not finite, as several processes must that
            run their forwards together.

    Returns:
        The seeds, losses and differences; the loss is the mean of L₊ and L₋, or the base loss.
    """
    losses: list[float] = []
    differences: list[float] = []
    base = 0.0
    if not two_sided:
        base = loss_at(0, 0.0)
        losses.append(base)
    for seed in seeds:
        # A loss that is not finite ends the step: further forwards could not save it.
        if not to_the_end and not all(map(math.isfinite, losses)):
            break
        plus = loss_at(seed, 1.0)
        losses.append(plus)
        if two_sided:
            minus = loss_at(seed, -1.0)
            losses.append(minus)
            differences.append((plus - minus) / 2)
        else:
            differences.append(plus - base)
    loss = sum(losses) / len(losses) if two_sided else base
    return Estimate(list(seeds), losses, differences, loss)


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

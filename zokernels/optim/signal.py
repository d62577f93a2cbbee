"""How much of a slope is the gradient, and how much the choice of the batch's examples.

Where a closure gives a loss an example, every example has a slope of its own along a direction, and
a batch's slope d is their mean. Their spread tells by how much the mean of as many others would
differ, and so what of d² is there by chance:

    noise = s² / B        ‖g‖² = E[d² − s² / B]

with s² the variance of B examples' slopes, B − 1 in its divisor: no bias, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from zokernels.estimators import Estimate, differences, forwards_of


@dataclass(frozen=True)
class Signal:
    """What the slopes of a step were made of.

    Attributes:
        gradient: An estimate of ‖g‖² by this step alone, of the weights that it perturbed; it can
            be below 0. Take means over hundreds of steps.
        noise: What a batch of so many examples adds to the square of a slope.
        examples: Examples of the batch, B.
    """

    gradient: float
    noise: float
    examples: int


def read(
    found: list[Estimate], estimator: str, eps: float, rows: Mapping[float, torch.Tensor]
) -> Signal | None:
    """A step's signal.

    Args:
        found: Its estimates, of one block of the weights each.
        estimator: What their differences are.
        eps: ε.
        rows: The examples' losses of each forward, by their mean; None is given where they are not
            there for every point.
    """
    gradient = noise = 0.0
    examples = 0
    for one in found:
        # A rule may have looked at more points; one that takes derivatives has fewer.
        points = forwards_of(estimator, len(one.seeds))
        losses = [rows.get(loss) for loss in one.losses[:points]]
        sizes = {None if each is None else len(each) for each in losses}
        if None in sizes or len(sizes) != 1 or len(losses) < points or not one.is_finite:
            return None
        slopes = torch.stack(differences(estimator, losses)) / eps
        examples = slopes.shape[1]
        by_chance = slopes.var(1) / examples
        # Around the mean of the others a member's slope has more of both.
        count = len(slopes)
        share = (count - 1) / count if estimator == "population" else 1.0
        gradient += share * float((slopes.mean(1).square() - by_chance).mean())
        noise += share * float(by_chance.mean())
    return Signal(gradient, noise, examples)

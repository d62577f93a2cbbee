"""The scale of a step on the device: `zokernels.estimators.scale`, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from zokernels.estimators import BETA


class Scaled(NamedTuple):
    """What enters the update, the running mean after, and whether the divisor was 0."""

    gradients: torch.Tensor
    moment: torch.Tensor
    is_flat: torch.Tensor


class Scaler:
    """Gives a step's dₖ the length that `normalize` and `clip` ask for.

    Args:
        normalize: None, "std" or "ema".
        clip: None, or at how many running roots a |dₖ| is cut.
        count: Directions of a step.
        number: Makes a float64 tensor of one element on the device. By a Python number CUDA divides
            as it multiplies by its inverse, which rounds twice.
    """

    def __init__(
        self,
        normalize: str | None,
        clip: float | None,
        count: int,
        number: Callable[[float], torch.Tensor],
    ):
        self.normalize, self.clip = normalize, clip
        self._count, self._fewer, self._one = number(count), number(count - 1), number(1)
        self._beta, self._rest = number(BETA), number(1 - BETA)
        self._most = None if clip is None else number(clip)

    def __call__(self, gradients: torch.Tensor, moment: torch.Tensor) -> Scaled:
        """Of float64: the dₖ, shape (q,), and the running mean as it was, shape (2,)."""
        if self._most is not None or self.normalize == "ema":
            square = mean(gradients * gradients, self._count)
            grown = self._beta * moment[0] + self._rest * square
            moment = torch.stack([grown, self._beta * moment[1] + self._rest])
        if self._most is not None:
            most = self._most * self._root(moment)
            gradients = gradients.clamp(-most, most)
        divisor = self._one
        if self.normalize == "std":
            apart = gradients - mean(gradients, self._count)
            divisor = (total(apart * apart) / self._fewer).sqrt()
        elif self.normalize == "ema":
            divisor = self._root(moment)
        return Scaled(gradients / divisor, moment, divisor == 0)

    def _root(self, moment: torch.Tensor) -> torch.Tensor:
        return (moment[0] / moment[1]).sqrt()


def mean(numbers: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """`zokernels.estimators.mean`, with the count on the device."""
    same = (numbers == numbers[0]).all()
    return torch.where(same, numbers[0], total(numbers) / count)


def total(numbers: torch.Tensor) -> torch.Tensor:
    """The sum in order, as the host takes it."""
    found = torch.zeros((), dtype=numbers.dtype, device=numbers.device)
    for number in numbers.unbind():
        found = found + number
    return found

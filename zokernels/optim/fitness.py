"""What stands for the losses or rewards that were told of a population.

Source of the centred ranks: Salimans et al., "Evolution strategies as a scalable alternative to
reinforcement learning", 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zokernels.estimators import mean

Fitness = str | Callable[[list[float]], Sequence[float]] | None


def numbers_of(losses: Any, count: int) -> list[float]:
    """What was told, as Python floats.

    Raises:
        ValueError: If there is not one number a member.
    """
    if isinstance(losses, torch.Tensor):
        if losses.is_complex() or losses.dim() > 1:
            raise ValueError(
                f"tell() got a tensor of shape {tuple(losses.shape)} and type {losses.dtype}, but "
                f"it takes one real number a member, {count} here."
            )
        losses = losses.detach().reshape(-1).tolist()
    found = _floats("tell() got", losses)
    if len(found) != count:
        raise ValueError(
            f"tell() got {len(found)} numbers for {count} members; give one for each, in the order "
            "of opt.ask()."
        )
    return found


def _floats(got: str, numbers: Any) -> list[float]:
    """Python floats, of a sequence with one real number in each place."""
    try:
        return [float(x) for x in numbers]
    except (TypeError, ValueError, RuntimeError):
        pass
    what = type(numbers).__name__
    if isinstance(numbers, list | tuple) and numbers:
        first = numbers[0]
        shape = f" of shape {tuple(first.shape)}" if hasattr(first, "shape") else ""
        what += f" of {type(first).__name__}{shape}"
    raise ValueError(
        f"{got} a {what}, but it must be a list or a tensor with one real number a member; of "
        "several rows take their mean."
    )


def centered_rank(numbers: Sequence[float]) -> list[float]:
    """Each number's rank, from −½ for the least to ½ for the largest; equal ones share theirs."""
    ordered = sorted(numbers)
    most = len(ordered) - 1
    places: dict[float, list[int]] = {}
    for place, x in enumerate(ordered):
        places.setdefault(x, []).append(place)
    return [mean(places[x]) / most - 0.5 if most else 0.0 for x in numbers]


def shaped(fitness: Fitness, parts: list[list[float]]) -> list[list[float]]:
    """The numbers that stand for what was told, of all members together.

    Raises:
        ValueError: If ``fitness`` is unknown, or gives other than a number for each.
    """
    if fitness == "centered_rank":
        fitness = centered_rank
    if not (fitness is None or callable(fitness)):
        raise ValueError(
            f"fitness is {fitness!r}, but it must be None, 'centered_rank', or a function from all "
            "members' numbers to as many."
        )
    numbers = [x for part in parts for x in part]
    if fitness is None or not all(map(math.isfinite, numbers)):
        return parts
    found = _floats("fitness gave", fitness(list(numbers)))
    if len(found) != len(numbers):
        raise ValueError(
            f"fitness gave {len(found)} numbers for {len(numbers)} members; it must give one each."
        )
    rest = iter(found)
    return [[next(rest) for _ in part] for part in parts]

"""Accuracy on a split, in batches of texts of like length."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zokernels.tasks.scoring import Scorer
from zokernels.tasks.task import Example, Task


class Interrupted(Exception):
    """An evaluation was asked to stop before it had seen every example."""


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers and the number of examples it is over."""

    value: float
    examples: int

    @property
    def error(self) -> float:
        """The binomial standard error."""
        return math.sqrt(self.value * (1 - self.value) / self.examples)


@torch.no_grad()
def accuracy(
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int = 64,
    stop: Callable[[], bool] = lambda: False,
    calibrate: bool = False,
) -> Accuracy:
    """The share of examples whose best-scored candidate is theirs.

    Args:
        scorer: The model and its way of scoring.
        examples: At least one.
        batch_size: Examples a forward.
        stop: Asked before each batch.
        calibrate: As for `Scorer.predict`.

    Raises:
        Interrupted: If ``stop`` answered true.
    """
    ordered = sorted(examples, key=lambda e: len(e.sentence))
    right = 0
    for start in range(0, len(ordered), batch_size):
        if stop():
            raise Interrupted
        batch = ordered[start : start + batch_size]
        for example, place in zip(batch, scorer.predict(batch, calibrate), strict=True):
            right += _is_right(scorer.task, example, place)
    return Accuracy(right / len(ordered), len(ordered))


def _is_right(task: Task, example: Example, place: int) -> bool:
    if not example.answers or task.choices is None:
        return place == example.label
    return task.choices(example.fields)[place] in example.answers

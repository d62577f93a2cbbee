"""Accuracy on a split, in batches of texts of like length."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zokernels.lab.tasks import generation, halves
from zokernels.lab.tasks.scoring import Scorer
from zokernels.lab.tasks.task import Example, Task


class Interrupted(Exception):
    """An evaluation was asked to stop before it had seen every example."""


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, or a mean F1, and the number of examples it is over.

    ``squares`` is the mean of the squares of the examples' own values, which for right and wrong
    are the values themselves.
    """

    value: float
    examples: int
    squares: float | None = None

    @property
    def error(self) -> float:
        """The standard error: for right and wrong the binomial one."""
        squares = self.value if self.squares is None else self.squares
        return math.sqrt(max(0.0, squares - self.value**2) / self.examples)


@torch.no_grad()
def accuracy(
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int = 64,
    stop: Callable[[], bool] = lambda: False,
    calibrate: bool = False,
    retry_oom: bool = False,
) -> Accuracy:
    """The share of examples judged right, or the mean F1 of what is written.

    Args:
        scorer: The model and its way of scoring.
        examples: At least one.
        batch_size: Examples a forward.
        stop: Asked before each batch.
        calibrate: As for `Scorer.predict`.
        retry_oom: Halve a batch that does not fit in memory, until it does.

    Raises:
        Interrupted: If ``stop`` answered true.
    """
    ordered = sorted(examples, key=lambda e: len(e.sentence))
    found: list[float] = []

    def judge(batch: Sequence[Example]) -> list[float]:
        if scorer.task.generates:
            written = generation.answers(scorer, batch)
            return [generation.f1(w, e.answers) for w, e in zip(written, batch, strict=True)]
        places = scorer.predict(batch, calibrate)
        return [float(_is_right(scorer.task, e, i)) for e, i in zip(batch, places, strict=True)]

    for start in range(0, len(ordered), batch_size):
        if stop():
            raise Interrupted
        batch = ordered[start : start + batch_size]
        found += halves.in_parts(judge, batch) if retry_oom else judge(batch)
    squares = sum(v * v for v in found) / len(found) if scorer.task.generates else None
    return Accuracy(sum(found) / len(found), len(found), squares)


def _is_right(task: Task, example: Example, place: int) -> bool:
    if not example.answers or task.choices is None:
        return place == example.label
    return task.choices(example.fields)[place] in example.answers

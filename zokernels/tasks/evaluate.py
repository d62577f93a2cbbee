"""Accuracy on a split, in batches of sentences of like length."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zokernels.tasks.scoring import Scorer
from zokernels.tasks.sst2 import Example


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
) -> Accuracy:
    """The share of examples whose best-scored label is theirs.

    Args:
        scorer: The model and its way of scoring.
        examples: At least one.
        batch_size: Examples a forward.
        stop: Asked before each batch.

    Raises:
        Interrupted: If ``stop`` answered true.
    """
    ordered = sorted(examples, key=lambda e: len(e.sentence))
    right = 0
    for start in range(0, len(ordered), batch_size):
        if stop():
            raise Interrupted
        batch = scorer.collate(ordered[start : start + batch_size])
        right += int((scorer.scores(batch).argmax(-1) == batch["labels"]).sum())
    return Accuracy(right / len(ordered), len(ordered))

"""What a run measures, and whom it tells."""

from dataclasses import dataclass, field

import torch

from zokernels.lab.tasks import evaluate


class Watcher:
    """What a run tells whoever watches it; this one stays silent."""

    def say(self, sentence: str) -> None:
        """Something worth reading, once."""

    def step(self, number: int, loss: float, seconds: float, outside: float) -> None:
        """After each step: its loss, its time, and the part of that outside the forwards."""


@dataclass
class History:
    """What was measured, for the plot and the report. Lost losses are NaN here."""

    losses: list[float] = field(default_factory=list)
    # Steps whose batch did not fit in memory whole.
    halved: int = 0
    dev: list[tuple[int, evaluate.Accuracy]] = field(default_factory=list)
    valid: list[tuple[int, evaluate.Accuracy]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("total", "forwards", "backward", "noise", "update"), 0.0
        )
    )
    # How often training ran the model, and how often it went back through it.
    forwards: int = 0
    backwards: int = 0

    def count(self, loss: torch.Tensor) -> None:
        """Counts the forward that gave a loss, and the backward of one that has a graph."""
        self.forwards += 1
        # A first-order optimizer, or part of one, goes back through whatever has a graph.
        self.backwards += loss.requires_grad

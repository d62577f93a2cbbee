"""What a run measures, and whom it tells."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

# Of the running means of a signal, of which a single step tells little.
_BETA = 0.99
PARTS = ("forwards", "backward", "noise", "update")


class Watcher:
    """What a run tells whoever watches it; this one stays silent."""

    def say(self, sentence: str) -> None:
        """Something worth reading, once."""

    def probing(self, done: int, total: int) -> None:
        """After each batch of a probe: its forwards so far, and in all."""

    def step(self, number: int, loss: float, seconds: float, outside: float) -> None:
        """After each step: its loss, its time, and the part of that outside the forwards."""


def brief(value: float, digits: int = 3) -> str:
    """A number without an exponent that is longer than its digits."""
    return f"{float(f'{value:.{digits}g}'):g}"


def with_error(value: float, error: float) -> str:
    """A measured number and its standard error."""
    return f"{brief(value)} ± {brief(error, 2)}"


@dataclass(frozen=True)
class Mean:
    """A metric's mean, and the number of examples it is over.

    ``squares`` is the mean of the squares of the examples' own values, which for right and wrong
    are the values themselves.
    """

    value: float
    examples: int
    squares: float | None = None

    @property
    def error(self) -> float:
        """The standard error: for right and wrong the binomial one."""
        if not math.isfinite(self.value):
            return math.nan
        squares = self.value if self.squares is None else self.squares
        return math.sqrt(max(0.0, squares - self.value**2) / self.examples)


@dataclass
class History:
    """What was measured, for the plot and the report. What was not finite is NaN here."""

    losses: list[float] = field(default_factory=list)
    # Of each step its rate, and where there is one what its slopes were made of.
    rates: list[float] = field(default_factory=list)
    signals: list[dict[str, Any]] = field(default_factory=list)
    # Steps whose batch did not fit in memory whole.
    halved: int = 0
    dev: list[tuple[int, Mean]] = field(default_factory=list)
    valid: list[tuple[int, Mean]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("total", *PARTS), 0.0))
    # How often training ran the model, and how often it went back through it.
    forwards: int = 0
    backwards: int = 0

    def count(self, loss: torch.Tensor) -> None:
        """Counts the forward that gave a loss, and the backward of one that has a graph."""
        self.forwards += 1
        # A first-order optimizer, or part of one, goes back through whatever has a graph.
        self.backwards += loss.requires_grad

    def running(self, signal: dict[str, Any]) -> dict[str, float]:
        """The running means after a step with this signal: over some hundred steps."""
        before = self.signals[-1] if self.signals else {}
        # Without the pull of a start at 0.
        share = (1 - _BETA) / (1 - _BETA ** (len(self.signals) + 1))
        return {
            f"running_{name}": before.get(f"running_{name}", 0.0) * (1 - share)
            + share * signal[name]
            for name in ("gradient", "noise")
        }

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a line of the run's log, be it of a step or of an evaluation."""
        if "loss" not in record:
            value, error = (_number(record[name]) for name in ("value", "standard_error"))
            examples = record["examples"]
            found = Mean(value, examples, error**2 * examples + value**2)
            getattr(self, record["split"]).append((record["step"], found))
            return
        self.losses.append(_number(record["loss"]))
        self.rates.append(record["lr"])
        if record.get("signal"):
            self.signals.append(record["signal"])
        self.halved += record.get("halved", False)
        for part, seconds in {**record["parts"], "total": record["seconds"]}.items():
            self.seconds[part] += seconds
        self.forwards = record.get("forwards", 0)
        self.backwards = record.get("backwards", 0)


def _number(logged: float | None) -> float:
    return math.nan if logged is None else logged

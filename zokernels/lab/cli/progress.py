"""The progress bar of a run: loss, speed, and what a step costs beyond its forwards."""

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zokernels.lab.benchmarks import forecast
from zokernels.lab.runs.history import Watcher

_MEMORY = 0.98
_REFRESH = 0.2


class Sayer(Watcher):
    """Says what the preparation of a run has to say.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, sentence: str) -> None:
        """Prints it."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


class ProgressWatcher(Sayer):
    """Draws a run on the terminal; outside one, prints a line each tenth of the run.

    Args:
        steps: Steps of the whole run.
        console: Where to draw.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        super().__init__(console or Console())
        self.steps = steps
        self._loss = self._weight = self._total = self._outside = 0.0
        self._began: float | None = None
        # A resumed run does not begin at step 1.
        self._before = 0
        self._drawn = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} steps/s"),
            TextColumn("{task.fields[outside]} outside forwards"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task(
            "training", total=steps, loss="–", speed="–", outside="–"
        )

    def __enter__(self) -> "ProgressWatcher":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def probing(self, done: int, total: int) -> None:
        """Moves the bar of the probe, which is that of the training until there is any."""
        if done < total:
            self._progress.update(self._bar, description="probing", completed=done, total=total)
        else:
            self._progress.reset(self._bar, description="training", total=self.steps)

    def step(self, number: int, loss: float, seconds: float, outside: float) -> None:
        """Moves the bar; a loss that is not finite leaves the shown mean as it is."""
        now = time.perf_counter()
        if self._began is None:
            self._began, self._before = now - seconds, number - 1
        if math.isfinite(loss):
            self._loss = _MEMORY * self._loss + loss
            self._weight = _MEMORY * self._weight + 1
        self._total += seconds
        self._outside += outside
        shown: dict[str, Any] = {
            "loss": f"{self._loss / self._weight:.4f}" if self._weight else "not finite",
            "speed": f"{(number - self._before) / max(now - self._began, 1e-9):.2f}",
            "outside": f"{self._outside / self._total:.0%}",
        }
        if not self.console.is_terminal:
            if number == self.steps or number % max(1, self.steps // 10) == 0:
                left = (self.steps - number) * (now - self._began) / (number - self._before)
                self.say(
                    f"Step {number}/{self.steps}: loss {shown['loss']}, {shown['speed']} steps/s, "
                    f"{shown['outside']} outside forwards"
                    f"{f', {forecast.words(left)} left' if left else ''}."
                )
        elif now - self._drawn > _REFRESH or number == self.steps:
            self._drawn = now
            self._progress.update(self._bar, completed=number, **shown)

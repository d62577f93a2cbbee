"""How long a benchmark takes, said before it has taken so long."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from zokernels.lab.benchmarks import timing

# Of the square matrices whose product tells how fast a machine multiplies.
_SIDE = 1024


class Forecast:
    """What is left, by a guess for each part and by how the guesses of those done turned out.

    Args:
        guesses: Seconds of each part, in their order.
    """

    def __init__(self, guesses: Sequence[float]) -> None:
        self.guesses = list(guesses)
        self._taken: list[float] = []

    def done(self, seconds: float) -> None:
        """The next part has taken so long."""
        self._taken.append(seconds)

    @property
    def left(self) -> float:
        """Seconds of the parts that are left."""
        over = len(self._taken)
        guessed = sum(self.guesses[:over])
        scale = sum(self._taken) / guessed if guessed else 1.0
        return scale * sum(self.guesses[over:])


def words(seconds: float) -> str:
    """Seconds as one says them who does not know them exactly."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"


def seconds_of_a_product(dtype: torch.dtype, device: str) -> float:
    """Seconds of one multiplication and addition, in a product of matrices here and now."""
    a = torch.zeros(_SIDE, _SIDE, dtype=dtype, device=device)
    # The first ones wake threads up.
    taken = [timing.clock(lambda: a @ a, device) for _ in range(5)]
    return statistics.median(taken[2:]) / _SIDE**3

"""The rates that a cell of the study is run at, and which of them is best.

By one seed at rates half a decade apart, until the best has a neighbour on either side, and at the
best by more seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from zokernels.lab.benchmarks.results import Row

RATES = tuple(float(f"{m}e{e}") for e in range(-8, 2) for m in (1, 3))
SEEDS = (0, 1, 2)


def loss_of(run: Row) -> float:
    """The held-out loss of a run; a run that was destroyed has an infinite one."""
    loss = float(run["loss_after"])
    return loss if math.isfinite(loss) else math.inf


def at_best(runs: Sequence[Row]) -> list[Row]:
    """The runs of a cell at the best rate of its grid, by the first seed."""
    best = min((run for run in runs if run["seed"] == "0"), key=loss_of)["lr"]
    return [run for run in runs if run["lr"] == best]


def missing(runs: Sequence[Row], first: float) -> tuple[float, int] | None:
    """The rate and the seed of a cell's next run; None where nothing is missing.

    Args:
        runs: Those that are there.
        first: The rate to begin at, one of `RATES`.
    """
    if not runs:
        return first, SEEDS[0]
    best_runs = at_best(runs)
    at = RATES.index(float(best_runs[0]["lr"]))
    tried = {float(run["lr"]) for run in runs}
    for rate in RATES[max(at - 1, 0) : at + 2]:
        if rate not in tried:
            return rate, SEEDS[0]
    seeds = {int(run["seed"]) for run in best_runs}
    return next(((RATES[at], seed) for seed in SEEDS if seed not in seeds), None)

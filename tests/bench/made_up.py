"""Rows of measurements that nobody has made yet: what a report must be able to show."""

import itertools
from pathlib import Path

import pytest

from bench.report.figures import gpu
from zokernels.lab.benchmarks import peers, results

ROOT = Path(__file__).parents[2]


def whole_study():
    """A row for every cell that bench/study/matrix.yaml may ask for, two where it repeats."""
    yaml = pytest.importorskip("yaml", reason="needs pyyaml: pip install '.[hf]'")
    file = yaml.safe_load((ROOT / "bench" / "study" / "matrix.yaml").read_text(encoding="utf-8"))
    like = results.read(results.FOLDER / "study.csv")[0]
    rows = []
    for part, given in file["parts"].items():
        fixed = {"part": part, "model": given["base"]["name"], "shots": "", "scheme": "full"}
        fixed |= {
            k: v for k, v in given["base"].items() if k in ("scheme", "optimizer", "task", "steps")
        }
        grid = {k: list(map(str, values)) for k, values in given["grid"].items()}
        for number, cell in enumerate(itertools.product(*grid.values())):
            row = like | fixed | dict(zip(grid, cell, strict=True))
            if row["task"] == "trec":
                row |= {"dev_accuracy_before": "0.17", "dev_majority": "0.224"}
            for seed in range(1 + ("-" not in part and number < 4)):
                after = 0.55 + 0.01 * (number % 30) + 0.02 * seed
                rows.append(row | {"seed": str(seed), "dev_accuracy_after": str(after)})
    return rows


def steps_on_a_gpu():
    """The rows that bench/on_gpu.sh is to make, whether or not there are any."""
    fixed = {"rows": "16", "dist": "gaussian", "machine": "NVIDIA H200"}
    fixed |= dict.fromkeys(peers.TITLES, "")
    like = results.read(results.FOLDER / "step.csv")[0] | fixed
    beside = {"on_entry": {"mezo": "4.4", "fo-sgd": "1.9"}}
    return [
        like | {"model": model, "length": length, "perturb": mode} | beside.get(mode, {})
        for model in ("opt-1.3b", "opt-13b")
        for length in ("64", "512")
        for mode in gpu.MODES
    ]

"""The reward of `examples/reward.py` by step: ``python -m bench.study.reward``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from types import ModuleType

from zokernels.lab.benchmarks import machine, results

RESULTS = results.FOLDER / "reward.csv"
COLUMNS = (*machine.COLUMNS, "seed", "steps", "step", "generations", "reward")
STEPS, SEEDS = 2000, (0, 1, 2)
# Members a step, and prompts each of them answers.
GENERATIONS = 32 * 32


def example() -> ModuleType:
    """The example, by its file."""
    path = machine.ROOT / "examples" / "reward.py"
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    """Run it from three seeds, and write a row for every hundredth step."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.reward", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    about = {k: v for k, v in machine.about("cpu").items() if k in COLUMNS}
    rows = []
    for seed in SEEDS:

        def told(step: int, reward: float, seed: int = seed) -> None:
            own = dict(seed=seed, steps=options.steps, step=step, generations=step * GENERATIONS)
            rows.append({**about, **own, "reward": f"{reward:.4f}"})

        example().main(options.steps, seed, told)
    results.write(RESULTS, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

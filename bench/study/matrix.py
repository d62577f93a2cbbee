"""Takes a finished sweep's rows into the results: ``python -m bench.study.matrix runs/study``.

Reads what `zokernels sweep bench/study/matrix.yaml` left, of the runs that came to their end, and
writes `results/study.csv` (with ``--into`` another, as for `bench/study/matrix_rates.yaml`).
`make report` makes the tables and figures of docs/study.md from it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from zokernels.lab.benchmarks import machine, results

_LEFT_OUT = ("status", "seconds", "zokernels")


def keep(folder: Path, into: str) -> int:
    """Takes the rows of a sweep into a file of results; 2 if there are none."""
    source = folder / "runs.csv"
    rows = [row for row in results.read(source) if row["status"] == "finished"]
    if not rows:
        print(f"{source} is missing or has no finished run; run the sweep first.", file=sys.stderr)
        return 2
    git = ["git", "log", "-1", "--format=%h,%cs"]
    commit, date = subprocess.check_output(git, cwd=machine.ROOT, text=True).strip().split(",")
    kept = [
        {**{k: v for k, v in r.items() if k not in _LEFT_OUT}, "commit": commit, "date": date}
        for r in rows
    ]
    results.write(results.FOLDER / into, list(kept[0]), kept)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Take the rows of the folder that is named."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    parser.add_argument("--into", default="study.csv", help="file under bench/results, replaced")
    options = parser.parse_args(arguments)
    return keep(options.folder, options.into)


if __name__ == "__main__":
    sys.exit(main())

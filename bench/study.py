"""Takes a finished sweep's rows into the results: ``python -m bench.study runs/study``.

Reads what `zokernels sweep bench/study.yaml` left, of the runs that came to their end, and writes
`results/study.csv`. `zokernels bench report` makes the tables and figures of docs/study.md from it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from zokernels.benchmarks import machine, results

_LEFT_OUT = ("status", "seconds", "zokernels")


def keep(folder: Path) -> int:
    """Takes the rows of a sweep into the results; 2 if there are none."""
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
    results.write(results.FOLDER / "study.csv", list(kept[0]), kept)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    return keep(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    sys.exit(main())

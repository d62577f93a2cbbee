"""Counts what a step of each optimizer costs: ``python -m bench.optimizers``, into optimizers.csv.

`make report` makes the tables of docs/optimizers.md from it. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import astuple, fields
from pathlib import Path

import torch

from bench import costs
from bench.entries import ENTRIES, Entry
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row

RESULTS = results.FOLDER / "optimizers.csv"
QUERIES = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEYS = ("optimizer", "dtype", "queries", "two_sided")
COLUMNS = (*KEYS, *(f"{f.name}{kind}" for f in fields(costs.Cost) for kind in ("", "_theory")))


def count(entries: list[Entry], queries: int = QUERIES) -> list[Row]:
    """One row for each optimizer, type of weights and kind of estimate."""
    rows = []
    for entry in entries:
        for name, dtype in DTYPES.items():
            for two_sided in (True, False):
                pair = (
                    entry.measured(dtype, queries, two_sided),
                    entry.theory(dtype, queries, two_sided),
                )
                values = (x for both in zip(*map(astuple, pair), strict=True) for x in both)
                keys = (entry.name, name, str(queries), str(two_sided))
                rows.append(dict(zip(COLUMNS, (*keys, *map(_text, values)), strict=True)))
    return rows


def _text(number: float) -> str:
    # Two decimals, so that activations and the like do not show.
    return f"{round(number, 2):g}"


def disagreements(rows: list[Row]) -> list[str]:
    """Sentences for what was counted and is not what theory says."""
    found = []
    slacks = {entry.name: entry.slack for entry in ENTRIES}
    for row in rows:
        for field in fields(costs.Cost):
            measured, theory = float(row[field.name]), float(row[f"{field.name}_theory"])
            slack = slacks[row["optimizer"]] if field.name == "temporary" else 0.0
            if abs(measured - theory) > slack:
                found.append(f"{row}: {field.name} is {measured}, theory says {theory}.")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Count and write.

    Returns:
        1 if a count is not what theory says; then nothing is written.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.optimizers", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = count(ENTRIES)
    wrong = disagreements(rows)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not wrong:
        results.write(options.results, COLUMNS, rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Rows of measurements: CSV files under bench/results."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernels.benchmarks import machine

Row = dict[str, str]

PLACE = Path("bench", "results")
# Of the checkout that this file lies in, for the scripts that measure.
FOLDER = machine.ROOT / PLACE


def write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows written to {path}", file=sys.stderr)


def read(path: Path) -> list[Row]:
    """The rows of a file; an absent one has none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def distinct(rows: Sequence[Row], column: str) -> list[str]:
    """The values of a column, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def caption(rows: Sequence[Row]) -> str:
    """Where and when rows were measured, of the columns that they have."""
    forms = {
        "machine": "{}", "threads": "{} threads", "python": "Python {}", "torch": "torch {}",
        "gcc": "gcc {}", "triton": "Triton {}", "spin": "GOMP_SPINCOUNT={}", "commit": "commit {}",
        "date": "{}",
    }  # fmt: skip
    parts = []
    for column, form in forms.items():
        values = distinct(rows, column) if column in rows[0] else []
        if column == "commit" and len(values) > 1:
            form = "commits {}"
        if column == "threads" and values == ["1"]:
            form = "{} thread"
        if values and values != [""]:
            parts.append(form.format(", ".join(values)))
    return "; ".join(parts)

"""Rows of measurements: CSV files under bench/results."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernels.lab.benchmarks import machine
from zokernels.lab.tasks import folder

Row = dict[str, str]

PLACE = Path("bench", "results")
# Of the checkout that this file lies in, for the scripts that measure.
FOLDER = machine.ROOT / PLACE


def write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these rows, whole or not at all, and say so."""
    replace(path, columns, rows)
    print(f"{len(rows)} rows written to {path}", file=sys.stderr)


def replace(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text(path, text.getvalue())


def read(path: Path) -> list[Row]:
    """The rows of a file; an absent one has none.

    Raises:
        ValueError: If it is no CSV, or a row has not the cells of the head.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from None
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has more or fewer cells than the head")
    return rows


def total(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    """The sum of a column of whole numbers."""
    return sum(int(row[column]) for row in rows)


def distinct(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """The values of a column, each once, in their order."""
    return list(dict.fromkeys(str(row[column]) for row in rows))


def caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where and when rows were measured, of the columns that they have."""
    forms = {
        "machine": "{}", "threads": "{} threads", "python": "Python {}", "torch": "torch {}",
        "gcc": "gcc {}", "triton": "Triton {}", "spin": "GOMP_SPINCOUNT={}", "commit": "commit {}",
        "tests": "tests {}", "date": "{}",
    }  # fmt: skip
    parts = []
    for column, form in forms.items():
        values = [v for v in distinct(rows, column) if v] if column in rows[0] else []
        if column == "commit" and len(values) > 1:
            form = "commits {}"
        if column == "threads" and values == ["1"]:
            form = "{} thread"
        if values:
            parts.append(form.format(", ".join(values)))
    return "; ".join(parts)

"""Rows of measurements, in CSV files: those under bench/results, and those of ``--csv``."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from zokernels.lab import files
from zokernels.lab.benchmarks import machine
from zokernels.lab.errors import InputError

Row = dict[str, str]
R = TypeVar("R", bound=Mapping[str, Any])

PLACE = Path("bench", "results")
# Of the checkout that this file lies in, for the scripts that measure.
FOLDER = machine.ROOT / PLACE


def write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these rows, whole or not at all, and say so."""
    replace(path, columns, rows)
    print(f"{len(rows)} rows written to {path}", file=sys.stderr)


def replace(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, _text(columns, rows, head=True))


def check(path: Path, columns: Sequence[str], later: Sequence[str] = ()) -> None:
    """Raise before anything is measured, if the rows could not be appended.

    Args:
        path: The file that ``--csv`` names; it may be absent or empty.
        columns: Of the rows.
        later: Those of them that a file of an earlier version may lack.

    Raises:
        InputError: If it is no CSV of these columns, or has nowhere to be.
    """
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"--csv {path} is no ordinary file; name one, or a new one.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--csv {path}: its folder does not exist; make it first.")
    if not path.exists():
        return
    head, _ = given("--csv", path)
    wanted = [c for c in columns if c in head or c not in later]
    if head and head != wanted:
        raise InputError(
            f"--csv {path} has other columns than these rows; name a new file, or one that "
            "this command wrote."
        )


def append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file that `check` let pass.

    One that lacks columns is replaced, whole or not at all; they are empty in its earlier rows.
    """
    head, earlier = given("--csv", path) if path.exists() else ([], [])
    if head != list(columns):
        files.write_text(path, _text(columns, [*earlier, *rows], head=True))
        return
    with path.open("r+", newline="", encoding="utf-8") as file:
        ended = file.read().endswith("\n")
        file.write(("" if ended else "\n") + _text(columns, rows, head=False))


def read(path: Path) -> list[Row]:
    """The rows of a file; an absent one has none.

    Raises:
        ValueError: If it is no CSV, or a row has not the cells of the head.
    """
    _, rows = _read(path) if path.exists() else ([], [])
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has more or fewer cells than the head")
    return rows


def given(option: str, path: Path) -> tuple[list[str], list[Row]]:
    """The head and the rows of a file that an option names.

    Raises:
        InputError: If it can't be read.
    """
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path} cannot be read: {error}; name another file.") from None


def _read(path: Path) -> tuple[list[str], list[Row]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from None


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], head: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if head:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def total(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    """The sum of a column of whole numbers."""
    return sum(int(row[column]) for row in rows)


def distinct(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """The values of a column, each once, in their order."""
    return list(dict.fromkeys(str(row[column]) for row in rows))


def grouped(rows: Sequence[R], *columns: str) -> dict[tuple[str, ...], list[R]]:
    """The rows of each value of some columns, in the values' order."""
    found: dict[tuple[str, ...], list[R]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[column]) for column in columns), []).append(row)
    return found


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

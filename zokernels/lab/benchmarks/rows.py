"""Appending rows to a CSV file of one set of columns, also to one that an earlier version began."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernels.lab.tasks import folder
from zokernels.lab.tasks.errors import InputError


def check(path: Path, columns: Sequence[str], later: Sequence[str] = ()) -> None:
    """Raise before anything is measured, if the rows could not be appended.

    Args:
        path: The file; it may be absent or empty.
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
    head, _ = _read(path)
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
    head, earlier = _read(path) if path.exists() else ([], [])
    fits = head == list(columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if not fits:
        writer.writeheader()
        writer.writerows(earlier)
    writer.writerows(rows)
    if not fits:
        folder.write_text(path, text.getvalue())
        return
    with path.open("r+", newline="", encoding="utf-8") as file:
        ended = file.read().endswith("\n")
        file.write(text.getvalue() if ended else "\n" + text.getvalue())


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--csv {path} cannot be read: {error}; name another file.") from None

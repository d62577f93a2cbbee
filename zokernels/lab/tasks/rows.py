"""Rows of the files that data sets are published in: tsv, csv, jsonl, json and parquet.

Each reader yields where a row stands, for an error about it, and its columns by name.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from zokernels.lab.errors import InputError, cut, shown
from zokernels.lab.tasks.task import Example, Row, Task, column_name

Located = tuple[str, Row]


def read(task: Task, path: Path, columns: Mapping[str, str] | None = None) -> list[Example]:
    """A task's examples from a file, whose ending says its form.

    Args:
        task: What the rows are of.
        path: The file.
        columns: Of names that the task has, the file's own.

    Raises:
        InputError: Naming the file and the line of the first row that cannot be used.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} must end in {', '.join(READERS)}, which says its form.")
    return gathered(task, reader(task, path, columns or {}), str(path), columns)


def gathered(
    task: Task, found: Iterable[Located], source: str, columns: Mapping[str, str] | None = None
) -> list[Example]:
    """A task's examples from rows that are read.

    Raises:
        InputError: As `read`, or if there is none.
    """
    made = [
        example
        for where, row in found
        for example in task.read(_renamed(row, columns or {}, where), where)
    ]
    if not made:
        raise InputError(f"{source} has no rows; each must have {', '.join(task.columns)}.")
    return made


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """The row with the task's names beside its own."""
    for name, own in columns.items():
        if own not in row:
            raise InputError(
                f"{where}: there is no column '{own}', which --columns takes for {name}; it has "
                f"{cut(', '.join(map(str, row)))}."
            )
    return {**row, **{name: row[own] for name, own in columns.items()}} if columns else row


def _text(path: Path) -> str:
    try:
        # Spreadsheets begin a file with a mark of its order of bytes.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise InputError(f"{path} could not be read: {error.strerror}.") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines: a sentence may hold the odd characters at which that breaks.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line := line.removesuffix("\r"):
            yield number, line


def _tsv(task: Task, path: Path, columns: Mapping[str, str]) -> Iterator[Located]:
    """Tab-separated columns without quoting; the first line may name them."""
    plain = task.columns
    names: Sequence[str] = plain
    for number, line in _lines(path):
        values = line.split("\t")
        if number == 1 and _is_header(values, task, columns):
            names = _check_names(values, f"{path}, line 1")
            continue
        # Rows of SNLI and MNLI carry one label for each annotator, and the agreed one last.
        if len(values) > len(names) and "label1" in names and names[-1] == "gold_label":
            values = [*values[: len(names) - 1], values[-1]]
        if len(values) != len(names):
            raise InputError(
                f"{path}, line {number}: expected {'<TAB>'.join(names)}, got {len(values) - 1} "
                f"tabs; a row has exactly {'one' if len(names) == 2 else len(names) - 1}."
            )
        yield f"{path}, line {number}", dict(zip(names, values, strict=True))


def _csv(task: Task, path: Path, columns: Mapping[str, str]) -> Iterator[Located]:
    """Comma-separated columns with quotes: named in the first line, or the label and the texts."""
    names: Sequence[str] = [*task.columns[-1:], *task.columns[:-1]]
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    begun = False
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path}, line {reader.line_num}: this is not CSV ({error})."
            ) from None
        if not values:
            continue
        if not begun:
            begun = True
            if _is_header(values, task, columns):
                names = _check_names(values, f"{path}, line {reader.line_num}")
                continue
        if len(values) != len(names):
            raise InputError(
                f"{path}, line {reader.line_num}: expected {','.join(names)}, got {len(values)} "
                f"columns; a row has exactly {len(names)}."
            )
        yield f"{path}, line {reader.line_num}", dict(zip(names, values, strict=True))


def _check_names(names: Sequence[str], where: str) -> Sequence[str]:
    """The names of columns, each of them once; spreadsheets leave some empty."""
    for name, count in Counter(names).items():
        if count > 1 and name.strip():
            raise InputError(
                f"{where}: the column {shown(name)} is there {count} times; rename or remove all "
                "but one."
            )
    return names


def _is_header(values: Sequence[str], task: Task, columns: Mapping[str, str]) -> bool:
    """Whether a first line names the columns: of one's own data it always does."""
    own = [columns.get(name, name) for name in task.columns]
    return task.hub is None or all(column_name(values, name) for name in own)


def _jsonl(task: Task, path: Path, columns: Mapping[str, str]) -> Iterator[Located]:
    """An object a line."""
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: this is not JSON ({error}).") from None
        yield where, _object(row, where)


def _json(task: Task, path: Path, columns: Mapping[str, str]) -> Iterator[Located]:
    """An object of objects, or a list of them."""
    try:
        whole = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}).") from None
    if not isinstance(whole, dict | list):
        raise InputError(f"{path} holds neither an object of rows nor a list of rows.")
    if isinstance(whole, dict):
        for name, held in whole.items():
            if isinstance(held, list):
                raise InputError(
                    f"{path}: the rows must be a list at the top, [{{...}}, {{...}}], and this is "
                    f"an object whose {shown(name)} holds a list; make the rows all of the file."
                )
    for name, row in whole.items() if isinstance(whole, dict) else enumerate(whole):
        where = f"{path}, row {name}"
        yield where, _object(row, where)


def _parquet(task: Task, path: Path, columns: Mapping[str, str]) -> Iterator[Located]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{path} needs pyarrow, which is missing: pip install pyarrow.") from None
    try:
        found = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} could not be read as Parquet: {reason}") from None
    for number, row in enumerate(found):
        yield f"{path}, row {number}", row


def _object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be an object with named columns, got {shown(row)}.")
    return row


Reader = Callable[[Task, Path, Mapping[str, str]], Iterator[Located]]
READERS: dict[str, Reader] = {
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".json": _json,
    ".parquet": _parquet,
}

"""Where a task's examples come from, and which of them are for what.

In this order: the file, folder or data set given, or that a task's description names; the folder
in ``ZOKERNELS_DATA``; the published set on the hub (its local cache first, then one short try); and
the small set that the package ships for some tasks.
"""

import os
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zokernels.lab import hub
from zokernels.lab.errors import InputError
from zokernels.lab.tasks import datasets, rows
from zokernels.lab.tasks.task import Example, Hub, Task

VARIABLE = "ZOKERNELS_DATA"
_SHIPPED = Path(__file__).resolve().parent.parent / "data"
_HELD_OUT = 10
_REPORTED = ("test", "dev", "val", "validation", "dev_matched")
_STEMS = ("train", "train_rest", *_REPORTED)


@dataclass(frozen=True)
class Splits:
    """A task's data.

    Attributes:
        train: What the optimizer sees.
        valid: What picks anything that is picked.
        dev: What is reported, and never picks.
        source: Where it came from, in words.
        notes: What to know about it, a sentence each.
    """

    train: list[Example]
    valid: list[Example]
    dev: list[Example]
    source: str
    notes: list[str] = field(default_factory=list)


def load(
    task: Task,
    data: str | os.PathLike[str] | None = None,
    eval_data: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """The task's splits from the first place that has them.

    Args:
        task: Which task.
        data: A file, a data folder, or a data set's name as `datasets.load_dataset` takes it; None
            looks at what the task's description says, ``ZOKERNELS_DATA``, the hub and the shipped
            set.
        eval_data: What is reported, a file or a data set; None: what stands beside ``data``, or
            a tenth of it.
        columns: Of names that the task has, those in the data.

    Raises:
        InputError: If what was named lacks the data, a row is malformed, or no place has the task.
    """
    if data is None:
        columns = columns or task.places.get("columns")
    data, eval_data = _named_places(task, data, eval_data)
    if data is not None:
        reported = None if eval_data is None else os.fspath(eval_data)
        return _named(task, os.fspath(data), reported, columns, "--data")
    if eval_data is not None:
        raise InputError(f"--eval-data {eval_data} needs --data, what to train on; add it.")
    if variable := os.environ.get(VARIABLE, "").strip():
        return _named(task, variable, None, columns, VARIABLE)
    if task.hub is None:
        raise InputError(
            f"There is no data for {task.name}: pass --data with a file, a folder or the name of a "
            "data set on the hub."
        )
    if columns:
        raise InputError("--columns names those of --data, which is not given; add it.")
    splits, reason = _from_hub(task, task.hub)
    if splits is not None:
        return splits
    note = f"The hub's {task.hub.repo} was not used: {reason}."
    if task.shipped is None:
        raise InputError(
            f"There is no data for {task.name}: {note} Pass --data FOLDER or set {VARIABLE}; "
            "docs/tasks.md says what it holds."
        )
    source = f"{task.shipped}, the small set that zokernels ships"
    return _read_splits(task, _SHIPPED / task.shipped, source, [note])


def places(
    task: Task,
    data: str | os.PathLike[str] | None = None,
    eval_data: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """The files that `load` reads of what is named, those of a folder each."""
    named = [p for p in _named_places(task, data, eval_data) if p is not None]
    if not named and (variable := os.environ.get(VARIABLE, "").strip()):
        named = [variable]
    found: list[Path] = []
    for place in map(Path, named):
        folders = [p for p in {place, place / task.folder} if p.is_dir()]
        for folder in folders:
            own = [p for p in folder.iterdir() if p.suffix in rows.READERS]
            known = {task.train_file, *_STEMS}
            found += [p for p in own if len(own) == 1 or p.stem in known]
        found += [] if folders else [place]
    return found


def _named_places(task: Task, data: Any, eval_data: Any) -> tuple[Any, Any]:
    """What is named, or else what the task's description names."""
    if data is not None:
        return data, eval_data
    return task.places.get("data"), eval_data or task.places.get("eval_data")


def _named(
    task: Task, data: str, eval_data: str | None, columns: Mapping[str, str] | None, named_by: str
) -> Splits:
    place = Path(data)
    if named_by == VARIABLE and not place.is_dir():
        raise InputError(f"{VARIABLE} names {data}, which is not a folder.")
    if place.is_dir() and eval_data is not None:
        raise InputError(
            f"{named_by} {data} is a folder, which has what is reported; leave out --eval-data, or "
            "name a file."
        )
    if place.is_dir():
        return _from_folder(task, place, named_by, columns)
    if place.exists():
        whole, reported = rows.read(task, place, columns), None
    else:
        whole, reported = datasets.load(task, data, columns, named_by, eval_data is None)
    source = data
    if eval_data is not None:
        other = Path(eval_data)
        if other.is_dir():
            raise InputError(f"--eval-data {eval_data} is a folder; name a file.")
        found = (
            rows.read(task, other, columns)
            if other.exists()
            else datasets.load(task, eval_data, columns, "--eval-data", False)[0]
        )
        return Splits(*_hold_out(whole), found, f"{source} and {eval_data}")
    if reported is not None:
        return Splits(*_hold_out(whole), reported, source)
    if len(whole) < 3 * _HELD_OUT // 2:
        raise InputError(
            f"{named_by} {data} has {len(whole)} examples, too few to set a tenth aside; give "
            "--eval-data, what is reported."
        )
    rest, reported = _hold_out(whole)
    note = f"No data to report on was named, so a tenth of {data} is set aside for it."
    return Splits(*_hold_out(rest), reported, source, [note])


def rows_of(
    task: Task, source: str, columns: Mapping[str, str] | None, labelled: bool = True
) -> list[Example]:
    """All rows of a file, or of a split of a data set.

    Args:
        task: What they are rows of.
        source: A file, or NAME:CONFIG@SPLIT.
        columns: Of names that the task has, those in the data.
        labelled: Whether they have their answers.

    Raises:
        InputError: If there is no such file or data set, or a row is malformed.
    """
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; name the file in it.")
    asked = task if labelled else task.unlabelled()
    if path.exists():
        return rows.read(asked, path, columns)
    return datasets.load(asked, source, columns, "the data", False)[0]


def parsed(columns: str | None) -> dict[str, str]:
    """What ``--columns`` says, by the task's names.

    Raises:
        InputError: If it has another form.
    """
    pairs = [pair.partition("=") for pair in columns.split(",")] if columns else []
    if not all(name.strip() and own.strip() for name, _, own in pairs):
        raise InputError(f"--columns must have the form NAME=COLUMN,NAME=COLUMN, got '{columns}'.")
    return {name.strip(): own.strip() for name, _, own in pairs}


def by_words(examples: Sequence[Example], least: int | None, most: int | None) -> list[Example]:
    """The examples whose main text has ``least`` to ``most`` words, split at blanks."""
    low, high = least or 0, most if most is not None else float("inf")
    return [e for e in examples if low <= len(e.sentence.split()) <= high]


def part(examples: Sequence[Example], count: int | None) -> list[Example]:
    """``count`` examples, always the same ones; all of them for None."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = sorted(random.Random(0).sample(range(len(examples)), count))
    return [examples[i] for i in chosen]


def few(splits: Splits, shots: int, seed: int) -> Splits:
    """``shots`` examples of each label to train on, and as many others to pick by.

    Args:
        splits: The whole data; what is reported stays whole.
        shots: Examples of each label, in each of the two.
        seed: Fixes the choice.

    Raises:
        InputError: If a label has too few examples.
    """
    pools: dict[int, list[Example]] = defaultdict(list)
    for example in splits.train:
        pools[example.label].append(example)
    source = random.Random(seed)
    train: list[Example] = []
    valid: list[Example] = []
    for label, pool in sorted(pools.items()):
        if len(pool) < 2 * shots:
            has = f"of each label, but label {label} has" if len(pools) > 1 else "and there are"
            raise InputError(
                f"--shots {shots} needs {2 * shots} training examples {has} {len(pool)}; lower it."
            )
        chosen = source.sample(pool, 2 * shots)
        train += chosen[:shots]
        valid += chosen[shots:]
    each = " a label" if len(pools) > 1 else ""
    words = f"{splits.source}, {shots} examples{each} by seed {seed}"
    return replace(splits, train=train, valid=valid, source=words)


def _from_folder(
    task: Task, folder: Path, named_by: str, columns: Mapping[str, str] | None
) -> Splits:
    for place in (folder / task.folder, folder) if task.folder else (folder,):
        if place.is_dir() and _has_splits(task, place):
            source = f"{task.folder or task.name} from {place}"
            return _read_splits(task, place, source, [], columns)
    wanted = "train.tsv and dev.tsv (or .jsonl, .csv, .json, .parquet)"
    where = f"neither it nor its {task.folder} folder holds" if task.folder else "it does not hold"
    raise InputError(f"{named_by} names {folder}, but {where} {wanted}.")


def _has_splits(task: Task, place: Path) -> bool:
    if _file(place, task.train_file, "train") and _reported(place):
        return True
    return task.cut is not None and _only_file(place) is not None


def _file(place: Path, *names: str) -> Path | None:
    paths = [place / f"{name}{ending}" for name in names for ending in rows.READERS]
    return next((path for path in paths if path.is_file()), None)


def _reported(place: Path) -> Path | None:
    return _file(place, *_REPORTED)


def _only_file(place: Path) -> Path | None:
    found = [p for p in place.iterdir() if p.suffix in rows.READERS]
    return found[0] if len(found) == 1 else None


def _read_splits(
    task: Task,
    place: Path,
    source: str,
    notes: list[str],
    columns: Mapping[str, str] | None = None,
) -> Splits:
    train, dev = _file(place, task.train_file, "train"), _reported(place)
    if train is None or dev is None:
        return _cut(task, place, source, columns)
    examples, reported = (rows.read(task, path, columns) for path in (train, dev))
    # Where there is a test file, the one beside it is there to pick by.
    picks = _file(
        place, "train_rest", *(("dev", "val", "validation") if dev.stem == "test" else ())
    )
    kept = _hold_out(examples) if picks is None else (examples, rows.read(task, picks, columns))
    return Splits(*kept, reported, source, notes)


def _cut(task: Task, place: Path, source: str, columns: Mapping[str, str] | None) -> Splits:
    """Three parts of the only file, in its order, so that anyone can repeat it."""
    path = _only_file(place)
    assert path is not None and task.cut is not None
    whole, (first, second) = rows.read(task, path, columns), task.cut
    if len(whole) <= first + second:
        raise InputError(
            f"{path} has {len(whole)} rows, but {first} are for training and {second} for picking, "
            "and the rest is reported; give separate train and dev files."
        )
    note = (
        f"Only {path.name} is there: its first {first} rows train, the next {second} pick, and the "
        f"other {len(whole) - first - second} are reported, so results do not compare with others'."
    )
    end = first + second
    return Splits(whole[:first], whole[first:end], whole[end:], f"{source} (cut)", [note])


def _hold_out(train: list[Example]) -> tuple[list[Example], list[Example]]:
    """Every tenth row of train set aside, by an order that no seed changes."""
    order = list(range(len(train)))
    random.Random(0).shuffle(order)
    held = set(order[: len(train) // _HELD_OUT])
    kept = [e for i, e in enumerate(train) if i not in held]
    return kept, [train[i] for i in sorted(held)]


def _from_hub(task: Task, place: Hub) -> tuple[Splits | None, str]:
    try:
        fetch = hub.fetcher(place.repo, place.revision)
    except ImportError as error:
        return None, f"{error.name} is not installed (pip install 'zokernels[hf]')"

    def split(name: str, cached: bool) -> list[Example]:
        path = fetch(place.file(name), cached)
        return rows.read(task if place.labels is None else replace(task, labels=place.labels), path)

    reason = ""
    for cached in (True, False):
        if not cached and (why := hub.unreachable()):
            return None, why
        # The client's failures have no common base class, and any of them means the next place.
        try:
            train, dev = split(place.train, cached), split(place.dev, cached)
            valid = split(place.valid, cached) if place.valid else None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        else:
            source = f"{task.folder} from the hub's {place.repo}"
            kept = _hold_out(train) if valid is None else (train, valid)
            return Splits(*kept, dev, source), ""
    return None, reason

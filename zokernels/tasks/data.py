"""Where a task's sentences come from, read strictly.

In this order: the folder given, the folder in ``ZOKERNELS_DATA``, the hub (its local cache first,
then one short try), and the small set that the package ships.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zokernels.tasks import hub
from zokernels.tasks.errors import InputError
from zokernels.tasks.sst2 import Example, Task

VARIABLE = "ZOKERNELS_DATA"
_SHIPPED = Path(__file__).resolve().parent.parent / "data"
_HELD_OUT = 10


@dataclass(frozen=True)
class Splits:
    """A task's data.

    Attributes:
        train: What the optimizer sees.
        valid: What picks anything that is picked.
        dev: What is reported, and never picks.
        source: Where it came from, in words.
        notes: Why an earlier place was not used, a sentence each.
    """

    train: list[Example]
    valid: list[Example]
    dev: list[Example]
    source: str
    notes: list[str] = field(default_factory=list)


def load(task: Task, folder: str | os.PathLike[str] | None = None) -> Splits:
    """The task's splits from the first place that has them.

    Args:
        task: Which task.
        folder: A data folder; None looks at ``ZOKERNELS_DATA``, the hub and the shipped set.

    Raises:
        InputError: If a folder was named and lacks the files, or a row is malformed.
    """
    named = os.fspath(folder) if folder is not None else os.environ.get(VARIABLE, "").strip()
    if named:
        return _from_folder(task, Path(named), "--data" if folder is not None else VARIABLE)
    splits, reason = _from_hub(task)
    if splits is not None:
        return splits
    note = f"The hub's {task.hub} was not used: {reason}."
    source = f"{task.shipped}, the small set that zokernels ships"
    return _read_splits(_SHIPPED / task.shipped, source, [note])


def read_tsv(path: Path, classes: int = 2) -> list[Example]:
    """The rows of a ``sentence<TAB>label`` file, whose header line is optional.

    Raises:
        InputError: Naming the file and the line of the first row that cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise InputError(f"{path} could not be read: {error.strerror}.") from None
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line == "sentence\tlabel"):
            continue
        examples.append(_parse(line, f"{path}, line {number}", classes))
    if not examples:
        raise InputError(f"{path} has no rows; each line must be sentence<TAB>label.")
    return examples


def by_words(examples: Sequence[Example], least: int | None, most: int | None) -> list[Example]:
    """The examples whose sentences have ``least`` to ``most`` words, split at blanks."""
    low, high = least or 0, most if most is not None else float("inf")
    return [e for e in examples if low <= len(e.sentence.split()) <= high]


def part(examples: Sequence[Example], count: int | None) -> list[Example]:
    """``count`` examples, always the same ones; all of them for None."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = sorted(random.Random(0).sample(range(len(examples)), count))
    return [examples[i] for i in chosen]


def _parse(line: str, where: str, classes: int) -> Example:
    fields = line.split("\t")
    if len(fields) != 2:
        raise InputError(
            f"{where}: expected sentence<TAB>label, got {len(fields) - 1} tabs; "
            "a row has exactly one."
        )
    sentence, label = fields
    if label not in {str(c) for c in range(classes)}:
        allowed = " or ".join(str(c) for c in range(classes))
        raise InputError(f"{where}: the label must be {allowed}, got '{label}'.")
    if not sentence.strip():
        raise InputError(f"{where}: the sentence is empty; give it words or remove the row.")
    return Example(sentence, int(label))


def _from_folder(task: Task, folder: Path, named_by: str) -> Splits:
    if not folder.is_dir():
        raise InputError(f"{named_by} names {folder}, which is not a folder.")
    for place in (folder / task.folder, folder):
        if (place / "train.tsv").is_file() and (place / "dev.tsv").is_file():
            return _read_splits(place, f"{task.folder} from {place}", [])
    raise InputError(
        f"{named_by} names {folder}, but neither it nor its {task.folder} folder holds "
        "train.tsv and dev.tsv."
    )


def _read_splits(place: Path, source: str, notes: list[str]) -> Splits:
    train = read_tsv(place / "train.tsv")
    dev = read_tsv(place / "dev.tsv")
    rest = place / "train_rest.tsv"
    if rest.is_file():
        return Splits(train, read_tsv(rest), dev, source, notes)
    return Splits(*_hold_out(train), dev, source, notes)


def _hold_out(train: list[Example]) -> tuple[list[Example], list[Example]]:
    """Every tenth row of train set aside, by an order that no seed changes."""
    order = list(range(len(train)))
    random.Random(0).shuffle(order)
    held = set(order[: len(train) // _HELD_OUT])
    kept = [e for i, e in enumerate(train) if i not in held]
    return kept, [train[i] for i in sorted(held)]


def _from_hub(task: Task) -> tuple[Splits | None, str]:
    try:
        import pyarrow.parquet as parquet
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        return None, f"{error.name} is not installed (pip install 'zokernels[hf]')"

    def split(name: str, cached: bool) -> list[Example]:
        path = hf_hub_download(
            task.hub,
            f"data/{name}-00000-of-00001.parquet",
            repo_type="dataset",
            local_files_only=cached,
        )
        table = parquet.read_table(path, columns=["sentence", "label"]).to_pydict()
        return [Example(s, int(c)) for s, c in zip(table["sentence"], table["label"], strict=True)]

    reason = ""
    for cached in (True, False):
        if not cached and (why := hub.unreachable()):
            return None, why
        # The client's failures have no common base class, and any of them means the next place.
        try:
            train, dev = split("train", cached), split("validation", cached)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        else:
            return Splits(*_hold_out(train), dev, f"{task.folder} from the hub's {task.hub}"), ""
    return None, reason

"""Data sets by their names on the hub, or wherever else `datasets.load_dataset` finds them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zokernels.lab import hub
from zokernels.lab.errors import InputError
from zokernels.lab.tasks import rows
from zokernels.lab.tasks.task import Example, Task

# NAME, NAME:CONFIG, NAME@SPLIT: "nyu-mll/glue:sst2@train[:1000]".
_FORM = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@]+))?(@(?P<split>.+))?")
_REPORTED = ("test", "validation", "dev")


def load(
    task: Task,
    address: str,
    columns: Mapping[str, str] | None,
    named_by: str,
    with_reported: bool,
) -> tuple[list[Example], list[Example] | None]:
    """A split's examples, by default those to train on; and those to report on if it has them.

    Args:
        task: What the rows are of.
        address: NAME, with :CONFIG and @SPLIT where they are needed.
        columns: Of names that the task has, the data set's own.
        named_by: The option, for errors.
        with_reported: Look for a split to report on.

    Raises:
        InputError: If there is no such file, folder or data set, or a row is malformed.
    """
    found = _FORM.fullmatch(address)
    if found is None or address.endswith(tuple(rows.READERS)):
        raise InputError(
            f"{named_by} {address}: there is no such file or folder, and the name of a data set "
            "has the form NAME, NAME:CONFIG or NAME@SPLIT."
        )
    try:
        # A module of its own name; absent without the extra.
        import datasets as library  # type: ignore[import-untyped]
    except ImportError:
        raise InputError(
            f"{named_by} {address} is no file here, and a data set by name needs the package "
            "datasets: pip install 'zokernels[hf]'."
        ) from None
    name, config, split = found["name"], found["config"], found["split"]
    offline, before = hub.unreachable(), library.config.HF_HUB_OFFLINE
    try:
        # Without it the library tries for 23 s before it looks at what it has.
        library.config.HF_HUB_OFFLINE = before or offline is not None
        whole = library.load_dataset(name, config, split=split)
    # The library has no common base class of its failures.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        why = f" ({offline})" if offline else ""
        raise InputError(
            f"{named_by} {address} is neither a file or folder here nor a data set that could be "
            f"loaded{why}: {reason}."
        ) from None
    finally:
        library.config.HF_HUB_OFFLINE = before
    if split is not None:
        return _examples(task, whole, address, columns), None
    if "train" not in whole:
        raise InputError(
            f"{named_by} {address} has no split train but {', '.join(whole)}; name one: "
            f"{address}@SPLIT."
        )
    train = _examples(task, whole["train"], f"{address}@train", columns)
    reported = next((s for s in _REPORTED if with_reported and s in whole), None)
    if reported is None:
        return train, None
    return train, _examples(task, whole[reported], f"{address}@{reported}", columns)


def _examples(
    task: Task, split: Any, source: str, columns: Mapping[str, str] | None
) -> list[Example]:
    def located() -> Iterator[rows.Located]:
        for number, row in enumerate(split):
            yield f"{source}, row {number}", row

    return rows.gathered(task, located(), source, columns)

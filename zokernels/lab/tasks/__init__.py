"""Tasks: their data, their prompts and what counts as an answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zokernels.lab.errors import InputError
from zokernels.lab.tasks import description
from zokernels.lab.tasks.answers import DROP, SQUAD
from zokernels.lab.tasks.choices import COPA, RECORD, WINOGRANDE
from zokernels.lab.tasks.completion import COMPLETION
from zokernels.lab.tasks.pairs import BOOLQ, CB, MNLI, MULTIRC, RTE, SNLI, WIC, WSC
from zokernels.lab.tasks.sentences import SST2, SST5, TREC
from zokernels.lab.tasks.task import Example, Task

_ROWS = [SST2, SST5, TREC, RTE, CB, BOOLQ, WIC, WSC, MULTIRC, COPA, WINOGRANDE, RECORD]
_ROWS += [SNLI, MNLI, SQUAD, DROP, COMPLETION]
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}

__all__ = ["COMPLETION", "SST2", "TASKS", "Example", "Task", "get_task"]


def get_task(name: str, described: Mapping[str, Any] | None = None) -> Task:
    """The task called ``name``, or described by the file of that name.

    Args:
        name: A name of the table, or a path that ends in .yaml or .yml.
        described: What that file said when it was read, by `description.read`.

    Raises:
        InputError: If there is none, or its description cannot be used.
    """
    if described is not None:
        return description.task(described)
    if name.endswith(description.ENDINGS):
        return description.task(description.read(Path(name)))
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(
            f"There is no task '{name}'; the tasks are: {', '.join(TASKS)}, and files that end in "
            f"{' or '.join(description.ENDINGS)} describe others."
        ) from None

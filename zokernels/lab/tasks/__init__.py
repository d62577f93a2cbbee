"""Tasks: their data, their prompts and what counts as an answer."""

from zokernels.lab.errors import InputError
from zokernels.lab.tasks.answers import DROP, SQUAD
from zokernels.lab.tasks.choices import COPA, RECORD, WINOGRANDE
from zokernels.lab.tasks.pairs import BOOLQ, CB, MNLI, MULTIRC, RTE, SNLI, WIC, WSC
from zokernels.lab.tasks.sentences import SST2, SST5, TREC
from zokernels.lab.tasks.task import Example, Task

_ROWS = [SST2, SST5, TREC, RTE, CB, BOOLQ, WIC, WSC, MULTIRC, COPA, WINOGRANDE, RECORD]
_ROWS += [SNLI, MNLI, SQUAD, DROP]
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}

__all__ = ["SST2", "TASKS", "Example", "Task", "get_task"]


def get_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        InputError: If there is none.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"There is no task '{name}'; the tasks are: {', '.join(TASKS)}.") from None

"""Fine-tuning tasks: data, prompts, scoring, and the run that joins them.

Importing this package imports no transformers; a model is loaded only when a run asks for one.
"""

from zokernels.tasks.errors import InputError, RunError
from zokernels.tasks.sst2 import SST2, Task

TASKS: dict[str, Task] = {"sst2": SST2}

__all__ = ["TASKS", "InputError", "RunError", "Task", "get_task"]


def get_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        InputError: If there is none.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(
            f"There is no task '{name}'; the tasks are: {', '.join(sorted(TASKS))}."
        ) from None

"""A run as data: what it was told, what it works with, and how far it has come.

What is done with it stands in modules that take it: `prepare`, `train`, `evaluate`, `checkpoint`,
`resume`, `report`. `run` calls them in their order.
"""

import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from zokernels.lab.runs.folder import Elsewhere, RunFolder
from zokernels.lab.runs.history import History, Watcher
from zokernels.lab.runs.learner import Learner
from zokernels.lab.runs.processes import Processes
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.trackers import Trackers
from zokernels.lab.scoring import Scorer
from zokernels.lab.tasks.data import Splits
from zokernels.lab.tasks.task import Example, Task


@dataclass(eq=False)
class Run:
    """A run.

    Attributes:
        settings: What to do.
        watcher: Whom to tell.
        command: The command line, for the report.
        resume: Go on with the run in the folder ``settings.out``, where it was left.
        history: What was measured.
        stopped: Set to stop the run between two steps.
        started: When the run began, less the seconds of the steps that an earlier process did.
        done: Steps done.
        failure: Why training ended before its last step.
        best: The best accuracy on valid, its step, and the weights of that step.
        task: The task, and the attributes below: what `prepare` makes by the settings.
        pool: The training examples.
        splits: All examples.
        learner: The model in training.
        scorer: Makes batches and losses of examples.
        optimizer: Of the learner's parameters.
        out: The run folder.
        trackers: Who is told the run's numbers besides.
        processes: Those of which this is one.
    """

    settings: Settings
    watcher: Watcher = field(default_factory=Watcher)
    command: str = ""
    resume: bool = False
    history: History = field(default_factory=History)
    stopped: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.perf_counter)
    done: int = 0
    failure: str | None = None
    best: tuple[float, int, list[torch.Tensor]] | None = None
    task: Task = field(init=False)
    splits: Splits = field(init=False)
    pool: Sequence[Example] = field(init=False)
    learner: Learner = field(init=False)
    scorer: Scorer = field(init=False)
    optimizer: Any = field(init=False)
    out: RunFolder | Elsewhere = field(init=False)
    trackers: Trackers = field(init=False)
    processes: Processes = field(default_factory=Processes)

    def record(self, line: dict[str, Any]) -> None:
        """Writes a line of the run's log, and tells the trackers."""
        self.out.log(line)
        self.trackers.log(line)

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of the training examples, in their order."""
        return zlib.crc32("\n".join(map(repr, self.pool)).encode())

    @property
    def examples(self) -> str:
        """What the task's examples are called."""
        return "sentences" if self.task.fields == ("sentence",) else "examples"

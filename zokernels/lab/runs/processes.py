"""Several processes of one run, as torchrun and accelerate start them.

Each has the whole model and the same data. A step's batch, or its directions, are shared out by the
optimizer's `zk.Distributed`, evaluations here; the first process writes the run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import zokernels as zk
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.runs.history import Mean
from zokernels.lab.runs.optimizers import FIRST_ORDER, HYBRID, key
from zokernels.lab.runs.settings import Settings, option

T = TypeVar("T")
_FORM = re.compile(r"(\d+),(\d+)")


def launched() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this one writes and speaks."""
    return launched() == 1 or int(os.environ["RANK"]) == 0


class Processes:
    """Those of a run, of which this is one.

    Attributes:
        parallel: How a step is divided; None for one process.
        ranks: How many there are.
        rank: Which this is.
        shard: Whether each holds a part of the weights, so that all run every forward together.
    """

    def __init__(self, parallel: zk.Distributed | None = None, shard: bool = False) -> None:
        self.parallel = parallel
        self.shard = shard
        self.ranks = parallel.ranks if parallel else 1
        self.rank = parallel.rank if parallel else 0

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def batch(self, examples: Sequence[T]) -> Sequence[T]:
        """This process's share of a batch."""
        if self.parallel is None:
            return examples
        return examples[self.parallel.data_rank :: self.parallel.data]

    def share(self, examples: Sequence[T]) -> Sequence[T]:
        """This process's share of what is evaluated."""
        return examples if self.shard else examples[self.rank :: self.ranks]

    def mean(self, own: Mean | None) -> Mean:
        """The mean over all shares, in every process the same number."""
        if own is not None and (self.shard or self.ranks == 1):
            return own
        found = [m for m in self._gathered(own) if m is not None]
        count = sum(m.examples for m in found)
        squares = sum((m.value if m.squares is None else m.squares) * m.examples for m in found)
        return Mean(sum(m.value * m.examples for m in found) / count, count, squares / count)

    def any(self, here: bool) -> bool:
        """Whether it is so in any of them, which all of them are told."""
        return any(self._gathered(here))

    def wait(self) -> None:
        """Until all are here."""
        self._gathered(None)

    def together(self, do: Callable[[], T]) -> T:
        """What each does by itself, unless one of them can't: then none goes on.

        Raises:
            InputError, RunError: What one of them had to say.
        """
        error: InputError | RunError | None = None
        try:
            result = do()
        except (InputError, RunError) as found:
            error = found
        for failed in self._gathered(error):
            if failed is not None:
                raise failed
        return result

    def _gathered(self, own: Any) -> list[Any]:
        if self.parallel is None:
            return [own]
        found: list[Any] = [None] * self.ranks
        try:
            dist.all_gather_object(found, own, group=self.parallel.group)
        except RuntimeError as error:
            raise RunError(
                f"Another process of the run ended or does not answer ({str(error).splitlines()[0]}"
                "). What was done is in the run's log: go on with zokernels finetune --resume, in "
                "as many processes as there are."
            ) from None
        return found


@contextmanager
def started(s: Settings) -> Iterator[Processes]:
    """The processes of a run, which end with it.

    Raises:
        InputError: If the settings do not fit several processes, or their number.
    """
    ranks = launched()
    if ranks == 1:
        if s.shard:
            raise InputError(
                "--shard cuts the weights over processes, and there is one; start several with "
                "torchrun -m zokernels finetune, or leave it out."
            )
        if s.parallel not in (None, "data", "1,1"):
            raise InputError(
                f"--parallel {s.parallel} divides a step over processes, and there is one; start "
                "them with torchrun -m zokernels finetune, or leave it out."
            )
        yield Processes()
        return
    _check(s)
    on_gpu = s.device.startswith("cuda")
    if on_gpu:
        s.device = _own_gpu()
        torch.cuda.set_device(s.device)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Processes(_divided(s, ranks), s.shard)
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def _own_gpu() -> str:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1)), torch.cuda.device_count()
    if here > there:
        raise InputError(
            f"Each process takes a GPU of its own; {here} were started on a machine that has "
            f"{there}. Start as many as it has, or give --device cpu."
        )
    return f"cuda:{rank}"


def _divided(s: Settings, ranks: int) -> zk.Distributed:
    how = s.parallel or "data"
    pair = _FORM.fullmatch(how)
    if how not in ("data", "query") and pair is None:
        raise InputError(
            "--parallel must be data, query, or two numbers D,Q for shares of the batch and of the "
            f"directions; got '{how}'."
        )
    data, query = (
        (int(n) for n in pair.groups()) if pair else ((ranks, 1) if how == "data" else (1, ranks))
    )
    if s.shard and query > 1:
        raise InputError(
            "--shard: processes that hold parts of one weight run the same directions; leave out "
            f"--parallel {how}."
        )
    if data * query != ranks:
        raise InputError(
            f"--parallel {how} makes {data * query} processes, and {ranks} were started; make them "
            "the same."
        )
    if s.num_queries % query:
        raise InputError(
            f"--num-queries {s.num_queries} is no multiple of the {query} parts of --parallel "
            f"{how}; make it one."
        )
    if s.batch_size % data:
        raise InputError(
            f"--batch-size {s.batch_size} is no multiple of the {data} shares; make it one."
        )
    return zk.Distributed(data=data, query=query)


def _check(s: Settings) -> None:
    if s.shard and (s.scheme == "probe" or s.load_in or s.merge):
        what = "--merge" if s.merge else f"--load-in {s.load_in}" if s.load_in else "--scheme probe"
        raise InputError(f"--shard and {what} do not go together; leave one out.")
    plain = key(s.optimizer)
    if plain in FIRST_ORDER or plain == HYBRID:
        raise InputError(
            f"--optimizer {s.optimizer} has gradients, which the processes of finetune do not "
            "exchange; run it in one, or use the Trainer."
        )
    for name, instead in (
        ("retry_oom", "a process that halves its share would leave the others waiting"),
        ("auto_lr", "run zokernels tune first, and give --lr the number"),
    ):
        if getattr(s, name):
            shown = "--lr auto" if name == "auto_lr" else option(name)
            raise InputError(f"{shown} is for one process: {instead}.")

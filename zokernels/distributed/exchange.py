"""What processes tell each other, and the error where one of them is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


class Stepping(Protocol):
    """What is asked of an optimizer whose step several processes share."""

    param_groups: list[dict[str, Any]]
    model: nn.Module | None
    timing: Any


class RankError(RuntimeError):
    """A process was lost, failed, or is not where the others are; the message is one sentence."""


class Exchange:
    """The processes of a run, each with its place, and the group that carries their messages.

    Args:
        rank: Of this process in the group.
        ranks: Number of processes.
        data: Processes that share a batch.
        query: Processes that share the directions.
        group: The process group; None for one process.
    """

    def __init__(self, rank: int, ranks: int, data: int, query: int, group: Any):
        self.rank, self.ranks = rank, ranks
        self.data, self.query = data, query
        self.query_rank, self.data_rank = divmod(rank, data)
        self.group = group
        self.bytes_sent = 0

    def __repr__(self) -> str:
        return f"Distributed(data={self.data}, query={self.query}), rank {self.rank}"

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, or the exception that it raises, in every process."""
        if self.ranks == 1:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        try:
            dist.broadcast_object_list(box, group_src=0, group=self.group)
        except RuntimeError as error:
            raise self._lost(None, error) from error
        if box[1] is not None:
            raise box[1]
        return box[0]

    def gather(self, message: torch.Tensor, step: int | None) -> list[list[Any]]:
        """Every process's message, as lists of numbers; ``step`` is for the error."""
        self.bytes_sent += message.numel() * message.element_size()
        found = [torch.empty_like(message) for _ in range(self.ranks)]
        try:
            dist.all_gather(found, message, group=self.group)
        except RuntimeError as error:
            raise self._lost(step, error) from error
        return [row.tolist() for row in found]

    def _lost(self, step: int | None, error: Exception) -> RankError:
        when = "" if step is None else f" at step {step}"
        return RankError(
            f"Rank {self.rank} of {self.ranks} lost another one{when}: a process died, ended "
            "earlier, or did not answer in time. The weights are those of the last update, and a "
            "trajectory holds every step before this one; start again with any number of "
            f"processes and resume. ({str(error).splitlines()[0] if str(error) else error!r})"
        )

    def gather_objects(self, mine: Any) -> list[Any]:
        """Every process's object: for explanations only."""
        found = [None] * self.ranks
        dist.all_gather_object(found, mine, group=self.group)
        return found


def is_started() -> bool:
    """Whether `torch.distributed` connects this process to others."""
    return dist.is_available() and dist.is_initialized()

"""Many processes, one run. All that they tell each other is scalars.

Every process holds the weights, or its part of them, and knows the seeds; so a step is known by its
losses. Each process runs its share of the forwards, the losses are gathered, and every process
makes the same update from them. The mean over the processes that share a batch is taken in one
order, exactly rounded, so that all of them go on with the same bits.

Sources: FedKSeed (Qin et al., ICML 2024) and DeComFL (Li et al., ICLR 2025) for seeds and scalars
as the only traffic; evolution strategies (Salimans et al., 2017) for directions by process.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zokernels.distributed import comparison
from zokernels.distributed.exchange import Exchange, RankError, Stepping, is_started


class Distributed(Exchange):
    """How the processes of a run divide a step: the batch, the directions, or both.

    With ``data=D`` and ``query=Q`` rank r is number r % D of those that share a batch, and runs
    directions of part r // D. The loss is the mean over the D processes of a part, as DDP takes the
    mean of gradients; each part's directions are its share of ``num_queries``.

    Without `torch.distributed` it stands for one process, and does nothing.

    Args:
        data: Processes that share the batch; by default as many as ``query`` leaves.
        query: Processes that share the directions, which ``num_queries`` is a multiple of.
        group: The process group; by default all processes. Scalars go over CPU, so that a dead
            process is noticed at once; where the group has NCCL only, a gloo group is made beside.
        check_every: Steps from one comparison of all weights to the next; 0 for none.
        timeout: Seconds to wait for another process before the run ends; by default the group's.

    Attributes:
        rank: Of this process in the group.
        ranks: Number of processes.
        data_rank: Which share of the batch is this process's, 0 … ``data`` − 1.
        query_rank: Which share of the directions.
        group: The process group that carries the scalars; None for one process.
        bytes_sent: Bytes that this process gave to the others so far.

    Raises:
        ValueError: If the numbers do not make up the processes there are.
        RuntimeError: If several processes were started and `torch.distributed` does not know.

    Example:
        >>> torch.distributed.init_process_group()
        >>> opt = zk.ZOSGD(model, num_queries=4, parallel=zk.Distributed(data=2, query=2))
        >>> sampler = DistributedSampler(data, opt.parallel.data, opt.parallel.data_rank)
    """

    def __init__(
        self,
        data: int | None = None,
        query: int | None = None,
        *,
        group: Any = None,
        check_every: int = 1000,
        timeout: float | None = None,
    ):
        if not isinstance(check_every, int) or check_every < 0:
            raise ValueError(f"check_every is {check_every!r}, but it must be 0 or more steps.")
        if not is_started() and launched() > 1:
            raise RuntimeError(
                f"{launched()} processes were started, but torch.distributed does not know it; "
                "call torch.distributed.init_process_group() before the optimizer is made."
            )
        rank, ranks = 0, 1
        if is_started():
            rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        group = _cpu_group(group, timeout) if ranks > 1 else None
        self._set(rank, ranks, *_layout(data, query, ranks), group, check_every)

    def _set(
        self, rank: int, ranks: int, data: int, query: int, group: Any, check_every: int
    ) -> None:
        super().__init__(rank, ranks, data, query, group)
        self.check_every = check_every
        self._known: weakref.WeakSet = weakref.WeakSet()
        self._sharded = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Distributed:
        """Itself: a copied optimizer speaks to the same processes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For one process only.

        Raises:
            TypeError: If there are several, whose connection no file can hold.
        """
        if self.ranks > 1:
            raise TypeError(
                f"An optimizer that {self.ranks} processes share was to be pickled, but a file "
                "can't hold their connection; save opt.state_dict() and make the optimizer anew, "
                "or give parallel=None."
            )
        return connect, (None,)

    def share(self, seeds: list[int]) -> list[int]:
        """This process's part of a step's directions.

        Raises:
            ValueError: If they cannot be shared out.
        """
        count, rest = divmod(len(seeds), self.query)
        if rest:
            raise ValueError(
                f"num_queries is {len(seeds)}, but {self.query} parts of the processes share the "
                "directions; make it a multiple of that, or give parallel='data'."
            )
        return seeds[self.query_rank * count : (self.query_rank + 1) * count]

    def join(
        self,
        run: Callable[[list[int]], list[float]],
        seeds: list[int],
        optimizer: Stepping,
    ) -> list[list[float]]:
        """The numbers of all directions, of which this process runs its part.

        Args:
            run: Makes the numbers along some of the seeds, at most two a seed or one more than
                there are seeds; all of them also where a loss is not finite.
            seeds: Of all directions.
            optimizer: Whose step it is.

        Returns:
            For each part of the directions, in order, its numbers.

        Raises:
            RankError: If another process is lost, failed, or is at another step.
            ValueError: If the directions cannot be shared out.
        """
        if self.ranks == 1:
            return [run(seeds)]
        mine = self.share(seeds)
        with self._together(optimizer, 2 * len(mine)) as send:
            own = run(mine)
            rows = send(own)
        return [part[: len(own)] for part in self._means(rows)]

    def agreed(self, loss_of: Callable[..., float], optimizer: Stepping) -> Callable[..., float]:
        """``loss_of`` with the mean over the processes that share the batch for its result."""
        if self.ranks == 1:
            return loss_of

        def mean_of(*args: Any) -> float:
            with self._together(optimizer, 1) as send:
                rows = send([loss_of(*args)])
            # All parts have run the same; one of them speaks, lest their last bits differ.
            return self._means(rows)[0][0]

        return mean_of

    def check(self, optimizer: Stepping) -> None:
        """Compare settings and weights with the other processes', if it is time.

        A process compares where its part of the weights has copies: not among the shards of one.

        Raises:
            RankError: Naming the process, and the parameter or the setting that differs.
            ValueError: If processes that share a forward were given different directions.
        """
        number = optimizer.param_groups[0]["step"]
        first = optimizer not in self._known
        if self.ranks > 1 and (first or (self.check_every and number % self.check_every == 0)):
            self._sharded = comparison.has_shards(optimizer)
            comparison.check(self, optimizer, first)
            self._known.add(optimizer)

    @contextlib.contextmanager
    def _together(
        self, optimizer: Stepping, slots: int
    ) -> Iterator[Callable[[list[float]], list[list[float]]]]:
        """Yields what gathers every process's numbers; an exception before it reaches all.

        A message is the step's number, or −1 − that where this process failed, and the numbers.
        """
        step = optimizer.param_groups[0]["step"]
        sent = False

        def send(numbers: list[float]) -> list[list[float]]:
            nonlocal sent
            sent = True
            before = time.perf_counter()
            padding = [math.nan] * (slots - len(numbers))
            message = torch.tensor([float(step), *numbers, *padding], dtype=torch.float64)
            rows = self.gather(message, step)
            optimizer.timing.waiting += time.perf_counter() - before
            self._check_steps([int(row[0]) for row in rows], step)
            return [row[1:] for row in rows]

        try:
            yield send
        except Exception:
            # Others wait for this process's losses; where weights are shared they wait in a
            # forward, and learn it by the end of this process.
            if not sent and not self._sharded:
                message = torch.full((1 + slots,), math.nan, dtype=torch.float64)
                message[0] = -1.0 - step
                with contextlib.suppress(RankError):
                    self.gather(message, step)
            raise

    def _check_steps(self, steps: list[int], step: int) -> None:
        failed = [r for r, s in enumerate(steps) if s < 0]
        if failed:
            raise RankError(
                f"A forward of step {step} failed on {_ranks(failed)} of {self.ranks} and its own "
                "message says why; this process made no update from it."
            )
        if (odd := comparison.odd(steps)) is not None:
            raise RankError(
                f"Rank {odd} is at step {steps[odd]}, but the others are not (ranks in order: "
                f"{steps}); resume all of them from the same file or state."
            )

    def _means(self, rows: list[list[float]]) -> list[list[float]]:
        """Of each part of the directions, the means over the processes that share the batch."""
        return [
            [_mean(numbers) for numbers in zip(*rows[j : j + self.data], strict=True)]
            for j in range(0, self.ranks, self.data)
        ]


def connect(parallel: str | Distributed | None) -> Distributed:
    """What an optimizer's ``parallel`` asks for.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(parallel, Distributed):
        return parallel
    if parallel is None or (parallel == "auto" and not is_started()):
        alone = object.__new__(Distributed)
        alone._set(0, 1, 1, 1, None, 0)
        return alone
    if parallel in ("auto", "data"):
        return Distributed()
    if parallel == "query":
        return Distributed(data=1)
    raise ValueError(
        f"parallel is {parallel!r}, but it must be 'auto', 'data', 'query', None or a "
        "zokernels.Distributed."
    )


def launched() -> int:
    """Processes that torchrun started; 1 without it."""
    started = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ.get("WORLD_SIZE", "1")) if started else 1


def _layout(data: int | None, query: int | None, ranks: int) -> tuple[int, int]:
    for name, value in (("data", data), ("query", query)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}, but it must be at least 1 process.")
    if data is None:
        data = ranks // (query or 1)
    if query is None:
        query = ranks // data if data else 0
    if data * query != ranks:
        raise ValueError(
            f"data={data} times query={query} makes {data * query} processes, but there are "
            f"{ranks}; choose two numbers whose product is {ranks}."
        )
    return data, query


def _cpu_group(group: Any, timeout: float | None) -> Any:
    """The group itself if it takes CPU tensors; else one of the same processes that does."""
    if timeout is None and "cpu:gloo" in dist.get_backend_config(group):
        return group if group is not None else dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    wait = None if timeout is None else timedelta(seconds=timeout)
    return dist.new_group(ranks, wait, backend="gloo", use_local_synchronization=True)


def _mean(numbers: Sequence[float]) -> float:
    """The mean, rounded once: of equal numbers that number, in any order the same bits."""
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return math.fsum(numbers) / len(numbers)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"

"""Clocks, medians with their spread, and whether the machine was quiet."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

C = TypeVar("C", bound=Hashable)

OTHERS = 0.03  # of the CPU time, the most that other processes may have
# Cycles that a CUDA device waits before the clock starts, about a millisecond: what the host then
# takes to launch a pass (0.1 to 0.3 ms) is not timed.
_LEAD = 2_000_000


def clock(run: Callable[[], Any], device: str = "cpu") -> float:
    """The seconds of one call: of the CPU's clock, or of the device's own on a CUDA device.

    There it is the time that the device takes for what the call launches, not the host's.
    """
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(_LEAD)
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize(device: str) -> None:
    """Wait until a CUDA device has done what it was told to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The median and the quartiles; of one value itself, three times."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def turn(groups: Sequence[Sequence[C]], shuffle: random.Random) -> list[C]:
    """One repetition of all cases: the groups in turn, each group's cases in a new order.

    The groups in turn, so that a tensor is not still in the cache from the case before; a new
    order, so that no case always has the same one before it.
    """
    columns = [shuffle.sample(list(group), len(group)) for group in groups]
    longest = max(map(len, columns), default=0)
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


def busy() -> tuple[float, float] | None:
    """Seconds that the CPUs worked for other processes, and seconds they were there (Linux)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    # user nice system idle iowait irq softirq steal; steal is time that the host took.
    ticks = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
    total = sum(ticks) / os.sysconf("SC_CLK_TCK")
    idle = (ticks[3] + ticks[4]) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return total - idle - own.user - own.system, total


def others(before: tuple[float, float] | None, after: tuple[float, float] | None) -> str | None:
    """One sentence where other processes had a share of the CPUs between two calls of `busy`.

    They hide differences: a pass that waits for a CPU takes a time slice, and so does the floor.
    """
    if before is None or after is None:
        return None
    share = (after[0] - before[0]) / max(after[1] - before[1], 1e-9)
    if share <= OTHERS:
        return None
    return (
        f"The machine was not quiet: other processes had {share:.0%} of its CPU time, which draws "
        "all ratios to 1; measure again."
    )

"""The time of a step as a multiple of the two forwards that it can't do without.

Everything is timed in turn within one process, and a ratio is the median over repetitions of a time
over the forwards' time of the same repetition: other load on the machine then meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import zokernels as zk
from zokernels.benchmarks import models
from zokernels.benchmarks.peers import MeZO


@dataclass
class Case:
    """What is measured."""

    model: str = "opt-125m"
    rows: int = 2
    length: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    dist: str = "gaussian"
    perturb: str | None = None
    scheme: str = "full"
    peers: bool = True


@dataclass
class Result:
    """Medians over repetitions.

    ``ratio`` is the step's time over that of the two forwards, ``parts`` the share of the step
    in forwards, noise, update and the rest (Python), ``peers`` each peer's ratio.
    """

    forwards_ms: float
    step_ms: float
    ratio: float
    parts: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)
    weights: int = 0
    repeats: int = 0


def measure(case: Case, repeats: int, optimizer: Callable[..., Any] | None = None) -> Result:
    """Time the step, the forwards and the peers in turn."""
    model = models.build(case.model, getattr(torch, case.dtype), case.device)
    if case.scheme == "lora":
        from zokernels.tasks import schemes

        model, _ = schemes.apply(model, "lora")
    inputs = models.batch(model, case.rows, case.length)

    def closure() -> torch.Tensor:
        return model(**inputs).loss

    @torch.no_grad()
    def forwards() -> None:
        float(closure())
        float(closure())

    make = optimizer or zk.ZOSGD
    opt = make(model, lr=1e-7, eps=1e-3, dist=case.dist, perturb=case.perturb)
    runs: dict[str, Callable[[], Any]] = {
        "forwards": forwards,
        "step": lambda: opt.step(closure),
    }
    if case.peers:
        mezo = MeZO(model)
        runs["mezo"] = lambda: mezo.step(closure)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    parts: dict[str, list[float]] = {"forwards": [], "noise": [], "update": [], "rest": []}
    for repetition in range(repeats):
        for name, run in runs.items():
            # A peer that takes ten times as long is timed less often.
            if name not in ("forwards", "step") and repetition % 4:
                continue
            _synchronize(case.device)
            begin = time.perf_counter()
            run()
            _synchronize(case.device)
            seconds[name].append(time.perf_counter() - begin)
        timing = opt.timing
        share = {k: getattr(timing, k) / timing.total for k in ("forwards", "noise", "update")}
        for k, v in (share | {"rest": 1 - sum(share.values())}).items():
            parts[k].append(v)
    base = seconds["forwards"]
    ratios = [s / f for s, f in zip(seconds["step"], base, strict=True)]
    peers = {
        name: statistics.median(taken) / statistics.median(base)
        for name, taken in seconds.items()
        if name not in ("forwards", "step")
    }
    return Result(
        forwards_ms=1000 * statistics.median(base),
        step_ms=1000 * statistics.median(seconds["step"]),
        ratio=statistics.median(ratios),
        parts={k: statistics.median(v) for k, v in parts.items()},
        peers=peers,
        weights=sum(p.numel() for p in model.parameters() if p.requires_grad),
        repeats=repeats,
    )


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()

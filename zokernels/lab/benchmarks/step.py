"""The time of a step as a multiple of the two forwards that it can't do without.

Everything is timed in turn within one process, and a ratio is the median over repetitions of a time
over the forwards' time of the same repetition: other load on the machine then meets both.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

import zokernels as zk
from zokernels.lab.benchmarks import high_water, machine, models, peers, timing
from zokernels.lab.models import schemes
from zokernels.lab.runs import optimizers
from zokernels.lab.scoring import candidate_scores

Run = Callable[[], Any]

# What of a batch the loss looks at: every token, or two candidates after the last one.
LOSSES = ("tokens", "candidates")
# How a step is run: as the optimizers perturb, and so captured as a CUDA graph.
MODES = ("on_entry", "paired", "in_place")
GRAPHED = tuple(f"graphed_{mode}" for mode in MODES)
PARTS = ("forwards", "noise", "update", "rest")
FEWEST = 3  # repetitions, whatever they take


@dataclass
class Case:
    """What is measured."""

    model: str = "opt-125m"
    rows: int = 2
    length: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    optimizer: str = "zo-sgd"
    dist: str = "gaussian"
    perturb: str = "on_entry"
    lazy_logits: bool = True
    scheme: str = "full"
    loss: str = "tokens"
    queries: int = 1
    points: int = 2
    peers: tuple[str, ...] = ()
    backend: str | None = None


@dataclass
class Result:
    """Medians over repetitions.

    Attributes:
        forwards_ms: As many plain forwards as the step has, two a query: ``model(**batch).loss``
            under `torch.no_grad`.
        step_ms: A step.
        ratio: The step over the forwards of the same repetition.
        low, high: The quartiles of that ratio.
        parts: Of a step in forwards, noise, update and the rest (Python), over the plain forwards;
            on CUDA not known.
        together_ms: Plain forwards of the batch repeated for each of the points that share one:
            as many rows in all.
        peers: Of each peer that memory holds, its step over its own two forwards.
        weights: Trainable ones.
        tokens: Of a batch.
        memory_mb: What the step needed beyond two forwards at its peak: on a GPU the allocator's
            count, on a CPU what the process's high-water mark rose by.
        repeats: Repetitions.
    """

    forwards_ms: float
    step_ms: float
    ratio: float
    low: float
    high: float
    parts: dict[str, float]
    weights: int
    tokens: int
    memory_mb: float
    repeats: int
    together_ms: float | None = None
    peers: dict[str, float] = field(default_factory=dict)


COLUMNS = (
    *machine.COLUMNS, "spin", "model", "scheme", "loss", "rows", "length", "dtype", "optimizer",
    "queries", "dist", "perturb", "points", "lazy_logits", "forwards_ms", "step_ms",
    "ratio", "low", "high", *PARTS, "tokens_per_s", "ns_per_weight", "memory_mb", "repeats",
    "times_faster_than_mezo", "mezo", "torchzero", "fo-sgd", "fo-adamw", "together_ms",
)  # fmt: skip
# Those that files of earlier versions lack.
LATER = (*machine.LATER, "points", "together_ms")


def row(case: Case, result: Result) -> dict[str, object]:
    """The values of `COLUMNS`; an empty one was not measured."""
    given = {k: v for k, v in asdict(case).items() if k in COLUMNS}
    mezo = result.peers.get("mezo")
    numbers = {
        "forwards_ms": f"{result.forwards_ms:.1f}",
        "step_ms": f"{result.step_ms:.1f}",
        **{name: f"{getattr(result, name):.3f}" for name in ("ratio", "low", "high")},
        **{name: f"{result.parts[name]:.3f}" if result.parts else "" for name in PARTS},
        "tokens_per_s": f"{result.tokens / result.step_ms * 1e3:.0f}",
        "ns_per_weight": f"{result.step_ms * 1e6 / result.weights:.3f}",
        "memory_mb": f"{result.memory_mb:.0f}",
        "repeats": result.repeats,
        "times_faster_than_mezo": f"{mezo / result.ratio:.1f}" if mezo else "",
        **{name: f"{value:.2f}" for name, value in result.peers.items()},
        "together_ms": f"{result.together_ms:.1f}" if result.together_ms is not None else "",
    }
    # How long an idle thread spins: on a virtual machine it may lose its core by that.
    spin = os.environ.get("GOMP_SPINCOUNT", "")
    return {**machine.about(case.device), "spin": spin, **given, **numbers}


def measure(
    case: Case,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
    model: Any = None,
    seconds: float = float("inf"),
) -> Result:
    """Time the step, the forwards and the peers in turn.

    Args:
        case: What to measure.
        repeats: Repetitions, at most.
        progress: Called after each.
        model: The case's, where it was built for others before; its weights change.
        seconds: After which no repetition begins, but there are at least `FEWEST`.

    Raises:
        ValueError: If a graph is to be timed beside peers: MeZO's puts weights elsewhere in memory,
            and the graph would go on writing where they were. Or a step of several queries, which
            theirs have not.
    """
    if case.queries > 1 and case.peers:
        raise ValueError("The peers' steps have one query; time several without them.")
    if case.perturb in GRAPHED and case.peers:
        raise ValueError(f"{case.perturb} can't be timed beside peers, which replace its weights.")
    if model is None:
        model = models.build(case.model, getattr(torch, case.dtype), case.device)
    if case.scheme != "full":
        model, _ = schemes.apply(model, case.scheme)
    inputs = models.batch(model, case.rows, case.length)

    @torch.no_grad()
    def forwards() -> None:
        # What a user writes, whatever part of it the step's own closure needs.
        for _ in range(2 * case.queries):
            float(model(**inputs).loss)

    runs: dict[str, Run] = {"forwards": forwards}
    if case.points > 2:
        runs["together"] = _together(case, model, inputs)

    before = _peak_mb(case.device, forwards)
    opt, step, peak = _first_step(case, model, inputs)
    rivals = _fitting(case, model, inputs)
    taken, parts = _repeat(
        runs | {"step": step}, rivals, opt, case.device, repeats, progress, seconds
    )
    ratios = [s / f for s, f in zip(taken["step"], taken["forwards"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    base = statistics.median(taken["forwards"])
    return Result(
        forwards_ms=1000 * base,
        step_ms=1000 * statistics.median(taken["step"]),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        parts={k: statistics.median(v) for k, v in parts.items()},
        weights=sum(p.numel() for p in model.parameters() if p.requires_grad),
        tokens=case.rows * case.length,
        memory_mb=peak - before,
        repeats=len(ratios),
        together_ms=1000 * statistics.median(taken["together"]) if "together" in taken else None,
        peers={name: statistics.median(taken[name]) / base for name in rivals},
    )


def _first_step(case: Case, model: Any, inputs: dict[str, Any]) -> tuple[Any, Run, float]:
    """The optimizer, its step, which has run once, and the MiB held at the peak of that."""
    options = dict(
        lr=1e-7, eps=1e-3, dist=case.dist, perturb=case.perturb.removeprefix("graphed_"),
        num_queries=case.queries, points=case.points, lazy_logits=case.lazy_logits,
        backend=case.backend,
    )  # fmt: skip
    opt = optimizers.build(case.optimizer, model, options)
    if case.perturb not in GRAPHED:
        closure = {"tokens": _tokens, "candidates": _candidates}[case.loss](model, inputs)
        step = partial(opt.step, closure)
        return opt, step, _peak_mb(case.device, step)
    graphs: list[zk.GraphedStep] = []

    def capture() -> None:
        # It computes whole logits. On a CPU the same step runs without a graph.
        on_gpu = case.device.startswith("cuda")
        graphs.append(
            zk.GraphedStep(opt, lambda batch: model(**batch).loss, inputs, capture=on_gpu)
        )

    # A replay allocates nothing: what it needs, the warm-up has taken.
    peak = _peak_mb(case.device, capture)
    graphs[0](inputs)
    return opt, partial(graphs[0], inputs), peak


def _together(case: Case, model: Any, inputs: dict[str, torch.Tensor]) -> Run:
    """Plain forwards of the batch repeated, as many as the step has of several points."""
    count = min(case.points, 2 * case.queries)
    repeated = {k: v.repeat(count, *[1] * (v.dim() - 1)) for k, v in inputs.items()}

    @torch.no_grad()
    def run() -> None:
        for _ in range(-(-2 * case.queries // count)):
            float(model(**repeated).loss)

    return run


def _repeat(
    runs: dict[str, Run],
    rivals: dict[str, Run],
    opt: Any,
    device: str,
    repeats: int,
    progress: Run,
    seconds: float,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds of everything in turn, and the parts of the steps, over the forwards."""
    taken: dict[str, list[float]] = {name: [] for name in (*runs, *rivals)}
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    moved = bool(rivals)
    began = time.perf_counter()
    for repetition in range(repeats):
        if repetition >= FEWEST and time.perf_counter() - began > seconds:
            break
        if moved:
            # MeZO's step puts weights elsewhere in memory, and the next one has to find that out.
            runs["step"]()
        for name, run in runs.items():
            taken[name].append(_clock(run, device))
        base, of_step = taken["forwards"][-1], opt.timing
        known = {k: getattr(of_step, k) / base for k in PARTS if k != "rest"}
        for k, v in (known | {"rest": of_step.total / base - sum(known.values())}).items():
            parts[k].append(v)
        # What takes ten times as long is timed less often.
        moved = bool(rivals) and repetition % 4 == 0
        for name, run in rivals.items() if moved else ():
            taken[name].append(_clock(run, device))
        progress()
    # On CUDA the host only launches them, and its clock says nothing of the device's.
    return taken, {} if device.startswith("cuda") else parts


def _fitting(case: Case, model: Any, inputs: dict[str, Any]) -> dict[str, Run]:
    """The peers' steps, each run once; one that memory does not hold is left out."""
    found = {}
    for name in case.peers:
        step = peers.build(name, model, _tokens(model, inputs))
        if _fits(step):
            found[name] = step
            continue
        # Out here the error is gone, and with it the activations that its frames held.
        model.zero_grad(set_to_none=True)
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _fits(step: Callable[[], Any]) -> bool:
    try:
        step()
    except torch.OutOfMemoryError:
        return False
    return True


def _tokens(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: model(**inputs).loss


def _candidates(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The loss of a task with two answers of one token: cross-entropy over their scores."""
    rows, length = inputs["input_ids"].shape
    pairs = torch.arange(rows).repeat_interleave(2)
    batch = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "places": torch.full((2 * rows, 1), length - 1),
        "targets": torch.tensor([[100], [200]]).repeat(rows, 1),
        "weights": torch.ones(2 * rows, 1),
        "owners": torch.stack([pairs, pairs, torch.arange(2).repeat(rows)], 1),
        "one_place": torch.tensor(True),
        "labels": torch.arange(rows) % 2,
    }
    batch = {k: v.to(model.device) for k, v in batch.items()}

    def loss() -> torch.Tensor:
        scores = candidate_scores(model, batch, relative=True)
        return torch.nn.functional.cross_entropy(scores, batch["labels"])

    return loss


def _clock(run: Callable[[], Any], device: str) -> float:
    timing.synchronize(device)
    begin = time.perf_counter()
    run()
    timing.synchronize(device)
    return time.perf_counter() - begin


def _peak_mb(device: str, run: Callable[[], Any]) -> float:
    high_water.reset(device)
    run()
    return high_water.mark(device) / 2**20 if high_water.can_reset(device) else float("nan")

"""The measurement of the passes: every repetition runs all cases in turn.

The machine may be shared, so a pass is compared only with what ran within the same moments: with
the floor of the same repetition, and with peers by medians of the same round.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import zokernels as zk
from zokernels.lab.benchmarks import expressions, machine, passes, timing
from zokernels.lab.benchmarks.passes import FLOOR, Case, Pass, Tensors, Unavailable
from zokernels.lab.benchmarks.shapes import Shaped

COLUMNS = (
    *machine.COLUMNS, "gcc", "triton", "numel", "dtype", "op", "dist", "variant", "case", "seeds",
    "ns_per_weight", "gb_per_s", "ratio_to_floor", "ratio_to_floor_median", "low", "high",
    "speedup_over_mezo", "fastest_peer", "speedup_over_fastest_peer", "repeats", "shape",
)  # fmt: skip
# Columns that rows of earlier versions lack.
LATER = (*machine.LATER, "shape")
SLOW = 10  # times the floor; such a case is timed less often
FEWEST = 5  # repetitions of a slow case, where there are as many
QUIET = 1.2  # how far apart the floor's quartiles, or its medians of two rounds, may be

Round = dict[Case, list[float]]


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        device: "cpu", or a CUDA device.
        numel: Weights in a tensor.
        dtypes: Keys of `passes.DTYPES`.
        full: Every instruction set, mask and state, and compiled peers.
        peers: Whether peers run too.
        repeats: Repetitions of a round, at most.
        rounds: Rounds; a row's time is of its best, the one of the lowest ratio.
        seconds: What the repetitions may take together; there are at least `FEWEST` of them.
        backend: Whose passes; None for the device's kernels, "native" or "triton".
        shapes: Groups in which the Triton kernels are timed, too.
    """

    device: str = "cpu"
    numel: int = 50_000_000
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    full: bool = False
    peers: bool = True
    repeats: int = 15
    rounds: int = 1
    seconds: float = float("inf")
    backend: str | None = None
    shapes: tuple[Shaped, ...] = ()

    @property
    def kernels(self) -> str:
        """The backend that is measured."""
        return self.backend or ("triton" if self.device.startswith("cuda") else "native")


@dataclass
class Found:
    """Rows of `COLUMNS`, and sentences on what was left out and what disturbed.

    Attributes:
        seconds: Of each case, those of every repetition, for a comparison of two runs.
        interrupted: Whether Ctrl-C ended it; the rows are of the repetitions before that.
    """

    rows: list[dict[str, Any]]
    notes: list[str]
    seconds: Round = field(default_factory=dict)
    interrupted: bool = False


def cases(plan: Plan) -> list[Case]:
    """Every case of this machine and build, by type: the floors, ours, and the peers.

    Raises:
        Unavailable: If the device has no kernels of ours.
    """
    backend = plan.kernels
    state = zk.backends()[backend]
    if not state.available:
        raise Unavailable(f"Nothing to measure: {state.reason}")
    isas = [""] if backend == "triton" else list(reversed(state.instruction_sets))
    found = []
    for dtype in plan.dtypes:
        found += passes.floors(dtype, plan.device, plan.full)
        found += passes.ours(dtype, backend, isas[0], plan.full)
        found += passes.shaped(dtype, plan.shapes)
        if plan.full:
            for isa in isas[1:]:
                found += passes.plain(dtype, backend, isa)
        if plan.peers:
            found += expressions.cases(dtype, plan.device, plan.full)
    return found


def measure(
    plan: Plan,
    watch: Callable[[str, float], None] = lambda what, share: None,
    wanted: Sequence[Case] | None = None,
    said: Callable[[float], None] = lambda seconds: None,
) -> Found:
    """Time the cases and make their rows.

    Args:
        plan: What to measure.
        watch: Called with what goes on and which share of it is done.
        wanted: Some of the plan's `cases`, their floors among them; None for all.
        said: Called with the seconds that the repetitions are to take, where that is known.

    Raises:
        Unavailable: If the device has no kernels of ours.
    """
    # Before the measurement, so that an edit meanwhile does not pass for what was measured.
    about = environment(plan)
    runs, notes = _prepare(plan, cases(plan) if wanted is None else wanted, watch)
    order = list(runs)
    every, repeats = _schedule(runs, plan, watch, said)
    rounds: list[Round] = []
    before, interrupted = timing.busy(), False
    try:
        for number in range(plan.rounds):
            shuffle = random.Random(number)
            for repetition in range(repeats):
                due = [c for c in order if repetition % every[c] == 0]
                groups = [[c for c in due if c.dtype == dtype] for dtype in plan.dtypes]
                taken = [
                    (case, timing.clock(runs[case], plan.device))
                    for case in timing.turn(groups, shuffle)
                ]
                # Whole, so that after a Ctrl-C there is a floor to each time.
                if repetition == 0:
                    rounds.append({case: [] for case in order})
                for case, seconds in taken:
                    rounds[-1][case].append(seconds)
                watch("Timing", (number * repeats + repetition + 1) / (plan.rounds * repeats))
    except KeyboardInterrupt:
        if not rounds:
            raise
        interrupted = True
    disturbed = timing.others(before, timing.busy()) if plan.device == "cpu" else None
    notes += [disturbed] if disturbed else []
    notes += _noise(rounds, order)
    rows = [{**about, **row} for row in summarize(rounds, every, plan.numel)]
    together = {case: [s for r in rounds for s in r[case]] for case in order}
    return Found(rows, notes, together, interrupted)


def share(row: Mapping[str, Any]) -> float:
    """Of the bytes that its floor moves in a second, what a pass moves, in per cent."""
    return 100 / float(row["ratio_to_floor_median"])


def environment(plan: Plan) -> dict[str, object]:
    """The columns that all rows share."""
    by_triton = plan.kernels == "triton"
    tools = {
        "gcc": "" if by_triton else machine.gcc(),
        "triton": machine.triton() if by_triton else "",
    }
    return {**machine.about(plan.device), **tools, "numel": plan.numel}


def _prepare(
    plan: Plan, wanted: Sequence[Case], watch: Callable[[str, float], None]
) -> tuple[dict[Case, Pass], list[str]]:
    """The passes, compiled and warm, in the order of the rows; and why others are left out."""
    tensors = Tensors(plan.numel, plan.device)
    runs, notes = {}, []
    for place, case in enumerate(wanted):
        try:
            run = case.build(tensors)
            run()
            runs[case] = run
        except (Unavailable, RuntimeError) as reason:
            # Of ours, only memory may be missing.
            if not (case.peer or isinstance(reason, Unavailable | torch.OutOfMemoryError)):
                raise
            notes.append(f"{case} left out: {str(reason).splitlines()[0]}")
        watch("Preparing", (place + 1) / len(wanted))
    if not any(case.name == FLOOR for case in runs):
        raise Unavailable(f"Nothing to measure: {notes[0]}")
    # A pass whose floor does not fit has nothing to be compared with.
    floors = {case.floor for case in runs if case.name == FLOOR}
    runs = {case: run for case, run in runs.items() if case.floor in floors}
    return runs, notes


def _schedule(
    runs: dict[Case, Pass],
    plan: Plan,
    watch: Callable[[str, float], None],
    said: Callable[[float], None],
) -> tuple[dict[Case, int], int]:
    """Every how many repetitions each case runs, and the repetitions, by how long each takes."""
    if plan.repeats <= FEWEST:
        return dict.fromkeys(runs, 1), plan.repeats
    taken = {}
    for place, (case, run) in enumerate(runs.items()):
        taken[case] = timing.clock(run, plan.device)
        watch("Trying", (place + 1) / len(runs))
    floors = {case.floor: taken[case] for case in runs if case.name == FLOOR}
    slow = {case for case in runs if taken[case] > SLOW * floors[case.floor]}

    def seconds(repeats: int) -> float:
        often = sum(taken[case] for case in runs if case not in slow) * repeats
        return plan.rounds * (often + sum(taken[c] for c in slow) * min(repeats, FEWEST))

    repeats = plan.repeats
    while repeats > FEWEST and seconds(repeats) > plan.seconds:
        repeats -= 1
    said(seconds(repeats))
    seldom = max(1, repeats // FEWEST)
    return {case: seldom if case in slow else 1 for case in runs}, repeats


def summarize(rounds: list[Round], every: dict[Case, int], numel: int) -> list[dict[str, object]]:
    """One row a case; its time and ``ratio_to_floor`` are of its best round.

    A ratio is of the times of one repetition; ``ratio_to_floor_median``, ``low`` and ``high`` are
    the median and the quartiles of all of them.
    """
    medians = [{case: statistics.median(r[case]) for case in every} for r in rounds]
    floors = {case.floor: case for case in every if case.name == FLOOR}
    rows = []
    for case in every:
        ratios = [_ratios(r, case, floors[case.floor], every[case]) for r in rounds]
        best_of = [statistics.median(each) for each in ratios]
        # Of equal ratios (the floor's own) the fastest round.
        best = min(range(len(rounds)), key=lambda i: (best_of[i], medians[i][case]))
        here = medians[best]
        each = timing.spread([ratio for of_round in ratios for ratio in of_round])
        # Apart or in place, it is the same work.
        work = (case.dtype, case.op.rstrip("_"))
        same = [c for c in every if c.peer and (c.dtype, c.op.rstrip("_")) == work]
        # A peer adds one direction in a pass.
        faster = {c.name: case.seeds * here[c] / here[case] for c in same}
        fastest = min(faster, key=lambda name: faster[name], default="")
        row: dict[str, object] = {
            "dtype": case.dtype, "op": case.op, "dist": case.dist, "variant": case.variant,
            "case": case.name, "seeds": case.seeds if case.dist else 0,
            "ns_per_weight": f"{here[case] / numel * 1e9:.4f}",
            "gb_per_s": f"{case.bytes_per_weight * numel / here[case] / 1e9:.1f}",
            "ratio_to_floor": f"{best_of[best]:.3f}", "ratio_to_floor_median": f"{each.median:.3f}",
            "low": f"{each.low:.3f}", "high": f"{each.high:.3f}",
            "speedup_over_mezo": f"{faster['mezo']:.2f}" if "mezo" in faster else "",
            "fastest_peer": fastest,
            "speedup_over_fastest_peer": f"{faster[fastest]:.2f}" if fastest else "",
            "repeats": sum(len(r[case]) for r in rounds), "shape": case.shape,
        }  # fmt: skip
        rows.append(row)
    return rows


def _ratios(seconds: Round, case: Case, floor: Case, every: int) -> list[float]:
    """The case's times over the floor's of the same repetitions."""
    return [t / seconds[floor][place * every] for place, t in enumerate(seconds[case])]


def _noise(rounds: list[Round], order: list[Case]) -> list[str]:
    """A sentence if a floor differed by itself, of the one that did most.

    A ratio is lowest where the floor was held up, so then the best round may be the worst.
    """
    apart = {}
    for case in (c for c in order if c.name == FLOOR):
        medians = [statistics.median(r[case]) for r in rounds]
        quartiles = timing.spread([s for r in rounds for s in r[case]])
        apart[case] = max(max(medians) / min(medians), quartiles.high / quartiles.low)
    worst = max(apart, key=lambda case: apart[case])
    if apart[worst] <= QUIET:
        return []
    return [
        f"The machine was not quiet: the floor of {worst.op} in {worst.dtype} differed by "
        f"{apart[worst]:.2f} times, so a low ratio may be the floor's delay; measure again."
    ]

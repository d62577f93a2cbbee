"""Each pass beside a device-to-device copy of the same bytes, and beside MeZO's expressions.

At 1e9 weights, float32 and bfloat16. The kernels are compiled by all cores at once before the first
is timed; each job then alternates its cases with the copies that they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.gpu.part import Job, Part, told
from zokernels.lab.benchmarks import machine, ops, passes, shapes
from zokernels.lab.benchmarks.passes import FLOOR, Case

SHAPES = Path(__file__).with_name("shapes.csv")
WEIGHTS, DRY_WEIGHTS = 10**9, 4_500
# The tensors of the hungriest job, AMSGrad's in both types, take 46 bytes a weight, and MeZO's
# expression makes four more.
_BYTES_A_WEIGHT = 64
# Variants that are a training step's passes.
SEEDS = ("", "8 seeds", "16 seeds")
_MEZO = ("mezo", "mezo-inplace", "mezo-compiled", "mezo-inplace-compiled", "triton-randn")


def _ours(case: Case) -> bool:
    return not (case.peer or case.shape)


def _plain(case: Case) -> bool:
    return _ours(case) and case.op.startswith("add_noise") and case.variant in SEEDS


def _updates(case: Case) -> bool:
    of_a_rule = not case.op.startswith("add_noise")
    return _ours(case) and of_a_rule and case.variant in ("", passes.NARROW)


def _variants(case: Case) -> bool:
    return _ours(case) and not (_plain(case) or _updates(case))


def _beside_mezo(case: Case) -> bool:
    same_work = (case.op, case.dist, case.variant) == ("add_noise_", "gaussian", "")
    return (_ours(case) and same_work) or case.name in _MEZO


# What is timed together, the most telling first, and the seconds that it takes: at 4 TB/s a pass at
# 1e9 weights takes 1 to 9 ms, and each runs 17 times. What takes long is memory that is filled
# first, and torch.compile for MeZO's expressions, some 6 s for each of four.
JOBS: tuple[tuple[str, float, Callable[[Case], bool]], ...] = (
    ("training passes", 6, _plain),
    ("updates", 7, _updates),
    ("MeZO's expressions", 30, _beside_mezo),
    ("shapes", 11, lambda case: bool(case.shape)),
    ("masks, rounding, steps", 6, _variants),
)
# By 16 cores, some 130 kernels of 2 s each, and a context on the device for each process.
COMPILE_SECONDS = 25.0


def plan(part: Part) -> ops.Plan:
    """What is timed: everything that the kernels have, at a size that memory allows."""
    tried = tuple(shapes.read(SHAPES))
    common = ops.Plan(device=part.device, full=True, backend="triton", shapes=tried)
    if part.dry:
        # An interpreted program takes 50 ms, whatever its size.
        few = dict(dtypes=("bfloat16",), shapes=tried[::5])
        return replace(common, numel=DRY_WEIGHTS, repeats=1, **few)
    return replace(common, numel=min(WEIGHTS, _free() // _BYTES_A_WEIGHT), seconds=3.0)


def jobs(part: Part) -> list[Job]:
    """The compilation, and the groups of `JOBS`."""
    whole = plan(part)
    cases = ops.cases(whole)
    first = Job("compilation", COMPILE_SECONDS, partial(_compile, part, whole, cases))
    return [first] + [
        Job(name, seconds, partial(_measure, part, whole, _with_floors(cases, chosen)))
        for name, seconds, chosen in JOBS
    ]


def _with_floors(cases: Sequence[Case], chosen: Callable[[Case], bool]) -> list[Case]:
    mine = [case for case in cases if case.name != FLOOR and chosen(case)]
    needed = {case.floor for case in mine}
    return [case for case in cases if case.name == FLOOR and case.floor in needed] + mine


def _measure(part: Part, whole: ops.Plan, wanted: list[Case]) -> list[str]:
    found = ops.measure(whole, wanted=wanted)
    if found.interrupted:
        raise KeyboardInterrupt
    part.keep(ops.COLUMNS, found.rows, ops.LATER)
    missing = [note for note in found.notes if "left out" in note]
    return [*map(_line, found.rows), *missing]


def _line(row: dict[str, Any]) -> str:
    """A pass in a line: what it moves in a second, as a share of what a copy does."""
    what = ", ".join(filter(None, (row["op"], row["dist"], row["variant"], row["shape"])))
    mezo = row["speedup_over_mezo"] if row["case"] != "mezo" else ""
    return (
        f"{row['dtype']:8} {row['case']:22} {what}: {float(row['gb_per_s']):,.0f} GB/s, "
        f"{ops.share(row):.0f} % of a copy" + (f", {mezo} x MeZO's expression" if mezo else "")
    )


def _compile(part: Part, whole: ops.Plan, cases: Sequence[Case]) -> list[str]:
    """Run each of our passes on small tensors, in as many processes as there are cores."""
    ours = [place for place, case in enumerate(cases) if case.name == "triton"]
    workers = part.workers
    # A sample is enough to see that the processes start.
    ours = ours[:: len(ours) // 4] if part.dry else ours
    shares = [ours[k::workers] for k in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failed = [one for some in pool.map(_run_small, [whole] * workers, shares) for one in some]
    done = len(ours) - len(failed)
    return [f"{done} kernels compiled or found compiled, in {workers} processes", *failed]


def _run_small(whole: ops.Plan, places: Sequence[int]) -> list[str]:
    """Which of them failed, and why."""
    small = passes.Tensors(DRY_WEIGHTS, whole.device)
    cases, failed = ops.cases(whole), []
    for place in places:
        try:
            cases[place].build(small)()
        except Exception as error:  # the others are compiled all the same
            failed.append(f"FAILED {cases[place]}: {told(error)}")
    return failed


def _free() -> int:
    free = machine.free_memory("cuda")
    assert free is not None
    return free


if __name__ == "__main__":
    this = Part.of_arguments("ops")
    raise SystemExit(this.run(jobs(this)))

"""The committed measurement of add_noise_: ``python -m bench.ops``, into bench/results/ops.csv.

The machine may be shared, so a case is compared only with what ran within the same moments: every
repetition runs all cases in turn, and a ratio is one of medians of the same round.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from bench import cases
from zokernels.backends import native
from zokernels.benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "ops.csv"
COLUMNS = (
    "date", "commit", "machine", "threads", "python", "torch", "gcc", "numel", "dtype", "dist",
    "case", "ns_per_weight", "ratio_to_floor", "ratio_to_floor_median", "speedup_over_mezo",
)  # fmt: skip
SLOW = 10  # times the floor; such a case is timed less often
OTHERS = 0.03  # of the CPU time, the most that other processes may have
QUIET = 1.2  # how far apart the floors of two rounds may be
FEWEST = 5  # repetitions of a slow case, where there are as many

Round = dict[cases.Case, list[float]]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--numel", type=int, default=cases.NUMEL, help="weights in a tensor")
    parser.add_argument("--repeats", type=int, default=15, help="repetitions in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    options = parser.parse_args(arguments)
    if min(options.numel, options.repeats, options.rounds) < 1:
        parser.error("--numel, --repeats and --rounds must be at least 1.")
    if native.why_missing() is not None:
        sys.exit(f"Nothing to measure: {native.why_missing()}")
    # Before the measurement, so that an edit meanwhile does not pass for what was measured.
    about = environment(options.numel)
    runs, order = prepare(options.numel)
    every = intervals(runs, options.repeats)
    rounds = []
    before = busy()
    for number in range(options.rounds):
        rounds.append(measure(runs, order, every, options.repeats, random.Random(number)))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    rows = [{**about, **row} for row in summarize(rounds, order, options.numel)]
    warn_of_others(before, busy())
    warn_of_noise(rounds, order)
    write(rows, options.out)


def prepare(numel: int) -> tuple[dict[cases.Case, cases.Pass], list[cases.Case]]:
    """The passes, compiled, and the cases that run here in the order of the results."""
    tensors: dict[tuple[str, bool], torch.Tensor] = {}
    runs = {}
    for case in cases.cases():
        # Passes in place share one tensor, whose memory no other pass replaces.
        key = (case.dtype, case.replaces)
        if key not in tensors:
            tensors[key] = cases.weights(case.dtype, numel)
        try:
            runs[case] = case.build(tensors[key])
        except cases.Unavailable as reason:
            print(f"{case} left out: {reason}", file=sys.stderr)
    return runs, list(runs)


def intervals(runs: dict[cases.Case, cases.Pass], repeats: int) -> dict[cases.Case, int]:
    """Every how many repetitions each case runs; the calls to find out also warm it up."""
    taken = {}
    for case, run in runs.items():
        run()
        taken[case] = clock(run)
    floors = {case.dtype: taken[case] for case in runs if case.name == "floor"}
    seldom = max(1, repeats // FEWEST)
    return {c: seldom if taken[c] > SLOW * floors[c.dtype] else 1 for c in runs}


def measure(
    runs: dict[cases.Case, cases.Pass],
    order: list[cases.Case],
    every: dict[cases.Case, int],
    repeats: int,
    shuffle: random.Random,
) -> Round:
    """One round: the seconds of each case."""
    seconds: Round = {case: [] for case in order}
    for repetition in range(repeats):
        for case in turn([c for c in order if repetition % every[c] == 0], shuffle):
            seconds[case].append(clock(runs[case]))
    return seconds


def turn(order: list[cases.Case], shuffle: random.Random) -> list[cases.Case]:
    """The cases of one repetition: the types in turn, each type's cases in a new order.

    The types in turn, so that a tensor is not still in the cache from the case before; a new
    order, so that no case always has the same one before it.
    """
    columns = []
    for dtype in cases.DTYPES:
        column = [case for case in order if case.dtype == dtype]
        shuffle.shuffle(column)
        columns.append(column)
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


def clock(run: cases.Pass) -> float:
    """The seconds of one pass."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def summarize(rounds: list[Round], order: list[cases.Case], numel: int) -> list[dict[str, object]]:
    """One row a case; its numbers are of its best round, the one of the lowest ratio."""
    medians = [{case: statistics.median(r[case]) for case in order} for r in rounds]
    rows = []
    print(f"{'case':40} {'ns':>8} {'min ns':>8} {'x floor':>8} {'median':>8} {'x MeZO':>8}")
    for case in order:
        floor = next(c for c in order if c.dtype == case.dtype and c.name == "floor")
        mezo = next(c for c in order if c.dtype == case.dtype and c.name == "mezo")
        ratios = [m[case] / m[floor] for m in medians]
        # Of equal ratios (the floor's own) the fastest round.
        best = min(range(len(rounds)), key=lambda i: (ratios[i], medians[i][case]))
        median = medians[best][case]
        row = {
            "dtype": case.dtype,
            "dist": case.dist,
            "case": case.name,
            "ns_per_weight": f"{median / numel * 1e9:.4f}",
            "ratio_to_floor": f"{ratios[best]:.3f}",
            "ratio_to_floor_median": f"{statistics.median(ratios):.3f}",
            "speedup_over_mezo": f"{medians[best][mezo] / median:.2f}",
        }
        rows.append(row)
        print(
            f"{case!s:40} {row['ns_per_weight']:>8} {min(rounds[best][case]) / numel * 1e9:8.4f} "
            f"{row['ratio_to_floor']:>8} {row['ratio_to_floor_median']:>8} "
            f"{row['speedup_over_mezo']:>8}"
        )
    return rows


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


def warn_of_others(before: tuple[float, float] | None, after: tuple[float, float] | None) -> None:
    """Say so where other processes had a share of the CPUs.

    They hide differences: a pass that waits for a CPU takes a time slice, and so does the floor.
    """
    if before is None or after is None:
        return
    share = (after[0] - before[0]) / max(after[1] - before[1], 1e-9)
    if share > OTHERS:
        print(
            f"The machine was not quiet: other processes had {share:.0%} of its CPU time, which "
            "draws all ratios to 1; measure again.",
            file=sys.stderr,
        )


def warn_of_noise(rounds: list[Round], order: list[cases.Case]) -> None:
    """Say so where the floor itself differed between rounds.

    A ratio is lowest where the floor was held up, so then the best round may be the worst.
    """
    for case in order:
        if case.name == "floor":
            medians = [statistics.median(r[case]) for r in rounds]
            if max(medians) > QUIET * min(medians):
                print(
                    f"The machine was not quiet: the floor of {case.dtype} took "
                    f"{max(medians) / min(medians):.2f} times as long in one round as in another, "
                    "so a low ratio may be the floor's delay; measure again.",
                    file=sys.stderr,
                )


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Put the rows in place of those of the same machine and number of weights."""
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            new = (rows[0]["machine"], str(rows[0]["numel"]))
            kept = [row for row in csv.DictReader(file) if (row["machine"], row["numel"]) != new]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    print(f"{len(rows)} rows written to {path}", file=sys.stderr)


def environment(numel: int) -> dict[str, object]:
    """The columns that all rows share."""
    return {**machine.about(), "gcc": gcc(), "numel": numel}


def gcc() -> str:
    """The gcc that compiled the library, as written in the library itself."""
    found = re.search(rb"GCC: \([^)]*\) ([\w.]+)", native.LIBRARY.read_bytes())
    return found[1].decode() if found else "unknown"


if __name__ == "__main__":
    main()

"""What bench/on_gpu.sh found on a GPU, from bench/results/gpu; and what is said until there is one.

A file may be missing or hold the rows of several machines: each machine has its own tables, of its
last rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from bench.report.document import table
from bench.report.tables import memory as peaks
from bench.report.tables import ops as passes
from zokernels.lab.benchmarks import peers, results
from zokernels.lab.benchmarks.ops import share
from zokernels.lab.benchmarks.results import Row

NOTHING = "No row of this project was measured on a GPU yet."
NOT_TIMED = (
    "Alpha; **not timed on a GPU yet**. The Triton kernels are tested in Triton's interpreter and "
    "were compiled, not timed; `bench/on_gpu.sh` tests and times them where there is a GPU."
)
# Op, noise and type, and the share of a copy's bandwidth that is asked, in per cent.
SHARES = (
    ("add_noise_", "gaussian", "bfloat16", 85),
    ("add_noise_", "rademacher", "bfloat16", 92),
    ("add_noise_", "rank1", "bfloat16", 92),
    ("momentum", "gaussian", "bfloat16", 85),
    ("adam", "gaussian", "bfloat16", 85),
    ("amsgrad", "gaussian", "bfloat16", 85),
)
# Of a graphed paired step on OPT-1.3B, 16 × 512: multiples of its two plain forwards.
STEPS = (("gaussian", 1.10), ("rank1", 1.05))
TIMES_MEZO = 3
FIGURE = "![Steps on a GPU in multiples of two plain forwards](figures/gpu-step.png)"


def status(checks: Sequence[Row], ops: Sequence[Row], steps: Sequence[Row]) -> str:
    """The README's line."""
    if not (checks or ops or steps):
        return NOT_TIMED
    *_, last = [*steps, *ops, *checks]
    machine = last["machine"]
    parts = [_checked(of_commit) for of_commit in _by_commit(checks, machine)][-1:]
    shares = [
        f"{share(row):.0f} % ({dist})"
        for op, dist, _, row in _asked(_of(ops, machine))
        if op == "add_noise_"
    ]
    if shares:
        parts.append(
            f"a pass over bfloat16 weights moves {' and '.join(shares)} of what a copy does"
        )
    graphed = [row for row in _of(steps, machine) if _is_target(row)]
    if graphed:
        found = " and ".join(f"{row['ratio']} ({row['dist']})" for row in graphed)
        parts.append(
            f"a step of {_size(graphed[0])}, as a CUDA graph takes {found} times its two plain "
            "forwards"
        )
    for size, times in _times_mezo(_of(steps, machine)).items():
        parts.append(f"MeZO's step of {size} takes {' to '.join(times)} times as long as ours")
    return f"Alpha. On {machine}: {'; '.join(parts)} ([more](docs/performance.md#on-a-gpu))."


def tables(checks: Sequence[Row], ops: Sequence[Row], steps: Sequence[Row]) -> str:
    """Checks, targets, passes, shapes and steps, a machine after the other."""
    machines = dict.fromkeys(row["machine"] for rows in (checks, ops, steps) for row in rows)
    if not machines:
        return NOTHING
    parts = [
        part
        for machine in machines
        for part in _machine(
            _by_commit(checks, machine), *(_of(rows, machine) for rows in (ops, steps))
        )
    ]
    return "\n\n".join([FIGURE, *parts] if steps else parts)


def memory(rows: Sequence[Row]) -> str:
    """Peaks of the allocator by length, with their multiples of the arithmetic."""
    return peaks.measured(rows) if rows else NOTHING


def _machine(
    checks: Sequence[Sequence[Row]], ops: Sequence[Row], steps: Sequence[Row]
) -> Iterator[str]:
    first = [*itertools.chain(*checks), *ops, *steps][0]
    yield f"**{first['machine']}**"
    for of_commit in checks:
        yield f"{results.caption(of_commit)}: {_checked(of_commit)}."
    if lines := list(_targets(ops, steps)):
        yield table(("", "asked", "measured", "met"), lines, "lrrl")
    if ops:
        yield (
            f"{results.caption(ops)}; {int(ops[0]['numel']):,} weights. GB/s, bytes read and "
            "written; in brackets the share of what a device-to-device copy of as many bytes "
            "does, timed in turn with it. × MeZO: how many times as fast as MeZO's expression."
        )
        yield _passes([row for row in ops if not row["shape"]])
        if shaped := [row for row in ops if row["shape"]]:
            yield (
                "Other groups than the kernels' own: rows of eight weights × warps, and the share "
                "of a copy."
            )
            yield _shapes(shaped)
    if steps:
        yield (
            f"{results.caption(steps)}; random weights. Multiples of two plain forwards, medians "
            "and quartiles, and milliseconds."
        )
        yield _steps(steps)
        yield _peers(steps)


def _of(rows: Sequence[Row], machine: str) -> list[Row]:
    """A machine's rows; of what was measured again, the last one."""
    keys = (
        "kind", "numel", "dtype", "op", "dist", "variant", "case", "shape", "model", "rows",
        "length", "perturb", "optimizer", "queries",
    )  # fmt: skip
    mine = [row for row in rows if row["machine"] == machine]
    return list({tuple(row.get(key) for key in keys): row for row in mine}.values())


def _by_commit(checks: Sequence[Row], machine: str) -> list[list[Row]]:
    """A machine's checks of each commit, of which a run may have had time for a part."""
    commits = results.grouped(checks, "machine", "commit")
    return [_of(rows, machine) for (of, _), rows in commits.items() if of == machine]


def _checked(checks: Sequence[Row]) -> str:
    passed, failed, left = (results.total(checks, name) for name in ("passed", "failed", "left"))
    said = f"{passed} of {passed + failed} cases gave the CPU's bits or numbers"
    return said + (f", {left} were left for time" if left else "")


def _asked(ops: Sequence[Row]) -> Iterator[tuple[str, str, str, Row]]:
    """The plain passes of `SHARES` that were measured."""
    for op, dist, dtype, _ in SHARES:
        for row in ops:
            plain = row["case"] == "triton" and not row["variant"] and not row["shape"]
            if plain and (row["op"], row["dist"], row["dtype"]) == (op, dist, dtype):
                yield op, dist, dtype, row


def _is_target(row: Row) -> bool:
    size = (row["model"], row["rows"], row["length"])
    return size == ("opt-1.3b", "16", "512") and row["perturb"] == "graphed_paired"


def _beside_mezo(steps: Sequence[Row]) -> Iterator[tuple[Row, float]]:
    """Steps at 16 × 64 where MeZO's was timed, and how many times as long as each it takes."""
    for timed in steps:
        if timed["mezo"] and (timed["rows"], timed["length"]) == ("16", "64"):
            for row in steps:
                alike = _size(row) == _size(timed) and row["dist"] == timed["dist"]
                if alike and row["perturb"] in (timed["perturb"], "graphed_paired"):
                    yield row, float(timed["mezo"]) / float(row["ratio"])


def _times_mezo(steps: Sequence[Row]) -> dict[str, list[str]]:
    """Of each size, how many times as long MeZO's step takes: as the least and the most of ours."""
    found: dict[str, list[float]] = {}
    for row, times in _beside_mezo(steps):
        found.setdefault(_size(row), []).append(times)
    return {
        size: list(dict.fromkeys(f"{x:.1f}" for x in (min(times), max(times))))
        for size, times in found.items()
    }


def _targets(ops: Sequence[Row], steps: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    asked = {one[:3]: one[3] for one in SHARES}
    for op, dist, dtype, row in _asked(ops):
        reached, least = share(row), asked[op, dist, dtype]
        kernel = f"`{op}` {dist}" if op == "add_noise_" else op
        met = "yes" if reached >= least else "no"
        yield f"{kernel} {dtype}, of a copy", f"≥ {least} %", f"{reached:.0f} %", met
    for dist, most in STEPS:
        for row in steps:
            if _is_target(row) and row["dist"] == dist:
                met = "yes" if float(row["ratio"]) <= most else "no"
                yield f"{_size(row)}, graphed paired, {dist}", f"≤ {most:.2f}", row["ratio"], met
    for row, times in _beside_mezo(steps):
        met = "yes" if times >= TIMES_MEZO else "no"
        yield (
            f"{_size(row)}, times as fast as MeZO, {_mode(row)}", f"≥ {TIMES_MEZO}",
            f"{times:.1f}", met,
        )  # fmt: skip


def _passes(rows: Sequence[Row]) -> str:
    dtypes = results.distinct(rows, "dtype")
    cells = {(passes.which(row), row["dtype"]): row for row in rows}
    lines = []
    for one in dict.fromkeys(map(passes.which, rows)):
        line = [f"a copy for {one[0]}" if one[3] == passes.FLOOR else passes.label(one)]
        for dtype in dtypes:
            row = cells.get((one, dtype))
            line += ["–", "–"] if row is None else [_speed(row), row["speedup_over_mezo"] or "–"]
        lines.append(line)
    head = ["pass", *(name for dtype in dtypes for name in (dtype, "× MeZO"))]
    return table(head, lines, "l" + "r" * (len(head) - 1))


def _speed(row: Row) -> str:
    speed = f"{float(row['gb_per_s']):,.0f}"
    return speed if row["case"] == passes.FLOOR else f"{speed} ({share(row):.0f} %)"


def _shapes(rows: Sequence[Row]) -> str:
    dtypes = results.distinct([row for row in rows if row["case"] != passes.FLOOR], "dtype")
    cells = {(row["op"], row["dist"], row["shape"], row["dtype"]): row for row in rows}
    lines = [
        [f"{op} {dist}", shape.replace("x", "×"),
         *(f"{share(cells[op, dist, shape, d]):.0f} %" if (op, dist, shape, d) in cells else "–"
           for d in dtypes)]
        for op, dist, shape in dict.fromkeys((r["op"], r["dist"], r["shape"]) for r in rows)
    ]  # fmt: skip
    return table(["kernel", "group", *dtypes], lines, "ll" + "r" * len(dtypes))


def _size(row: Row) -> str:
    return f"{row['model']}, {row['rows']} × {row['length']}"


def _mode(row: Row) -> str:
    return row["perturb"].replace("graphed_", "as a graph, ").replace("_", " ")


def _steps(rows: Sequence[Row]) -> str:
    lines = [
        (_size(row), row["dist"], row["perturb"].replace("graphed_", "graphed "),
         f"{row['ratio']} ({row['low']}–{row['high']})", row["step_ms"], row["forwards_ms"])
        for row in rows
    ]  # fmt: skip
    head = ("size", "noise", "mode", "step", "ms", "ms of two forwards")
    return table(head, lines, "lllrrr")


def _peers(rows: Sequence[Row]) -> str:
    lines = [
        (title, _size(row), row[name], f"{float(row[name]) / float(row['ratio']):.1f}")
        for name, title in peers.TITLES.items()
        for row in rows
        if row[name]
    ]
    head = ("peer", "size", "two forwards", "times on_entry's step")
    return table(head, lines, "llrr")

"""The passes over the weights, from ops.csv."""

from __future__ import annotations

from collections.abc import Sequence

from zokernels.benchmarks import results
from zokernels.benchmarks.report import document
from zokernels.benchmarks.results import Row

NAMES = {
    "floor": "memory floor, `p.mul_(c)`",
    "mezo": "MeZO's expression",
    "mezo-inplace": "MeZO in place",
    "mezo-compiled": "MeZO's expression, `torch.compile`",
    "mezo-inplace-compiled": "MeZO in place, `torch.compile`",
}


def tables(rows: Sequence[Row]) -> str:
    """A table a machine: a line a pass, two columns a type."""
    return "\n\n".join(map(_table, machines(rows)))


def machines(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each machine's largest tensors."""
    found = []
    for machine in results.distinct(rows, "machine"):
        here = [row for row in rows if row["machine"] == machine]
        largest = max(int(row["numel"]) for row in here)
        found.append([row for row in here if int(row["numel"]) == largest])
    return found


def label(case: str, dist: str) -> str:
    """The pass in the reader's words."""
    if case.startswith("native-"):
        return f"`add_noise_` {dist}, {case.removeprefix('native-')}"
    return NAMES.get(case, case)


def _table(rows: list[Row]) -> str:
    dtypes = results.distinct(rows, "dtype")
    cells = {(row["case"], row["dist"], row["dtype"]): row for row in rows}
    lines = []
    for case, dist in dict.fromkeys((row["case"], row["dist"]) for row in rows):
        line = [label(case, dist)]
        for dtype in dtypes:
            row = cells.get((case, dist, dtype))
            line += [_time(row), f"{float(row['speedup_over_mezo']):.1f}"] if row else ["–", "–"]
        lines.append(line)
    head = ["pass", *(name for dtype in dtypes for name in (dtype, "× MeZO"))]
    caption = (
        f"{results.caption(rows)}; {int(rows[0]['numel']):,} weights. Nanoseconds a weight, in "
        "brackets the multiple of the memory floor: in the best round, and the median over "
        "rounds. × MeZO: how many times as fast as MeZO's expression."
    )
    return caption + "\n\n" + document.table(head, lines, "l" + "r" * (len(head) - 1))


def _time(row: Row) -> str:
    """One pass's time: of the floor, which is 1 by definition, without its multiple."""
    time = f"{float(row['ns_per_weight']):.3f}"
    if row["case"] == "floor":
        return time
    best, median = float(row["ratio_to_floor"]), float(row["ratio_to_floor_median"])
    return f"{time} ({best:.2f}, {median:.2f})"

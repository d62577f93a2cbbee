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

Pass = tuple[str, str, str, str]


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


def label(one: Pass) -> str:
    """The pass in the reader's words."""
    op, dist, variant, case = one
    of = "" if op == "add_noise_" else f", {op}"
    if case in NAMES:
        return ", ".join(filter(None, [NAMES[case] + of, variant]))
    what = "`add_noise_`" if op == "add_noise_" else f"`apply_update_` {op}"
    return ", ".join(filter(None, [f"{what} {dist}", variant, case.removeprefix("native-")]))


def which(row: Row) -> Pass:
    """What runs: the op, its noise, what differs from the plain pass, and whose code."""
    return row.get("op", "add_noise_"), row["dist"], row.get("variant", ""), row["case"]


def _table(rows: list[Row]) -> str:
    dtypes = results.distinct(rows, "dtype")
    cells = {(which(row), row["dtype"]): row for row in rows}
    lines = []
    for one in dict.fromkeys(map(which, rows)):
        line = [label(one)]
        for dtype in dtypes:
            row = cells.get((one, dtype))
            times = row["speedup_over_mezo"] if row else ""
            line += [_time(row) if row else "–", f"{float(times):.1f}" if times else "–"]
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

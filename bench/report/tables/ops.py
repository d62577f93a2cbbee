"""The passes over the weights, from ops.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row

FLOOR, ADD = "floor", "add_noise_"
NAMES = {
    FLOOR: "memory floor, `p.mul_(c)`",
    "mezo": "MeZO's expression",
    "mezo-inplace": "MeZO in place",
    "mezo-compiled": "MeZO's expression, `torch.compile`",
    "mezo-inplace-compiled": "MeZO in place, `torch.compile`",
    "triton-randn": "Triton's own normals, `tl.randn`",
    "expression": "the usual expression",
    "torch-optim": "`torch.optim`",
}

Pass = tuple[str, str, str, str]


def tables(rows: Sequence[Row]) -> str:
    """For each machine a table of `add_noise_`, and one of what else was measured there."""
    return "\n\n".join(map(_machine, machines(rows)))


def machines(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each machine's largest tensors; of a pass measured again, the last one."""
    found = []
    for here in results.grouped(rows, "machine").values():
        largest = max(int(row["numel"]) for row in here)
        latest = {(which(row), row["dtype"]): row for row in here if int(row["numel"]) == largest}
        found.append(list(latest.values()))
    return found


def which(row: Row) -> Pass:
    """What runs: the op, its noise, what differs from the plain pass, and whose code."""
    return row.get("op", ADD), row["dist"], row.get("variant", ""), row["case"]


def is_plain(row: Row) -> bool:
    """Whether it is `add_noise_` as it stands, its floor, or what it is compared with."""
    op, _, variant, _ = which(row)
    return (op, variant) == (ADD, "")


def label(one: Pass) -> str:
    """The pass in the reader's words."""
    op, dist, variant, case = one
    if case in NAMES:
        return ", ".join(filter(None, [NAMES[case], "" if op == ADD else op, variant]))
    what = f"`{op}`" if op.startswith("add_noise") else f"`apply_update_` {op}"
    return ", ".join(filter(None, [f"{what} {dist}", variant, case.removeprefix("native-")]))


def _machine(rows: list[Row]) -> str:
    caption = (
        f"{results.caption(rows)}; {int(rows[0]['numel']):,} weights. Nanoseconds a weight, in "
        "brackets the multiple of the memory floor: in the best round, and the median over "
        "rounds. × MeZO: how many times as fast as MeZO's expression."
    )
    parts = [caption, _table([r for r in rows if is_plain(r)], "× MeZO", "speedup_over_mezo")]
    if others := [row for row in rows if not is_plain(row)]:
        parts += [
            "Updates and variants, each beside the floor of the bytes that it moves:",
            _table(others, "× fastest peer", "speedup_over_fastest_peer"),
        ]
    return "\n\n".join(parts)


def _table(rows: list[Row], title: str, speedup: str) -> str:
    """A line a pass, two columns a type."""
    dtypes = results.distinct(rows, "dtype")
    cells = {(which(row), row["dtype"]): row for row in rows}
    lines = []
    for one in dict.fromkeys(map(which, rows)):
        line = [label(one)]
        for dtype in dtypes:
            row = cells.get((one, dtype))
            times = row[speedup] if row else ""
            line += [_time(row) if row else "–", f"{float(times):.1f}" if times else "–"]
        lines.append(line)
    head = ["pass", *(name for dtype in dtypes for name in (dtype, title))]
    return document.table(head, lines, "l" + "r" * (len(head) - 1))


def _time(row: Row) -> str:
    """One pass's time: of the floor, which is 1 by definition, without its multiple."""
    time = f"{float(row['ns_per_weight']):.3f}"
    if row["case"] == FLOOR:
        return time
    best, median = float(row["ratio_to_floor"]), float(row["ratio_to_floor_median"])
    return f"{time} ({best:.2f}, {median:.2f})"

"""What each optimizer does and a step of it costs, in theory and counted, from optimizers.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.entries import ENTRIES, Entry
from bench.report import document
from zokernels.lab.benchmarks.results import Row


def rules() -> str:
    """What each optimizer does, and what ZO-Bench's code does instead."""
    lines = [(f"`{entry.name}`", entry.rule, entry.zo_bench) for entry in ENTRIES]
    return document.table(("optimizer", "rule", "ZO-Bench's code"), lines)


def costs(rows: Sequence[Row]) -> str:
    """Theory, and after a colon what was counted."""

    def shared(theory: object, entry: Entry) -> str:
        return str(theory) if entry.share == 1 else f"{entry.share:.2f} × {theory}"

    lines = []
    for entry in ENTRIES:
        of = {(r["dtype"], r["two_sided"]): r for r in rows if r["optimizer"] == entry.name}
        two, one, half = of["float32", "True"], of["float32", "False"], of["bfloat16", "True"]
        lines.append(
            [
                f"`{entry.name}`",
                f"{entry.forwards[0]}: {two['forwards']}",
                f"{entry.forwards[1]}: {one['forwards']}",
                f"{shared(entry.perturbing[0], entry)}: {two['perturbing']}",
                f"{shared(entry.updating, entry)}: {two['updating']}",
                f"{shared(entry.directions, entry)}: {two['directions']}",
                f"{two['state_theory']}: {two['state']}",
                f"{half['state_theory']}: {half['state']}",
                f"{entry.temporary_is}: {two['temporary']}",
            ]
        )
    head = (
        "optimizer", "forwards", "one-sided", "perturbing passes", "updating passes",
        "directions in them", "state, float32 weights", "bfloat16 weights", "temporary",
    )  # fmt: skip
    return document.table(head, lines, "l" + "r" * 8)

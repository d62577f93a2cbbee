"""The quickstart over several seeds, from quickstart.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """Where they were measured, and a line a setting."""
    head = (
        "settings", "trained weights", "steps", "forwards", "accuracy after, by seed", "mean",
        "standard deviation",
    )  # fmt: skip
    lines = []
    for (name,), here in results.grouped(rows, "settings").items():
        after = [100 * float(row["dev_after"]) for row in here]
        spread = f"{statistics.stdev(after):.1f}" if len(after) > 1 else "–"
        one = here[0]
        lines.append(
            (name, f"{int(one['weights']):,}", one["steps"], f"{int(one['forwards']):,}",
             " / ".join(f"{a:.1f}" for a in after), f"{statistics.mean(after):.1f}", spread)
        )  # fmt: skip
    caption = (
        f"{results.caption(rows)}. Per cent of the 872 dev examples; before training "
        f"{100 * float(rows[0]['dev_before']):.1f}."
    )
    return caption + "\n\n" + document.table(head, lines, "lrrrlrr")

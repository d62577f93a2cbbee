"""What a model learns along each kind of direction, from directions.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """The loss of held-out sentences: distributions down, rates across."""
    return "\n\n".join(_table(own) for own in results.grouped(rows, "forwards").values())


def _table(rows: Sequence[Row]) -> str:
    rates = sorted({float(row["lr"]) for row in rows})
    lines = []
    for (dist,), own in results.grouped(rows, "dist").items():
        losses = [_losses(own, rate) for rate in rates]
        best = min(statistics.mean(values) for values in losses if values)
        lines.append((f'`"{dist}"`', *map(_cell, losses), f"{best:.3f}"))
    head = ("directions", *(f"lr {rate:g}" for rate in rates), "best")
    first = rows[0]
    caption = (
        f"{first['model']} on SST-2, all weights, ZO-SGD, ε {float(first['eps']):g}, "
        f"{int(first['forwards']):,} forwards; {results.caption(rows)}. Loss of 400 held-out "
        f"training sentences, {first['loss_before']} before: mean ± sample standard deviation over "
        "the seeds, their number in brackets where it is not three."
    )
    return f"{caption}\n\n{document.table(head, lines, 'l' + 'r' * (len(rates) + 1))}"


def _losses(rows: Sequence[Row], rate: float) -> list[float]:
    return [float(row["loss_after"]) for row in rows if float(row["lr"]) == rate]


def _cell(losses: Sequence[float]) -> str:
    if not losses:
        return "–"
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    count = f" ({len(losses)})" if len(losses) != 3 else ""
    return f"{statistics.mean(losses):.3f}{spread}{count}"

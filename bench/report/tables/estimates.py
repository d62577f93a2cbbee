"""What a model learns by each estimate, from estimates.csv."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """A table a model: cells down; held-out loss at each rate of the grid, and at the best."""
    return "\n\n".join(_table(own) for own in results.grouped(rows, "model").values())


def _table(rows: Sequence[Row]) -> str:
    head = ("cell", "by rate, one seed", "best rate", "held-out loss", "dev accuracy")
    lines = []
    for (name,), own in results.grouped(rows, "cell").items():
        first = [row for row in own if row["seed"] == "0"]
        best = min(first, key=_loss)["lr"]
        at_best = [row for row in own if row["lr"] == best]
        grid = ", ".join(
            f"{float(row['lr']):g}: {_loss(row):.3f}"
            for row in sorted(first, key=lambda row: float(row["lr"]))
        )
        lines.append((name, grid, f"{float(best):g}", _mean(at_best, "loss_after", 1, 3),
                      _mean(at_best, "dev_after", 100, 1)))  # fmt: skip
    first = rows[0]
    caption = (
        f"**{first['model']}** on {first['task']}, {int(first['forwards']):,} forwards of 16 "
        "examples (a backward counts as two), linear decay. Loss of 400 held-out training "
        f"examples, {first['loss_before']} before; accuracy on 500 dev examples in %, "
        f"{100 * float(first['dev_before']):.1f} ± {100 * _error(first):.1f} before. Mean ± sample "
        f"standard deviation over three seeds, or as many as in brackets. {results.caption(rows)}."
    )
    return f"{caption}\n\n{document.table(head, lines, 'llrrr')}"


def _loss(row: Row) -> float:
    loss = float(row["loss_after"])
    return loss if math.isfinite(loss) else math.inf


def _error(row: Row) -> float:
    share = float(row["dev_before"])
    return math.sqrt(share * (1 - share) / 500)


def _mean(rows: Sequence[Row], name: str, unit: float, digits: int) -> str:
    values = [unit * float(row[name]) for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    count = f" ({len(values)})" if len(values) != 3 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{count}"

"""The rates that a probe advises beside the best of a grid, from advice.csv and estimates.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from bench.report.tables.estimates import name_of
from bench.study.grid import at_best
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row

# How far apart two rates may be that are called the same.
FACTOR = 3.0


def table(advice: Sequence[Row], runs: Sequence[Row]) -> str:
    """A line a cell, and how many of them agree."""
    if not advice:
        return "No rows yet."
    lines, agreed, told = [], 0, 0
    for row in advice:
        own = [r for r in runs if r["cell"] == row["cell"]]
        if not own:
            continue
        best = float(at_best(own)[0]["lr"])
        apart = "–"
        if row["advised"]:
            told += 1
            ratio = float(row["advised"]) / best
            is_near = max(ratio, 1 / ratio) <= FACTOR
            agreed += is_near
            apart = f"{ratio:.2g} ×" + ("" if is_near else " (off)")
        lines.append(
            (
                row["model"], row["task"], name_of(row),
                _with_error(row, "squared_gradient"), _with_error(row, "mean_square"),
                _with_error(row, "curvature"), row["advised"] or "refused", f"{best:g}", apart,
            )
        )  # fmt: skip
    head = ("model", "task", "cell", "‖g‖²", "E[d²]", "h", "advised", "best of the grid", "apart")
    caption = (
        f"By {int(advice[0]['forwards']):,} forwards a cell. In {agreed} of {told} cells for which "
        f"a rate was advised it is within a factor of three of the best of the grid, by held-out "
        f"loss; {len(lines) - told} were refused. {results.caption(advice)}."
    )
    return f"{caption}\n\n{document.table(head, lines, 'lllrrrrrr')}"


def _with_error(row: Row, name: str) -> str:
    return f"{float(row[name]):.3g} ± {float(row[f'{name}_error']):.2g}"

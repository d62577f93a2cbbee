"""What each estimate learned from as many forwards, from estimates.csv."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report.tables.estimates import name_of
from bench.study.grid import at_best
from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By the kind of estimate: its name, colour and marker.
_KINDS = {
    "two_sided": ("pairs", style.BLUE, "o"),
    "one_sided": ("differences from a base loss", style.GREEN, "^"),
    "population": ("a population", style.VERMILION, "D"),
    "": ("backpropagation", style.BLACK, "s"),
}


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """A panel a model and task, a line a cell: a point a seed at the best rate, and their mean."""
    panels = list(results.grouped(rows, "model", "task").values())
    cells = [[at_best(own) for own in results.grouped(p, "cell").values()] for p in panels]
    heights = [len(own) for own in cells]
    figure.set_size_inches(style.WIDTH, 1.6 + 0.27 * sum(heights) + 0.5 * len(panels))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for (axes,), own in zip(grid, cells, strict=True):
        _panel(axes, own)
    found = {row["estimator"] for row in rows}
    handles = [
        grid[0][0].plot([], [], linestyle="", marker=marker, color=color, label=label)[0]
        for kind, (label, color, marker) in _KINDS.items()
        if kind in found
    ]
    style.frame(
        figure, "What a forward is best spent on",
        "Loss of 400 training examples that are never trained on, at the best rate of each cell's "
        "grid: a point a seed, a bar at their mean. Dashed: before training. A backward counts as "
        f"two forwards. {results.caption(rows)}.",
        handles, columns=4,
    )  # fmt: skip


def _panel(axes: Any, cells: Sequence[Sequence[Row]]) -> None:
    first = cells[0][0]
    for place, own in enumerate(cells):
        _, color, marker = _KINDS[own[0]["estimator"]]
        losses = [loss for row in own if math.isfinite(loss := float(row["loss_after"]))]
        axes.plot(losses, [place] * len(losses), marker, color=color, alpha=0.7, markersize=5)
        axes.plot([statistics.mean(losses)], [place], "|", color=color, markersize=13)
    axes.axvline(float(first["loss_before"]), color=style.FAINT, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(cells)), [name_of(own[0]) for own in cells])
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_title(f"{first['model']}, {first['task']}, {int(first['forwards']):,} forwards")
    axes.set_xlabel("held-out loss")

"""A part's results as a picture: a point a cell, its spread, and where it began."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from zokernels.lab.sweeps.plan import text
from zokernels.lab.sweeps.table import Cell


def draw(found: Sequence[Cell], path: Path, title: str) -> bool:
    """Draws the cells of a part; False if none has a result yet."""
    # Figure and its Agg canvas directly: pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    shown = [c for c in found if c.after is not None][::-1]
    if not shown:
        return False
    figure = Figure(figsize=(7, 1.4 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places, metric = range(len(shown)), shown[0].metric
    scale = 100 if metric.share else 1
    axes.errorbar(
        [scale * (c.after or 0) for c in shown],
        places,
        xerr=[scale * (c.spread or 0) for c in shown],
        fmt="o",
        capsize=3,
        color="C0",
        label="after (± spread over seeds)",
    )
    one = [i for i in places if shown[i].seeds == 1]
    # An errorbar draws its markers a little above where other lines lie.
    axes.plot(
        [scale * (shown[i].after or 0) for i in one], one, "o",
        color="white", markeredgecolor="C0", label="after, one seed", zorder=3,
    )  # fmt: skip
    axes.plot(
        [math.nan if c.before is None else scale * c.before for c in shown], places, "|",
        color="0.4", markersize=10, label="before",
    )  # fmt: skip
    majority = {c.majority for c in shown if c.majority is not None}
    if len(majority) == 1:
        axes.axvline(100 * majority.pop(), color="0.7", linestyle=":", label="most frequent answer")
    axes.set_yticks(places, [", ".join(map(text, c.values.values())) for c in shown], fontsize=8)
    axes.set_xlabel(f"dev {metric.label}")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="best", frameon=False)
    axes.grid(axis="x", color="0.92")
    figure.savefig(path, dpi=120)
    return True

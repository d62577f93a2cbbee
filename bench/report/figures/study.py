"""Every cell of the study: a column a model, a panel a part, a line an optimizer and scheme."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report.tables.study import SCHEMES, cells, task
from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "no-template": "the same without the template",
    "shots": "the same with few examples",
    "rates": "the same by learning rate",
    "long": "the same for {steps} steps",
}
# Inches of a line, and of a panel's title, axis and margin.
LINE, PANEL = 0.165, 0.62

Key = tuple[str, str, str, str]


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """Accuracy to the right, where it began as a bar; filled: several seeds, open: one."""
    found = cells(rows)
    models = results.grouped(rows, "model")
    parts = [results.distinct(own, "part") for own in models.values()]
    keys = {part: _ordered(found, part) for column in parts for part in column}
    heights = [sum(LINE * len(keys[p]) + PANEL for p in column) for column in parts]
    # One scale, so that a point more or less does not look like a difference.
    least = [min(values) for values in found.values()]
    least += [100 * float(r[k]) for r in rows for k in ("dev_accuracy_before", "dev_majority")]
    low = min(40, 10 * math.floor(min(least) / 10))
    figure.set_size_inches(style.WIDTH, 1.35 + max(heights))
    columns = figure.subfigures(1, len(models), squeeze=False)[0]
    for column, names, height in zip(columns, parts, heights, strict=True):
        spare = max(heights) - height
        ratios = [LINE * len(keys[p]) + PANEL for p in names] + ([spare] if spare > 0.01 else [])
        axes = column.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for panel, part in zip(axes, names, strict=False):
            _panel(panel, [row for row in rows if row["part"] == part], keys[part], found, low)
        for panel in axes[len(names) :]:
            panel.set_axis_off()
    style.frame(
        figure, "Every cell of the study",
        f"{len(rows)} runs of {rows[0]['steps']} steps of {rows[0]['batch_size']}, where a title "
        "has no other number; all dev examples. Mean ± sample standard deviation over seeds; open "
        "marker: one seed; squares go by backpropagation. Grey bar: before training; dotted: "
        "always the most frequent answer. "
        f"{results.caption(rows)}.",
    )  # fmt: skip


def _ordered(found: dict[Key, list[float]], part: str) -> list[Key]:
    """By scheme, number of examples, optimizer and rate."""
    optimizers = list(style.OPTIMIZERS)

    def place(key: Key) -> tuple[int, int, int, float]:
        _, shots, scheme, optimizer = key
        name, _, rate = optimizer.partition(", ")
        return (
            SCHEMES.index(scheme), int(shots or 0), optimizers.index(name), float(rate or 0)
        )  # fmt: skip

    return sorted((key for key in found if key[0] == part), key=place)


def _panel(axes: Any, rows: Sequence[Row], keys: Sequence[Key], found: Any, low: float) -> None:
    labels = []
    for place, key in enumerate(keys):
        _, shots, scheme, optimizer = key
        name, _, rate = optimizer.partition(", ")
        label, color, marker = style.OPTIMIZERS[name]
        values = found[key]
        several = len(values) > 1
        axes.errorbar(
            statistics.fmean(values), place, fmt=marker, color=color, markersize=5,
            xerr=statistics.stdev(values) if several else None, capsize=2, elinewidth=1.2,
            markerfacecolor=color if several else "white", markeredgewidth=1.2,
        )  # fmt: skip
        same = [row for row in rows if (row["shots"], row["scheme"]) == (shots, scheme)]
        before = 100 * statistics.fmean(float(row["dev_accuracy_before"]) for row in same)
        axes.plot(before, place, "|", color=style.GREY, markersize=8, zorder=1)
        extra = f", {shots} a class" if shots else f", lr {rate}" if rate else ""
        labels.append(f"{scheme} · {label}{extra}")
        if place and scheme != keys[place - 1][2]:
            axes.axhline(place - 0.5, color=style.GRID, linewidth=1)
    axes.axvline(100 * float(rows[0]["dev_majority"]), color=style.FAINT, ls=":", lw=1, zorder=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(low, 100)
    axes.set_xlabel("dev accuracy (%)", fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    part = rows[0]["part"]
    # The model stands above the first panel of its column.
    whole = f"{rows[0]['model']}, {task(rows[0])}"
    kind = next((text for name, text in TITLES.items() if part.endswith(f"-{name}")), whole)
    axes.set_title(kind.format(steps=f"{int(rows[0]['steps']):,}"), fontsize=9.5)

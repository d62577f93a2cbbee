"""The passes over the weights against the memory floor, a panel a machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report.tables import ops
from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """A line a pass, a marker a type, and each type's memory floor as a line from top to bottom."""
    machines = [list(filter(ops.is_plain, here)) for here in ops.machines(rows)]
    passes = list(
        dict.fromkeys(
            ops.which(row) for here in machines for row in here if row["case"] != ops.FLOOR
        )
    )
    figure.set_size_inches(style.WIDTH, 2.5 + 0.25 * len(passes))
    panels = figure.subplots(1, len(machines), sharex=True, sharey=True, squeeze=False)[0]
    for axes, here in zip(panels, machines, strict=True):
        _machine(axes, here, passes)
    labels = [ops.label(one).replace("`", "") for one in passes]
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    handles = panels[0].get_legend_handles_labels()[0]
    used = [row for here in machines for row in here]
    style.frame(
        figure, "One pass of add_noise_ over the weights",
        f"{int(used[0]['numel']):,} weights. Lines from top to bottom: the memory floor of each "
        f"type, p.mul_(c); further left is faster. {results.caption(used)}.",
        handles,
    )  # fmt: skip


def _machine(axes: Any, rows: Sequence[Row], passes: Sequence[ops.Pass]) -> None:
    of = {(ops.which(row), row["dtype"]): float(row["ns_per_weight"]) for row in rows}
    floors = {row["dtype"]: float(row["ns_per_weight"]) for row in rows if row["case"] == ops.FLOOR}
    shift = {"float32": -0.2, "bfloat16": 0.0, "float16": 0.2}
    for dtype, (color, marker) in style.DTYPES.items():
        if dtype in floors:
            axes.axvline(floors[dtype], color=color, linewidth=1.1, alpha=0.75)
        found = [
            (of[one, dtype], place + shift[dtype])
            for place, one in enumerate(passes)
            if (one, dtype) in of
        ]
        if not found:
            continue
        axes.plot(
            *zip(*found, strict=True), marker, color=color, markersize=5.5, label=dtype,
            markeredgecolor="white", markeredgewidth=0.5, linestyle="none",
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = ("0.1", "0.3", "1", "3", "10", "30")
    axes.set_xticks(list(map(float, ticks)), ticks)
    axes.set_xlabel("nanoseconds a weight (log scale)")
    for place in range(len(passes)):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#F5F5F5", zorder=0)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(rows[0]["machine"].partition(", ")[0].replace(" (family", "\n(family"))

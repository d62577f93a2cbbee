"""Steps on a GPU in multiples of their two plain forwards, beside the peers' steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report.figures.step import PEERS, WHOLE, finish, value_at, whiskers
from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("graphed_paired", "graphed_on_entry", "paired", "on_entry", "graphed_in_place", "in_place")

Size = tuple[str, str, str]


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """A panel a model and batch; bars of ours in colour, of the peers in grey."""
    machine = rows[-1]["machine"]
    sizes: dict[Size, dict[str, Row]] = {}
    for row in rows:
        if (row["machine"], row["dist"]) == (machine, "gaussian"):
            size = (row["model"], row["rows"], row["length"])
            sizes.setdefault(size, {})[row["perturb"]] = row
    columns = min(2, len(sizes))
    lines = -(-len(sizes) // columns)
    figure.set_size_inches(style.WIDTH, 1.3 + 2.6 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (size, modes) in zip(panels, sizes.items(), strict=False):
        _panel(axes, size, modes)
    for axes in panels[len(sizes) :]:
        axes.set_axis_off()
    used = [row for modes in sizes.values() for row in modes.values()]
    style.frame(
        figure, "Time of a fine-tuning step on a GPU",
        "Full fine-tuning by ZO-SGD, random weights. Medians, each over forwards timed in turn "
        f"with it; whiskers: quartiles; dashed: the two plain forwards. {results.caption(used)}.",
    )  # fmt: skip


def _panel(axes: Any, size: Size, modes: dict[str, Row]) -> None:
    ours = [(mode, modes[mode]) for mode in MODES if mode in modes]
    others = [(PEERS[n], float(r[n])) for _, r in ours for n in PEERS if r[n]]
    for place, (_, row) in enumerate(ours):
        ratio = float(row["ratio"])
        axes.barh(place, ratio, 0.68, color=style.BLUE)
        whiskers(axes, place, row, ratio)
    for place, (_, ratio) in enumerate(others, len(ours)):
        axes.barh(place, ratio, 0.68, color=WHOLE)
        value_at(axes, place, ratio)
    labels = [mode.replace("graphed_", "graph, ") for mode, _ in ours] + [n for n, _ in others]
    finish(axes, labels)
    axes.set_xlim(0, 1.2 * axes.get_xlim()[1])
    axes.set_title(f"{size[0].upper()}, {size[1]} × {size[2]} tokens")
    axes.set_xlabel("a step ÷ its two plain forwards")

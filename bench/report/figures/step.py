"""A step in multiples of its two plain forwards, by part, beside the peers' steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report.tables import steps
from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {
    "forwards": ("forwards", style.BLUE),
    "noise": ("noise", style.ORANGE),
    "update": ("update", style.GREEN),
    "rest": ("Python", style.PURPLE),
}
# What costs its forwards alone, and the modes of dense noise.
MODES = ("rank1", "paired", "on_entry", "in_place")
PEERS = {
    "fo-sgd": "FO-SGD, backprop",
    "fo-adamw": "FO-AdamW, backprop",
    "mezo": "MeZO, as published",
    "torchzero": "torchzero's MeZO",
}
WHOLE = "#B4B4B4"


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """A column a type: all steps on one scale, and below them zokernels' own, magnified.

    Raises:
        ValueError: If no row has peers.
    """
    cases = _cases(rows)
    if not cases:
        raise ValueError("no row has peers")
    figure.set_size_inches(style.WIDTH, 5.7)
    above, below = figure.subplots(
        2, len(cases), sharex="row", sharey="row", squeeze=False, height_ratios=[7, 3.6]
    )
    used = [row for case in cases for row in (case[0], *case[1].values())]
    for column, (row, modes) in enumerate(cases):
        _all(above[column], row, modes)
        _own(below[column], modes)
        above[column].set_title(f"{row['dtype']}: beside the peers")
        below[column].set_title(f"{row['dtype']}: zokernels, magnified")
        for axes in (above[column], below[column]):
            axes.set_xlabel("time of a step ÷ time of its two plain forwards")
    above[0].set_xlim(0, 1.15 * max(float(row[name] or 0) for row, _ in cases for name in PEERS))
    below[0].set_xlim(0, 1.22 * max(float(m["ratio"]) for _, ms in cases for m in ms.values()))
    first = cases[0][0]
    what = (
        f"{first['model'].upper()} with random weights, {first['rows']} × {first['length']} "
        "tokens, full fine-tuning by ZO-SGD: rank1 on entry, the other modes along normals. "
        "Medians, each over forwards timed in turn with it; whiskers: quartiles; dashed: the two "
        "plain forwards."
    )
    style.frame(
        figure, "Time of a fine-tuning step, by part", f"{what} {results.caption(used)}.",
        above[0].get_legend_handles_labels()[0],
    )  # fmt: skip


def _cases(rows: Sequence[Row]) -> list[tuple[Row, dict[str, Row]]]:
    """For each type the row that has peers, and the steps by `MODES`."""
    found: dict[str, tuple[Row, dict[str, Row]]] = {}
    for row, modes in steps.compared(rows):
        if row["dist"] not in ("rank1", "gaussian"):
            continue
        own = {"rank1": modes["on_entry"]} if row["dist"] == "rank1" else modes
        found[row["dtype"]] = (row, found.get(row["dtype"], (row, {}))[1] | own)
    return list(found.values())


def _all(axes: Any, row: Row, modes: dict[str, Row]) -> None:
    names = [mode for mode in MODES if mode in modes]
    peers = [name for name in PEERS if row[name]]
    for place, mode in enumerate(names):
        _stack(axes, place, modes[mode])
        value_at(axes, place, float(modes[mode]["ratio"]))
    for place, name in enumerate(peers, len(names)):
        label = "whole step of a peer" if name == peers[0] else None
        axes.barh(place, float(row[name]), 0.68, color=WHOLE, label=label)
        value_at(axes, place, float(row[name]))
    labels = [f"zokernels, {mode}" for mode in names] + [PEERS[name] for name in peers]
    finish(axes, labels)


def _own(axes: Any, modes: dict[str, Row]) -> None:
    names = [mode for mode in MODES if mode in modes]
    for place, mode in enumerate(names):
        row = modes[mode]
        end = _stack(axes, place, row)
        whiskers(axes, place, row, end)
    finish(axes, names)


def _stack(axes: Any, place: int, row: Row) -> float:
    """One bar of parts; where it ends."""
    left = 0.0
    for part, (label, color) in PARTS.items():
        axes.barh(
            place, float(row[part]), 0.68, left, color=color, edgecolor="white", linewidth=0.5,
            label=label if place == 0 else None,
        )  # fmt: skip
        left += float(row[part])
    return left


def whiskers(axes: Any, place: int, row: Row, end: float) -> None:
    """The quartiles of a bar, and its value beyond them and the bar's end."""
    ratio, low, high = (float(row[name]) for name in ("ratio", "low", "high"))
    axes.errorbar(
        ratio, place, xerr=[[ratio - low], [high - ratio]], fmt="none", ecolor=style.INK,
        elinewidth=1, capsize=2.5,
    )  # fmt: skip
    value_at(axes, place, ratio, max(end, high))


def value_at(axes: Any, place: int, value: float, beside: float | None = None) -> None:
    """A bar's value, at its end or ``beside`` it."""
    at = (value if beside is None else beside, place)
    axes.annotate(f"{value:.2f}", at, (4, 0), textcoords="offset points", va="center", fontsize=8.5)


def finish(axes: Any, labels: Sequence[str]) -> None:
    """The line of two forwards, and a label a bar."""
    axes.axvline(1, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)

"""The pictures of the benchmarks' rows, in Okabe and Ito's colours, which the colour-blind tell."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zokernels.lab.benchmarks import passes, peaks, peers, results, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

COLOURS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY)
_MARKS = ("o", "s", "D", "^", "v", "P")
_GREY = "#999999"


def ops(rows: Sequence[Row]) -> Figure:
    """Passes as multiples of their floors: a line a pass, a mark a type."""
    lines = list(dict.fromkeys(_pass(row) for row in rows if row["case"] != "floor"))
    figure, axes = _canvas(len(lines))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for place, dtype in enumerate(dtypes):
        shown = [row for row in rows if row["dtype"] == dtype and row["case"] != "floor"]
        middle = [float(row["ratio_to_floor_median"]) for row in shown]
        spread = [
            [m - float(row["low"]) for m, row in zip(middle, shown, strict=True)],
            [float(row["high"]) - m for m, row in zip(middle, shown, strict=True)],
        ]
        shift = 0.18 * (place - (len(dtypes) - 1) / 2)
        axes.errorbar(
            middle, [lines.index(_pass(row)) + shift for row in shown], xerr=spread,
            fmt=_MARKS[place % len(_MARKS)], color=COLOURS[place % len(COLOURS)], markersize=4.5,
            capsize=2, label=dtype,
        )  # fmt: skip
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time of a pass / time of its memory floor (log scale; median, quartiles)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    weights = f"{int(rows[0]['numel']):,} weights"
    return _finish(figure, axes, lines, f"Passes over {weights}, beside their memory floor", rows)


def step(rows: Sequence[Row]) -> Figure:
    """Steps as multiples of two plain forwards: their parts, and the peers' whole steps."""
    parts = ("forwards", "noise", "update", "rest")
    first = peers.beside(rows)
    others = [
        (title, float(first[name])) for name, title in peers.TITLES.items() if first.get(name)
    ]
    lines = [f"this step, {row['perturb']}" for row in rows] + [title for title, _ in others]
    figure, axes = _canvas(len(lines))
    named: set[str] = set()
    for place, row in enumerate(rows):
        left = 0.0
        # Of a step on a GPU its parts are not known.
        known = {part: float(row[part]) for part in parts if row[part]}
        shown = known or {"step": float(row["ratio"])}
        for (part, value), colour in zip(shown.items(), COLOURS, strict=False):
            label = None if part in named else part
            named.add(part)
            axes.barh(place, max(0.0, value), left=left, color=colour, height=0.6, label=label)
            left += max(0.0, value)
        middle, low, high = (float(row[name]) for name in ("ratio", "low", "high"))
        axes.errorbar(middle, place, xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
                      fmt="|", color="black", capsize=3)  # fmt: skip
        axes.text(max(left, high), place, f"  {middle:.2f}", va="center", fontsize=8)
    for place, (_, ratio) in enumerate(others, len(rows)):
        axes.barh(place, ratio, color=_GREY, height=0.6)
        axes.text(ratio, place, f"  {ratio:.2f}", va="center", fontsize=8)
    # Room for the numbers beside the bars.
    axes.set_xlim(0, 1.08 * axes.get_xlim()[1])
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_xlabel("time of a step / time of two plain forwards (median, quartiles)")
    axes.legend(frameon=False, fontsize=8, title="parts of this step", title_fontsize=8)
    first = rows[0]
    title = (
        f"A step of {first['model']}, {first['scheme']}, {first['dtype']}, {first['rows']} × "
        f"{first['length']} tokens, {first['optimizer']}"
    )
    return _finish(figure, axes, lines, title, rows)


def memory(rows: Sequence[Row]) -> Figure:
    """Peak memory against length, as in the documents."""
    with style.drawn(peaks.draw, [[{k: str(v) for k, v in row.items()} for row in rows]]) as found:
        return found


def codegen(rows: Sequence[Row]) -> Figure:
    """Machine instructions a weight of each kernel, a bar an architecture."""
    lines = list(dict.fromkeys(row["case"] for row in rows))
    kinds = list(dict.fromkeys(row["sm"] for row in rows))
    figure, axes = _canvas(len(lines))
    height = 0.8 / len(kinds)
    for place, sm in enumerate(kinds):
        shown = [row for row in rows if row["sm"] == sm]
        at = [lines.index(row["case"]) + height * (place - (len(kinds) - 1) / 2) for row in shown]
        counts = [float(row["instructions_per_weight"]) for row in shown]
        axes.barh(at, counts, height, color=COLOURS[place % len(COLOURS)], label=f"sm_{sm}")
    axes.set_xlabel("machine instructions a weight")
    axes.legend(frameon=False, fontsize=8)
    return _finish(figure, axes, lines, "Machine code of the Triton kernels", rows)


def _pass(row: Row) -> str:
    name = row["op"] if row["op"].startswith("add_noise") else f"update {row['op']}"
    what = passes.words(name, row["dist"], row["variant"], row["shape"])
    return f"{what}: {row['case']}"


def _canvas(lines: int) -> tuple[Figure, Axes]:
    # Figure and its Agg canvas directly: pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.9 + 0.27 * lines), layout="constrained")
    return figure, figure.subplots()


def _finish(
    figure: Figure, axes: Axes, lines: Sequence[str], title: str, rows: Sequence[Row]
) -> Figure:
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.supxlabel("\n".join(textwrap.wrap(results.caption(rows), 125)), fontsize=7, color="0.35")
    return figure

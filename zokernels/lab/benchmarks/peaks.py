"""The picture of peak memory against the length of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {name: title for name, (title, _, _) in style.OPTIMIZERS.items()} | {
    "inference": "two forwards",
    "hybrid": "Hybrid",
}
GPU = 80  # GiB of one A100 or H100
_OWN = {"inference": (style.FAINT, "x"), "hybrid": ("#8C510A", "X")}


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """A panel a model, type and batch of several lengths: lines by arithmetic, marks measured.

    Raises:
        ValueError: If no batch has rows of two lengths.
    """
    from matplotlib.lines import Line2D

    usual = [row for row in rows if row["perturb"] in ("", "on_entry")]
    panels = results.grouped(usual, "model", "dtype", "rows")
    kept = {key: own for key, own in panels.items() if len({row["length"] for row in own}) > 1}
    if not kept:
        raise ValueError("no batch has rows of two lengths")
    figure.set_size_inches(style.WIDTH, 4.6)
    names = [n for n in NAMES if any(n == row["optimizer"] for own in kept.values() for row in own)]
    axes_line = figure.subplots(1, len(kept), squeeze=False)[0]
    for axes, ((model, dtype, batch), own) in zip(axes_line, kept.items(), strict=True):
        _panel(axes, own, names)
        how = "" if any(row["peak_mb"] for row in own) else ", arithmetic only"
        rows_of = "row" if batch == "1" else "rows"
        axes.set_title(f"{model}, {dtype}, {batch} {rows_of}{how}")
    axes_line[0].set_ylabel("peak memory of a step, GiB")
    handles: list[Any] = [
        Line2D(
            [], [], color=_look(n)[0], marker=_look(n)[1], markerfacecolor="white", label=NAMES[n]
        )
        for n in names
    ]
    style.frame(
        figure,
        "Memory of a step: lines by arithmetic, marks measured",
        f"All weights, perturbed on entry; batches of random tokens. {results.caption(rows)}.",
        handles,
        columns=5,
    )


def _panel(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    # The first are above those that lie on them.
    for name in reversed(names):
        mine = [row for row in rows if row["optimizer"] == name]
        # A line for each kind of direction.
        for shown in results.grouped(mine, "dist").values():
            shown.sort(key=lambda row: int(row["length"]))
            colour, mark = _look(name)
            axes.plot(
                [int(row["length"]) for row in shown], [_gib(row["theory_mb"]) for row in shown],
                color=colour, linewidth=1.6, linestyle="-" if name in style.OPTIMIZERS else "--",
            )  # fmt: skip
            known = [row for row in shown if row["peak_mb"]]
            axes.plot(
                [int(row["length"]) for row in known], [_gib(row["peak_mb"]) for row in known],
                linestyle="", marker=mark, color=colour, markerfacecolor="white", markersize=6,
            )  # fmt: skip
    lengths = sorted({int(row["length"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a row (log scale)")
    if axes.get_ylim()[1] > GPU:
        axes.axhline(GPU, color=style.INK, linewidth=0.8, linestyle=":")
        axes.text(lengths[0], GPU, f"one GPU of {GPU} GiB", fontsize=8, va="bottom")


def _look(name: str) -> tuple[str, str]:
    if name in _OWN:
        return _OWN[name]
    _, colour, mark = style.OPTIMIZERS[name]
    return colour, mark


def _gib(megabytes: str) -> float:
    return float(megabytes) / 1024

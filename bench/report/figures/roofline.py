"""The kernels' instructions against their bytes on sm_90, and which of the two binds on an H200."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report.tables import codegen
from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What stands at a kernel's rightmost point.
NAMES = {
    ("add_noise", "gaussian"): "add_noise",
    ("add_noise", "rademacher"): "add_noise, signs",
    ("sign", "gaussian"): "sign",
    ("momentum", "gaussian"): "momentum",
    ("adam", "gaussian"): "Adam",
    ("amsgrad", "gaussian"): "AMSGrad",
}
SMALLEST_BYTES, LARGEST_BYTES, LARGEST_COUNT = 3.2, 40, 160


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """A point a kernel and type; above the line instructions bind, below it memory."""
    figure.set_size_inches(style.WIDTH, 5.0)
    shown = codegen.chosen(rows)
    axes = figure.subplots()
    balance = codegen.LANES_PER_SECOND / codegen.BYTES_PER_SECOND
    ends = [SMALLEST_BYTES, LARGEST_BYTES]
    line = [balance * x for x in ends]
    axes.fill_between(ends, line, LARGEST_COUNT * 2, color=style.ORANGE, alpha=0.1, linewidth=0)
    axes.fill_between(ends, 1, line, color=style.SKY, alpha=0.12, linewidth=0)
    axes.plot(ends, line, color=style.INK, linewidth=1.2)
    axes.text(3.4, 105, "bound by instructions", fontsize=9.5, style="italic")
    axes.text(24, 5, "bound by memory", fontsize=9.5, style="italic")
    for dtype, (color, marker) in style.DTYPES.items():
        points = [
            (int(row["bytes_per_weight"]), float(row["instructions_per_weight"]))
            for row in shown
            if row["case"].split()[1] == dtype
        ]
        # float16 lies under bfloat16 in most kernels: open, so that both show.
        axes.plot(
            *zip(*points, strict=True), marker, color=color, label=dtype, linestyle="none",
            markersize=10 if dtype == "float16" else 6,
            markerfacecolor="none" if dtype == "float16" else color,
        )  # fmt: skip
    for (op, dist), name in NAMES.items():
        points = sorted(
            (int(row["bytes_per_weight"]), float(row["instructions_per_weight"]))
            for row in shown
            if (row["case"].split()[0], row["case"].split()[-1]) == (op, dist)
        )
        axes.plot(*zip(*points, strict=True), color=style.GREY, linewidth=1, zorder=1)
        low = points[-1][0] > 8
        axes.annotate(
            name, points[-1], (0, -16) if low else (9, -3), textcoords="offset points",
            ha="center" if low else "left", fontsize=9,
        )  # fmt: skip
    for row in shown:
        if row["case"] in ("add_noise bfloat16 gaussian", "add_noise float32 gaussian"):
            _seeds(axes, row)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(SMALLEST_BYTES, LARGEST_BYTES)
    axes.set_ylim(4, LARGEST_COUNT)
    axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axes.set_yticks([4, 8, 16, 32, 64, 128], ["4", "8", "16", "32", "64", "128"])
    axes.set_xlabel("bytes read and written, a weight (log scale)")
    axes.set_ylabel("machine instructions, a weight (log scale)")
    style.frame(
        figure, f"What the kernels cost on sm_{codegen.SM}, counted without a GPU",
        f"One seed, and add_noise with more in one pass; grey: one kernel's types. Line: "
        f"{balance:.1f} instructions a byte, where an H200's instructions (one a lane and clock) "
        f"and its copy bandwidth ({codegen.BYTES_PER_SECOND / 1e12:.1f} TB/s) take equally long. "
        f"Not timed. {results.caption(shown)}.",
        axes.get_legend_handles_labels()[0],
    )  # fmt: skip


def _seeds(axes: Any, row: Row) -> None:
    """Where up to three further seeds in the same pass lead."""
    at, first = int(row["bytes_per_weight"]), float(row["instructions_per_weight"])
    more = [first + k * float(row["instructions_per_further_seed"]) for k in range(4)]
    color = style.DTYPES[row["case"].split()[1]][0]
    axes.plot([at] * 4, more, "-", color=color, linewidth=1, zorder=1)
    axes.plot([at] * 3, more[1:], "_", color=color, markersize=9)
    for count, height in enumerate(more[1:], 2):
        text = f"{count} seeds" if count == len(more) else str(count)
        axes.annotate(
            text, (at, height), (-8, -3), textcoords="offset points", fontsize=8, color=color,
            ha="right",
        )  # fmt: skip

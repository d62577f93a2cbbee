"""The reward of a population by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zokernels.lab.benchmarks import results, style
from zokernels.lab.benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    """A line a seed."""
    figure.set_size_inches(style.WIDTH, 3.4)
    axes = figure.subplots()
    colors = (style.BLUE, style.ORANGE, style.GREEN)
    for ((seed,), own), color in zip(results.grouped(rows, "seed").items(), colors, strict=True):
        steps = [int(row["step"]) for row in own]
        axes.plot(steps, [float(row["reward"]) for row in own], color=color, label=f"seed {seed}")
    axes.axhline(0.1, color=style.INK, linewidth=0.8, linestyle=":", label="chance")
    axes.set_xlabel("step")
    axes.set_ylabel("share of right answers")
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right", frameon=False)
    style.frame(
        figure, "A reward without a gradient",
        "A tiny Llama with random weights learns to say the first of three digits; on 500 prompts "
        f"that are not trained on. {results.caption(rows)}.",
    )  # fmt: skip

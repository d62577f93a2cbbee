"""A probe as a picture: what a step gains by its rate, which ε hold, and which part learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import zokernels as zk
from zokernels.lab.benchmarks import style
from zokernels.lab.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 81


def write(found: zk.Probe, path: Path, title: str) -> None:
    """Draws it into a file.

    Raises:
        RunError: If it cannot be written; what was there before is there still.
    """
    try:
        with style.drawn(_draw, (found, title)) as figure:
            style.save(figure, path)
    except OSError as error:
        raise RunError(
            f"--plot {path} could not be written: {error.strerror}. All else is done."
        ) from None


def _draw(figure: Figure, found: zk.Probe, title: str) -> None:
    rows = 2 if found.parts else 1
    heights = [3.6, 1 + 0.35 * len(found.parts)][:rows]
    figure.set_size_inches(style.WIDTH, 0.6 + sum(heights))
    grid = figure.add_gridspec(rows, 2, height_ratios=heights)
    _gain(figure.add_subplot(grid[0, 0]), found)
    _ladder(figure.add_subplot(grid[0, 1]), found)
    if found.parts:
        _parts(figure.add_subplot(grid[1, :]), found)
    numbers = (
        f"‖g‖² {found.whole.squared_gradient}, E[d²] {found.mean_square}, "
        f"h {found.whole.curvature}; {found.forwards:,} forwards. Bands and bars: one error."
    )
    style.frame(figure, f"A probe of {title}", numbers)


def _gain(axes: Axes, found: zk.Probe) -> None:
    """What a step lowers the loss by, against its rate."""
    axes.set_title("What a step gains")
    if found.largest_rate is None or found.largest_rate.value <= 0:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no rate follows", color=style.FAINT, ha="center")
        return
    axes.set_xlabel("learning rate")
    axes.set_ylabel("the loss falls by")
    top = 1.25 * found.largest_rate.value
    rates = [top * i / (_POINTS - 1) for i in range(_POINTS)]
    falls = [found.fall(1, rate) for rate in rates]
    middle = [f.value for f in falls]
    axes.fill_between(
        rates, [f.value - f.error for f in falls], [f.value + f.error for f in falls],
        color=style.SKY, alpha=0.3, linewidth=0,
    )  # fmt: skip
    axes.plot(rates, middle, color=style.BLUE)
    axes.axhline(0, color=style.FAINT, linewidth=0.8)
    if found.rate is not None:
        axes.plot(
            found.rate.value, found.fall().value, "o", color=style.VERMILION,
            label=f"advised: {found.rate.value:.2g}",
        )  # fmt: skip
        axes.legend(loc="lower left")
    axes.ticklabel_format(scilimits=(-2, 2))


def _ladder(axes: Axes, found: zk.Probe) -> None:
    """How far each ε's slopes are from a neighbour's."""
    shown = [r for r in found.ladder if math.isfinite(r.deviation)]
    axes.set_title("Which ε hold")
    axes.set_xlabel("ε")
    axes.set_ylabel("slopes differ from a neighbour's by")
    # A log scale has no 0, which is where both slopes have the same bits.
    heights = [max(r.deviation, 1e-7) for r in shown]
    axes.loglog([r.eps for r in shown], heights, "o-", color=style.BLUE, markersize=4)
    if found.eps_range is not None:
        axes.axvspan(*found.eps_range, color=style.GREEN, alpha=0.15, linewidth=0)
    axes.axhline(found.tolerance, color=style.FAINT, linewidth=0.8, linestyle="--")
    axes.axvline(found.eps, color=style.VERMILION, linewidth=1, linestyle=":")


def _parts(axes: Axes, found: zk.Probe) -> None:
    """The gradient's square of each part beside what a step sees along it."""
    places = range(len(found.parts))
    axes.set_title("Where the gradient is, and where the noise")
    shown = [
        (-0.2, style.BLUE, "‖g‖²: the gradient", [p.squared_gradient for p in found.parts]),
        (0.2, style.GREY, "E[d²]: with its noise", [p.mean_square for p in found.parts]),
    ]
    for shift, colour, name, numbers in shown:
        axes.barh(
            [i + shift for i in places], [n.value for n in numbers],
            xerr=[n.error for n in numbers], color=colour, height=0.36, capsize=2, label=name,
            error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    axes.set_yticks(places, [f"{p.label} ({p.weights:,})" for p in found.parts], fontsize=8)
    axes.invert_yaxis()
    axes.legend(loc="lower right")

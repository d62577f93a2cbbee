"""How every figure looks: one palette, safe for the colour-blind, on opaque white."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What all figures share; another number has all of them drawn anew.
VERSION = 1
KEYWORD = "zokernels-digest"

# Inches and dots an inch: a README shows 900 of the 1,800 pixels, others see all of them.
WIDTH, DPI = 9.0, 200

# Okabe and Ito, "Color Universal Design" (2008); its yellow is too light for lines on white.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"
INK, FAINT, GRID = "#222222", "#5A5A5A", "#E4E4E4"

# An optimizer's name, colour and marker, in every figure: circles and the like go by zeroth order,
# squares by backpropagation.
OPTIMIZERS = {
    "zo-sgd": ("ZO-SGD", BLUE, "o"),
    "zo-adam": ("ZO-Adam", VERMILION, "o"),
    "zo-sgd-sign": ("ZO-SGD-Sign", GREEN, "^"),
    "zo-sgd-mmt": ("ZO-SGD-MMT", SKY, "v"),
    "zo-sgd-cons": ("ZO-SGD-Cons", PURPLE, "D"),
    "forward-grad": ("Forward-Grad", ORANGE, "P"),
    "fo-sgd": ("FO-SGD", GREY, "s"),
    "fo-adam": ("FO-Adam", BLACK, "s"),
}
DTYPES = {"float32": (BLUE, "o"), "bfloat16": (VERMILION, "D"), "float16": (GREEN, "^")}

_RC = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "hatch.linewidth": 0.6,
}


def png(draw: Callable[..., None], rows: Any, digest: str) -> bytes:
    """A drawn figure, with the digest of what it was drawn from.

    Args:
        draw: Gets an empty figure and the rows of each source.
        rows: Of each source.
        digest: Goes into the file's text.

    Raises:
        ImportError: If there is no matplotlib.
    """
    # Figure directly: pyplot would choose a backend for the whole process.
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=(WIDTH, 4))
        draw(figure, *rows)
        file = io.BytesIO()
        # Without matplotlib's version, the bytes depend on the pixels alone.
        figure.savefig(file, format="png", dpi=DPI, metadata={KEYWORD: digest, "Software": None})
    return file.getvalue()


def title(figure: Figure, text: str, caption: str) -> None:
    """Put a heading above all panels, and below them where the rows were measured."""
    figure.suptitle(text, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    lines = textwrap.fill(caption, 142)
    figure.supxlabel(lines, x=0.012, ha="left", fontsize=7.5, color=FAINT)

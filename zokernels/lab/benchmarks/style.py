"""How every figure looks: one palette, safe for the colour-blind, on opaque white."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zokernels.lab import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What all figures share; another number has all of them drawn anew.
VERSION = 1
KEYWORD = "zokernels-digest"

# Inches and dots an inch: a README shows 900 of the 1,440 pixels, others see all of them.
WIDTH, DPI = 9.0, 160

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
    with drawn(draw, rows) as figure:
        file = io.BytesIO()
        # Without matplotlib's version, the bytes depend on the pixels alone.
        figure.savefig(file, format="png", dpi=DPI, metadata={KEYWORD: digest, "Software": None})
    return file.getvalue()


@contextlib.contextmanager
def drawn(draw: Callable[..., None], rows: Any) -> Iterator[Figure]:
    """The figure, while matplotlib's settings are those of this file."""
    # Figure directly: pyplot would choose a backend for the whole process.
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=(WIDTH, 4), dpi=DPI)
        draw(figure, *rows)
        yield figure


def frame(figure: Figure, title: str, caption: str, handles: Any = (), columns: int = 0) -> None:
    """Put a heading and a legend above all panels, and below them where the rows were measured.

    Args:
        figure: Of its final size.
        title: One line.
        caption: Wrapped.
        handles: Of the legend, each with a label; none for no legend.
        columns: Of the legend; all in one line if 0.
    """
    _, height = figure.get_size_inches()
    lines = textwrap.wrap(caption, 150)
    columns = columns or max(1, len(handles))
    legend_lines = -(-len(handles) // columns)
    above = 0.42 + 0.24 * legend_lines + (0.08 if legend_lines else 0)
    below = 0.12 + 0.155 * len(lines)
    figure.text(0.012, 1 - 0.1 / height, title, ha="left", va="top", fontsize=13, fontweight="bold")
    figure.text(
        0.012, 0.08 / height, "\n".join(lines), ha="left", va="bottom", fontsize=7.5, color=FAINT,
        linespacing=1.3,
    )  # fmt: skip
    if handles:
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.0035, 1 - 0.36 / height),
            ncols=columns, columnspacing=1.5,
        )  # fmt: skip
    room = (0, below / height, 1, 1 - (above + below) / height)
    figure.set_layout_engine("constrained", rect=room, h_pad=0.08, w_pad=0.06)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure whole or not at all, in the form that its name ends with.

    Raises:
        OSError: If it cannot be written; what was there before is there still.
    """
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
    files.write_bytes(path, file.getvalue())

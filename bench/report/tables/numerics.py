"""What 16-bit weights do to an estimate and an update, from numerics.csv."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row

_COLUMNS = (
    ("none", "float32"), ("nearest", "float32"), ("stochastic", "float32"),
    ("nearest", "16 bits"), ("stochastic", "16 bits"),
)  # fmt: skip


def estimate(rows: Sequence[Row]) -> str:
    """Gain and noise of the estimate, a line a type and ε."""
    here = _of("estimate", rows)
    of = {(r["dtype"], r["scale"], r["rounding"], r["forward"]): r for r in here}
    lines = []
    for dtype, scale in dict.fromkeys((r["dtype"], r["scale"]) for r in here):
        cells = [of[(dtype, scale, *column)] for column in _COLUMNS]
        gains = [f"{float(r['gain']):.3f} ± {float(r['gain_error']):.3f}" for r in cells[:3]]
        noises = [f"{float(r['noise']):.2g}" for r in cells]
        lines.append([dtype, scale, *gains, *noises, _percent(cells[1]["unmoved"])])
    head = (
        "weights", "ε", "gain, float32", "nearest", "stochastic", "noise, float32", "nearest",
        "stochastic", "nearest, 16-bit forward", "stochastic, 16-bit forward", "unmoved, nearest",
    )  # fmt: skip
    return f"{document.table(head, lines, 'l' + 'r' * 10)}\n\n{results.caption(rows)}."


def rank1(rows: Sequence[Row]) -> str:
    """Gain and noise of the estimate along rank one, a line a type and ε."""
    ways = ("float32", "whole", "vectors")
    of = {(r["dtype"], r["scale"], r["experiment"]): r for r in rows}
    lines = []
    for dtype, scale in dict.fromkeys((r["dtype"], r["scale"]) for r in _of("estimate", rows)):
        cells = [of[(dtype, scale, f"rank1, {way}")] for way in ways]
        gains = [f"{float(r['gain']):.3f} ± {float(r['gain_error']):.3f}" for r in cells]
        lines.append([dtype, scale, *gains, *(f"{float(r['noise']):.2g}" for r in cells)])
    head = (
        "weights", "ε", "gain, float32", "whole weights", "two vectors", "noise, float32",
        "whole weights", "two vectors",
    )  # fmt: skip
    return document.table(head, lines, "l" + "r" * 7)


def update(rows: Sequence[Row]) -> str:
    """Gain and noise of the update, a line a type, size and rounding."""
    lines = [
        [r["dtype"], f"{float(r['scale']):g}", r["rounding"]]
        + [r[k] for k in ("gain", "gain_error", "noise")]
        + [_percent(r["unmoved"])]
        for r in _of("update", rows)
    ]
    head = ("weights", "update / weights", "rounded", "gain", "± (1 s.e.)", "noise", "unmoved")
    return document.table(head, lines, "lrlrrrr")


def restore(rows: Sequence[Row]) -> str:
    """What is left of the weights after +ε, −2ε, +ε, a line a type and number of steps."""
    lines = [
        [r["dtype"], r["scale"], _percent(str(1 - float(r["unmoved"]))), _percent(r["noise"])]
        for r in _of("restore", rows)
    ]
    head = ("weights", "steps at lr 0", "weights changed", "drift, rms")
    return document.table(head, lines, "lrrr")


def _of(experiment: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["experiment"] == experiment]


def _percent(share: str) -> str:
    value = float(share) * 100
    return f"{value:.2g}%" if value < 10 and not math.isclose(value, 0) else f"{value:.0f}%"

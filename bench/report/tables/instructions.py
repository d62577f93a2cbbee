"""What a weight costs on 64-bit ARM, from instructions.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """A line a type and distribution."""
    lines = []
    for (dtype, dist), both in results.grouped(rows, "dtype", "dist").items():
        of = {row["isa"]: row for row in both}
        times = _number(of["portable"]) / _number(of["neon"])
        cells = [_cell(of[isa]) for isa in ("portable", "neon")]
        lines.append((f"`add_noise_` {dist}", dtype, *cells, f"{times:.1f}"))
    tools = [*results.distinct(rows, "compiler"), *results.distinct(rows, "emulator")]
    caption = f"{', '.join(tools)}; {results.caption(rows)}. In brackets what was predicted."
    head = ("pass", "type", "portable", "NEON", "times as few")
    return f"{caption}\n\n{document.table(head, lines, 'llrrr')}"


def _number(row: Row) -> float:
    return float(row["instructions_per_weight"])


def _cell(row: Row) -> str:
    predicted = f" ({row['predicted']})" if row["predicted"] else ""
    return f"{_number(row):.1f}{predicted}"

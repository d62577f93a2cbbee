"""Bytes of a base in few bits, from quantised.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """A line a model, a column a form, in GiB; and of one what its tensors hold."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row["model"], {})[row["kind"]] = row
    lines = []
    for model, own in cells.items():
        lines.append([model, *(f"{float(own[k]['mib']) / 1024:.2f}" for k in kinds)])
        if own[kinds[0]]["measured_mib"]:
            there = (f"{float(own[k]['measured_mib']) / 1024:.2f}" for k in kinds)
            lines.append([f"{model}, measured", *there])
    head = ["GiB of weights", *kinds]
    return f"{results.caption(rows)}.\n\n{document.table(head, lines, 'l' + 'r' * len(kinds))}"

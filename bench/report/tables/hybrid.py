"""What a hybrid step stores for its backward, from hybrid.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """A line a split and variant."""
    head = ("layers by zeroth order", "`reuse_forward`", "forwards", "stored, MB", "share")
    lines = [
        (r["split"], r["reuse_forward"], r["forwards"], f"{int(r['stored_bytes']) / 1e6:.1f}",
         r["share"])
        for r in rows
    ]  # fmt: skip
    return document.table(head, lines, "llrrr")

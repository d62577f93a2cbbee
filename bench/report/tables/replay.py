"""Replay against the making of its noise, and a record's cost, from replay.csv."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """A column a type."""
    steps = rows[0]["steps"]
    of = {
        f"floor: making the noise of the steps, one pass of {steps} seeds, ns a weight and step":
            lambda r: f"{float(r['floor_ns']):.3f}",
        "replay, its check of the base model included":
            lambda r: f"{float(r['replay_ns']):.3f} ({float(r['replay_over_floor']):.2f} × floor)",
        "step by step, the weights through the memory each time":
            lambda r: f"{float(r['by_step_ns']):.3f}",
        "recording a step": lambda r: f"{r['record_us']} µs",
        "a sync to the disk, at most one a second": lambda r: f"{r['sync_ms']} ms",
        "a step's record": lambda r: f"{r['bytes_a_step']} bytes",
    }  # fmt: skip
    lines = [(name, *map(cell, rows)) for name, cell in of.items()]
    head = ("", *(row["dtype"] for row in rows))
    caption = (
        f"{results.caption(rows)}; {int(rows[0]['numel']):,} weights, {steps} steps; the ratios "
        "are of medians of the same moments."
    )
    return caption + "\n\n" + document.table(head, lines, "l" + "r" * len(rows))


def recording(rows: Sequence[Row], step_ms: float = 2.5) -> str:
    """What share of a short step the recording of it takes, at most one sync a second."""
    records = max(float(row["record_us"]) for row in rows) / (1000 * step_ms)
    syncs = max(float(row["sync_ms"]) for row in rows) / 1000
    return (
        f"Recording takes {100 * (records + syncs):.2f} % of a step of {step_ms:g} ms "
        f"({100 * records:.2f} % in records, {100 * syncs:.2f} % in syncs), and less of a "
        "longer one."
    )

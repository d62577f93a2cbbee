"""The allocator's peak over a step by length, beside the arithmetic of `zokernels bench memory`.

Tried on a CPU it measures the process, with the CPU's own kernels: the interpreter's memory would
be most of it.
"""

from __future__ import annotations

from functools import partial

from bench.gpu.part import Job, Part
from zokernels.lab.benchmarks import memory
from zokernels.lab.benchmarks.instruments.footprint import Cell

MODEL, ROWS = "opt-1.3b", 8
OPTIMIZERS = ("zo-sgd", "fo-sgd", "fo-adam")
# The two ends first.
LENGTHS = (2048, 256, 1024, 512)
DRY_LENGTHS = (24,)
# The model is built anew for each; two steps of the longest take 2 s by backpropagation.
CELL_SECONDS = 3.3


def jobs(part: Part) -> list[Job]:
    """A job an optimizer and length."""
    model, rows = ("opt-tiny", 2) if part.dry else (MODEL, ROWS)
    return [
        Job(
            f"{name} {rows} x {length}", CELL_SECONDS,
            partial(_measure, part, Cell(model, name, rows, length, "bfloat16",
                                         device=part.device)),
        )
        for length in (DRY_LENGTHS if part.dry else LENGTHS)
        for name in OPTIMIZERS
    ]  # fmt: skip


def _measure(part: Part, cell: Cell) -> list[str]:
    row = memory.row(cell, here=True)
    part.keep(memory.COLUMNS, [row])
    measured = row["peak_mb"] and f"{float(row['peak_mb']) / 1024:.2f} GiB"
    return [
        f"{cell.model} {cell.optimizer} {cell.rows} x {cell.length}: "
        f"{measured or row['source']}, by arithmetic {float(row['theory_mb']) / 1024:.2f} GiB"
    ]


if __name__ == "__main__":
    this = Part.of_arguments("memory")
    raise SystemExit(this.run(jobs(this)))

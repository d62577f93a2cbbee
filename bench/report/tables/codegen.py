"""The floor that the kernels' machine code and traffic set, from codegen.csv.

A kernel can't be faster than its bytes take at the card's copy bandwidth, nor than its instructions
take at one a lane and clock. The second is a lower bound: conversions and wide products issue at a
half or less of that rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row

# An H200: multiprocessors × lanes × clock, and the copy bandwidth measured on one.
LANES_PER_SECOND = 132 * 128 * 1.98e9
BYTES_PER_SECOND = 4.3e12
SM = "90"


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The rows of the architecture that is shown.

    Raises:
        ValueError: If there are none.
    """
    found = [row for row in rows if row["sm"] == SM]
    if not found:
        raise ValueError(f"there are no rows of sm_{SM}")
    return found


def picoseconds(row: Row) -> tuple[float, float]:
    """(instructions, memory): picoseconds that a weight takes at least."""
    instructions = float(row["instructions_per_weight"]) / LANES_PER_SECOND * 1e12
    return instructions, int(row["bytes_per_weight"]) / BYTES_PER_SECOND * 1e12


def binding_seeds(row: Row) -> int:
    """The least number of seeds in one pass with which instructions take longer than bytes."""
    issue, memory = picoseconds(row)
    further = float(row["instructions_per_further_seed"]) / LANES_PER_SECOND * 1e12
    return 1 if issue > memory else int((memory - issue) / further) + 2


def table(rows: Sequence[Row]) -> str:
    """A line a kernel."""
    shown = chosen(rows)
    lines = []
    for row in shown:
        issue, memory = picoseconds(row)
        bound = "instructions" if issue > memory else "memory"
        lines.append(
            (row["case"], row["instructions_per_weight"], row["instructions_per_further_seed"],
             row["registers"], row["bytes_per_weight"], f"{issue:.2f}", f"{memory:.2f}", bound,
             binding_seeds(row))
        )  # fmt: skip
    head = (
        "kernel", "instructions", "a further seed", "registers", "bytes", "instructions, ps",
        "memory, ps", "bound by", "seeds until instructions bind",
    )  # fmt: skip
    caption = (
        f"{results.caption(shown)}, sm_{SM}; a weight's bytes read and written, machine "
        "instructions, and the least time of each on an H200."
    )
    return caption + "\n\n" + document.table(head, lines, "lrrrrrrlr")


def reading(rows: Sequence[Row]) -> str:
    """How docs/performance.md reads the table."""
    narrow, wide = _gaussians(rows)
    by_memory = sum(binding_seeds(row) > 1 for row in chosen(rows))
    of = {row["case"]: row for row in chosen(rows)}
    signs, rank1 = (of[f"add_noise bfloat16 {dist}"] for dist in ("rademacher", "rank1"))
    return (
        f"Read so: with one seed memory binds {by_memory} of {len(chosen(rows))} kernels. Of a "
        f"Gaussian `add_noise` the instructions take {_share(narrow)} of the memory's time in "
        f"bfloat16 and {_share(wide)} in float32; with {binding_seeds(narrow)} seeds in bfloat16, "
        f"or {binding_seeds(wide)} in float32, they bind the pass. Replaying many seeds in one "
        f"pass is making noise and nothing else, {_further(narrow)} instructions a weight and "
        f"seed ({_further(signs)} with signs, {_further(rank1)} with signs of rows and columns)."
    )


def _gaussians(rows: Sequence[Row]) -> tuple[Row, Row]:
    of = {row["case"]: row for row in chosen(rows)}
    return of["add_noise bfloat16 gaussian"], of["add_noise float32 gaussian"]


def _further(row: Row) -> str:
    return f"{float(row['instructions_per_further_seed']):.1f}"


def _share(row: Row) -> str:
    issue, memory = picoseconds(row)
    return f"{issue / memory:.0%}".replace("%", " %")

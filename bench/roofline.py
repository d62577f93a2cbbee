"""The floor that the kernels' machine code and traffic set, from bench/results/codegen.csv.

A kernel can't be faster than its bytes take at the card's copy bandwidth, nor than its instructions
take at one a lane and clock. The second is a lower bound: conversions and wide products issue at a
half or less of that rate.
"""

from __future__ import annotations

# An H200: multiprocessors × lanes × clock, and the copy bandwidth measured on one.
LANES_PER_SECOND = 132 * 128 * 1.98e9
BYTES_PER_SECOND = 4.3e12
SM = "90"

Row = dict[str, str]


def picoseconds(row: Row) -> tuple[float, float]:
    """(instructions, memory): picoseconds that a weight takes at least."""
    instructions = float(row["instructions_per_weight"]) / LANES_PER_SECOND * 1e12
    return instructions, int(row["bytes_per_weight"]) / BYTES_PER_SECOND * 1e12


def table(rows: list[Row]) -> str:
    """A line a kernel."""
    versions = ", ".join(dict.fromkeys(row["triton"] for row in rows))
    lines = [
        f"Triton {versions}, sm_{SM}; a weight's bytes read and written, machine instructions, and "
        "the least time of each on an H200.",
        "",
        "| kernel | instructions | a further seed | registers | bytes | instructions, ps | "
        "memory, ps | bound by | seeds until instructions bind |",
        "|:--|--:|--:|--:|--:|--:|--:|:--|--:|",
    ]
    for row in rows:
        if row["sm"] != SM:
            continue
        issue, memory = picoseconds(row)
        further = float(row["instructions_per_further_seed"]) / LANES_PER_SECOND * 1e12
        seeds = 1 if issue > memory else int((memory - issue) / further) + 2
        lines.append(
            f"| {row['case']} | {row['instructions_per_weight']} | "
            f"{row['instructions_per_further_seed']} | {row['registers']} | "
            f"{row['bytes_per_weight']} | {issue:.2f} | {memory:.2f} | "
            f"{'instructions' if issue > memory else 'memory'} | {seeds} |"
        )
    return "\n".join(lines)

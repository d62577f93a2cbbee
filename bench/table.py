"""The documents' tables from bench/results: ``python -m bench.table``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from bench import document, quickstart, roofline, steps, study
from bench.document import Row

NAMES = {
    "floor": "memory floor, `p.mul_(c)`",
    "mezo": "MeZO's expression",
    "mezo-inplace": "MeZO in place",
    "mezo-compiled": "MeZO's expression, `torch.compile`",
    "mezo-inplace-compiled": "MeZO in place, `torch.compile`",
}


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, or with ``--check`` compare them.

    Returns:
        0 if the documents are up to date now, 1 if the check found one out of date, 2 if there is
        nothing to write or nowhere to write it.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is out of date")
    options = parser.parse_args(arguments)
    return max(_renew(*place, options.check) for place in TABLES)


def _renew(
    name: str, marker: str, results: str, make: Callable[[list[Row]], str], check: bool
) -> int:
    """Write one table between its markers."""
    path, source = document.ROOT / name, document.RESULTS / results
    rows = document.read_rows(source) if source.exists() else []
    if not rows:
        print(f"{source} is missing or has no rows; measure first.", file=sys.stderr)
        return 2
    new = document.replaced(path, {f"bench:{marker}": make(rows)})
    if new == path.read_text(encoding="utf-8"):
        return 0
    if check:
        print(f"{path} is out of date; run `python -m bench.table`.", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    return 0


def tables(rows: list[Row]) -> str:
    """One table for each machine, of its largest tensors."""
    parts = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        here = [row for row in rows if row["machine"] == machine]
        largest = max(int(row["numel"]) for row in here)
        parts.append(table([row for row in here if int(row["numel"]) == largest]))
    return "\n\n".join(parts)


def table(rows: list[Row]) -> str:
    """The caption and the table of one machine: a line a pass, two columns a type."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells = {(row["case"], row["dist"], row["dtype"]): row for row in rows}
    lines = [caption(rows[0]), ""]
    lines.append("| pass | " + " | ".join(f"{d} | × MeZO" for d in dtypes) + " |")
    lines.append("|:--|" + "--:|--:|" * len(dtypes))
    for case, dist in dict.fromkeys((row["case"], row["dist"]) for row in rows):
        line = [label(case, dist)]
        for dtype in dtypes:
            row = cells.get((case, dist, dtype))
            line += [time_of(row), f"{float(row['speedup_over_mezo']):.1f}"] if row else ["–", "–"]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def caption(row: Row) -> str:
    """Where and how the numbers were measured, and how to read them."""
    return (
        f"{row['machine']}, {row['threads']} threads; Python {row['python']}, torch "
        f"{row['torch']}, gcc {row['gcc']}; {int(row['numel']):,} weights; commit "
        f"{row['commit']}, {row['date']}. Nanoseconds a weight, in brackets the multiple of the "
        "memory floor: in the best round, and the median over rounds. × MeZO: how many times as "
        "fast as MeZO's expression."
    )


def time_of(row: Row) -> str:
    """One pass's time: of the floor, which is 1 by definition, without its multiple."""
    time = f"{float(row['ns_per_weight']):.3f}"
    if row["case"] == "floor":
        return time
    best, median = float(row["ratio_to_floor"]), float(row["ratio_to_floor_median"])
    return f"{time} ({best:.2f}, {median:.2f})"


def label(case: str, dist: str) -> str:
    """The pass in the reader's words."""
    if case.startswith("native-"):
        return f"`add_noise_` {dist}, {case.removeprefix('native-')}"
    return NAMES.get(case, case)


# Document, marker, results, and what makes the table of their rows.
TABLES: tuple[tuple[str, str, str, Callable[[list[Row]], str]], ...] = (
    ("docs/performance.md", "ops", "ops.csv", tables),
    ("docs/study.md", "study", "study.csv", study.tables),
    ("docs/performance.md", "codegen", "codegen.csv", roofline.table),
    ("docs/performance.md", "step", "step.csv", steps.tables),
    ("docs/finetune.md", "quickstart", "quickstart.csv", quickstart.table),
)


if __name__ == "__main__":
    sys.exit(main())

"""The README's table of add_noise_, from bench/results/ops.csv: ``python -m bench.table``."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:ops -->", "<!-- /bench:ops -->"
NAMES = {
    "floor": "memory floor, `p.mul_(c)`",
    "mezo": "MeZO's expression",
    "mezo-inplace": "MeZO in place",
    "mezo-compiled": "MeZO's expression, `torch.compile`",
    "mezo-inplace-compiled": "MeZO in place, `torch.compile`",
}

Row = dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Write the table, or with ``--check`` compare it.

    Returns:
        0 if the README is up to date now, 1 if the check found it out of date, 2 if there is
        nothing to write or nowhere to write it.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "ops.csv")
    options = parser.parse_args(arguments)
    if not options.results.exists():
        return _refuse(f"{options.results} is missing; run `python -m bench.ops` first.")
    with options.results.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return _refuse(f"{options.results} has no rows; run `python -m bench.ops` first.")
    text = options.readme.read_text(encoding="utf-8") if options.readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return _refuse(f"{options.readme} lacks the markers {BEGIN} and {END}.")
    new = f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}"
    if new == text:
        return 0
    if options.check:
        print(f"{options.readme} is out of date; run `python -m bench.table`.", file=sys.stderr)
        return 1
    options.readme.write_text(new, encoding="utf-8")
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


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

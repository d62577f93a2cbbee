"""The study's rows, figure and tables from a finished sweep: ``python -m bench.study runs/study``.

Reads what `zokernels sweep bench/study.yaml` left, of the runs that came to their end; writes
`results/study.csv` and `docs/study.png`. `python -m bench.table` then writes the tables.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import document
from bench.document import Row

SCHEMES = ("full", "lora", "prefix", "prompt", "bitfit")
_LEFT_OUT = ("status", "seconds", "zokernels")


def keep(folder: Path) -> int:
    """Takes the rows of a sweep into the results; 2 if there are none."""
    source = folder / "runs.csv"
    rows = document.read_rows(source) if source.exists() else []
    rows = [row for row in rows if row["status"] == "finished"]
    if not rows:
        print(f"{source} is missing or has no finished run; run the sweep first.", file=sys.stderr)
        return 2
    git = ["git", "log", "-1", "--format=%h,%cs"]
    commit, date = subprocess.check_output(git, cwd=document.ROOT, text=True).strip().split(",")
    kept = [
        {**{k: v for k, v in r.items() if k not in _LEFT_OUT}, "commit": commit, "date": date}
        for r in rows
    ]
    document.write_rows(document.RESULTS / "study.csv", list(kept[0]), kept)
    draw(kept, document.ROOT / "docs" / "study.png")
    return 0


def cells(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[float]]:
    """Accuracies over the seeds, in percent, by part, shots, scheme and optimizer."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        key = (row["part"], row["shots"], row["scheme"], _optimizer(row))
        found.setdefault(key, []).append(100 * float(row["dev_accuracy_after"]))
    return found


def _optimizer(row: Row) -> str:
    # In this part it is the rate that differs.
    rate = f", {float(row['lr']):g}" if row["part"].endswith("-rates") else ""
    return row["optimizer"] + rate


def tables(rows: Sequence[Row]) -> str:
    """A table a part: optimizers down, schemes across."""
    found, parts = cells(rows), []
    for part in dict.fromkeys(row["part"] for row in rows):
        here = [row for row in rows if row["part"] == part]
        columns = [
            (shots, scheme)
            for shots in dict.fromkeys(row["shots"] for row in here)
            for scheme in SCHEMES
            if any(r["scheme"] == scheme and r["shots"] == shots for r in here)
        ]
        head = ["optimizer", *(f"{scheme}{f', {k} shots' if k else ''}" for k, scheme in columns)]
        head += ["forwards", "backwards"]
        lines = [["before training", *(_before(here, *column) for column in columns), "–", "–"]]
        for optimizer in dict.fromkeys(map(_optimizer, here)):
            mine = [row for row in here if _optimizer(row) == optimizer]
            values = [found.get((part, *column, optimizer)) for column in columns]
            passes = [
                "–".join(dict.fromkeys(f"{int(row[name]):,}" for row in mine))
                for name in ("forwards", "backwards")
            ]
            lines.append([optimizer, *map(_shown, values), *passes])
        first = here[0]
        parts += [
            f"**{part}**: {first['model']}, {first['steps']} steps of {first['batch_size']}; "
            f"always the most frequent answer: {100 * float(first['dev_majority']):.1f} %.",
            document.table(head, lines, "l" + "r" * (len(head) - 1)),
        ]
    row = rows[0]
    parts.append(
        f"{len(rows)} runs; {row['machine']}, {row['threads']} thread a run; torch {row['torch']}; "
        f"commit {row['commit']}, {row['date']}. Dev accuracy in %, mean ± sample standard "
        "deviation over three seeds (or as many as in brackets); ¹: one seed."
    )
    return "\n\n".join(parts)


def _before(rows: Sequence[Row], shots: str, scheme: str) -> str:
    values = [
        100 * float(r["dev_accuracy_before"])
        for r in rows
        if (r["shots"], r["scheme"]) == (shots, scheme)
    ]
    return f"{statistics.fmean(values):.1f}"


def _shown(values: list[float] | None) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}¹"
    seeds = f" ({len(values)})" if len(values) != 3 else ""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}{seeds}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a part: every cell's accuracy, and where it began."""
    from matplotlib.figure import Figure

    found = cells(rows)
    parts = list(dict.fromkeys(row["part"] for row in rows))
    sizes = [len([key for key in found if key[0] == part]) for part in parts]
    figure = Figure(figsize=(7, 1 + 0.22 * sum(sizes) + 0.6 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for part, panel in zip(parts, axes, strict=True):
        keys = [key for key in found if key[0] == part][::-1]
        for place, key in enumerate(keys):
            values = found[key]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            fill = "C0" if len(values) > 1 else "white"
            panel.errorbar(
                statistics.fmean(values), place, xerr=spread, fmt="o", color="C0", mfc=fill,
                capsize=3,
            )  # fmt: skip
            before = [r for r in rows if (r["part"], r["shots"], r["scheme"]) == key[:3]]
            panel.plot(100 * float(before[0]["dev_accuracy_before"]), place, "|", color="0.4")
        names = [f"{k[2]} {k[3]}" + (f" {k[1]} shots" if k[1] else "") for k in keys]
        panel.set_yticks(range(len(keys)), names, fontsize=7)
        panel.set_title(part, fontsize=9)
        # The same axis for all, so that a tenth of a point does not look like a difference.
        panel.set_xlim(40, 100)
        panel.grid(axis="x", color="0.92")
    axes[-1].set_xlabel("dev accuracy (%); filled: several seeds, open: one; bar: before training")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    return keep(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    sys.exit(main())

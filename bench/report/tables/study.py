"""The study's accuracies, from study.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row

TASKS = {"sst2": "SST-2", "trec": "TREC"}
SCHEMES = ("full", "lora", "prefix", "prompt", "bitfit")


def cells(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[float]]:
    """Accuracies over the seeds, in percent, by part, shots, scheme and optimizer."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        key = (row["part"], row["shots"], row["scheme"], _optimizer(row))
        found.setdefault(key, []).append(100 * float(row["dev_accuracy_after"]))
    return found


def task(row: Row) -> str:
    """The task in the reader's words."""
    return TASKS.get(row["task"], row["task"])


def _optimizer(row: Row) -> str:
    # In this part it is the rate that differs.
    rate = f", {float(row['lr']):g}" if row["part"].endswith("-rates") else ""
    return row["optimizer"] + rate


def tables(rows: Sequence[Row]) -> str:
    """A table a part: optimizers down, schemes across."""
    found, parts = cells(rows), []
    for (part,), here in results.grouped(rows, "part").items():
        columns = [
            (shots, scheme)
            for shots in results.distinct(here, "shots")
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
                "–".join(f"{int(n):,}" for n in results.distinct(mine, name))
                for name in ("forwards", "backwards")
            ]
            lines.append([optimizer, *map(_shown, values), *passes])
        first = here[0]
        parts += [
            f"**{part}**: {first['model']}, {task(first)}, {first['steps']} steps of "
            f"{first['batch_size']}; always the most frequent answer: "
            f"{100 * float(first['dev_majority']):.1f} %.",
            document.table(head, lines, "l" + "r" * (len(head) - 1)),
        ]
    parts.append(
        f"{len(rows)} runs; {results.caption(rows)}. Dev accuracy in %, mean ± sample standard "
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

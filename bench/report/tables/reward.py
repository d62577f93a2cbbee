"""A population that learns a reward, and what generating together costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row


def table(rows: Sequence[Row]) -> str:
    """The reward at some steps, by seed."""
    last = max(int(row["step"]) for row in rows)
    steps = [last * k // 4 for k in range(5)]
    head = ("seed", *(f"step {step:,}" for step in steps))
    lines = []
    for (seed,), own in results.grouped(rows, "seed").items():
        at = {int(row["step"]): float(row["reward"]) for row in own}
        lines.append((seed, *(f"{at[step]:.3f}" for step in steps)))
    answers = int(rows[-1]["generations"]) // int(rows[-1]["step"])
    caption = (
        f"Share of 500 unseen prompts with the right answer, 0.1 by chance; {answers:,} answers a "
        f"step. {results.caption(rows)}."
    )
    return f"{caption}\n\n{document.table(head, lines, 'r' * len(head))}"


def generation(rows: Sequence[Row]) -> str:
    """Tokens a second: a line a model, type, distribution and number of members."""
    head = (
        "model", "type", "directions", "members", "plain", "together", "one by one",
        "together / plain", "together / one by one",
    )  # fmt: skip
    lines = [
        (
            row["model"], row["dtype"], f'`"{row["dist"]}"`', row["members"],
            *(f"{float(row[f'{k}_tokens_per_s']):,.0f}" for k in ("plain", "together", "apart")),
            f"{float(row['share_of_plain']):.2f}", f"{float(row['times_apart']):.1f} ×",
        )
        for row in rows
    ]  # fmt: skip
    first = rows[0]
    repeats = statistics.median(int(row["repeats"]) for row in rows)
    caption = (
        f"Tokens a second, {first['rows']} prompt{'s' * (first['rows'] != '1')} of "
        f"{first['prompt']} tokens a member, {first['tokens']} new ones, random weights; medians "
        f"of {repeats:g} rounds in turn. {results.caption(rows)}."
    )
    return f"{caption}\n\n{document.table(head, lines, 'lllrrrrrr')}"

"""What a model learns by each estimate, from estimates.csv."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bench.report import document
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row
from zokernels.lab.tasks.history import Accuracy


def table(rows: Sequence[Row]) -> str:
    """A table a model: cells down; held-out loss at each rate of the grid, and at the best."""
    return "\n\n".join(_table(own) for own in results.grouped(rows, "model").values())


def gain(rows: Sequence[Row]) -> str:
    """In a sentence, what a population learns beside MeZO's pairs from as many forwards."""
    cells = {name: own for (name,), own in results.grouped(rows, "cell").items()}
    pairs = at_best(cells["minilm pairs"])
    populations = [
        at_best(own)
        for name, own in cells.items()
        if name.startswith("minilm") and "population" in name and _of_all_weights(own[0])
    ]
    # Of those with all their seeds.
    best = min(populations, key=lambda own: (-len(own), _mean_of(own)))
    before = float(pairs[0]["loss_before"])
    theirs, ours = _mean_of(pairs), _mean_of(best)
    along = f' along `dist="{best[0]["dist"]}"`'
    return (
        f"From {int(pairs[0]['forwards']):,} forwards a population of {best[0]['queries']}{along} "
        f"lowered the held-out loss of {pairs[0]['model']} on SST-2 from {before:.3f} to "
        f"{ours:.3f}, and MeZO's pairs to {theirs:.3f}, each at the best rate of its grid (means "
        f"of {len(best)} and {len(pairs)} seeds): {(before - ours) / (before - theirs):.1f} times "
        "the fall."
    )


def at_best(own: Sequence[Row]) -> list[Row]:
    """The runs of a cell at the best rate of its grid, by the first seed."""
    best = min((row for row in own if row["seed"] == "0"), key=_loss)["lr"]
    return [row for row in own if row["lr"] == best]


def _of_all_weights(row: Row) -> bool:
    return row["scheme"] == "full" and not row["train_only"]


def _mean_of(rows: Sequence[Row]) -> float:
    return statistics.mean(float(row["loss_after"]) for row in rows)


def _table(rows: Sequence[Row]) -> str:
    head = ("cell", "by rate, one seed", "best rate", "held-out loss", "dev accuracy")
    lines = []
    for (name,), own in results.grouped(rows, "cell").items():
        found = at_best(own)
        rates = sorted((r for r in own if r["seed"] == "0"), key=lambda row: float(row["lr"]))
        grid = ", ".join(f"{float(row['lr']):g}: {_loss(row):.3f}" for row in rates)
        lines.append((name, grid, f"{float(found[0]['lr']):g}", _mean(found, "loss_after", 1, 3),
                      _mean(found, "dev_after", 100, 1)))  # fmt: skip
    first = rows[0]
    before = Accuracy(float(first["dev_before"]), 500)
    caption = (
        f"**{first['model']}** on {first['task']}, {int(first['forwards']):,} forwards of 16 "
        "examples (a backward counts as two), linear decay. Loss of 400 held-out training "
        f"examples, {first['loss_before']} before; accuracy on 500 dev examples in %, "
        f"{100 * before.value:.1f} ± {100 * before.error:.1f} before. Mean ± sample "
        f"standard deviation over three seeds, or as many as in brackets. {results.caption(rows)}."
    )
    return f"{caption}\n\n{document.table(head, lines, 'llrrr')}"


def _loss(row: Row) -> float:
    loss = float(row["loss_after"])
    return loss if math.isfinite(loss) else math.inf


def _mean(rows: Sequence[Row], name: str, unit: float, digits: int) -> str:
    values = [unit * float(row[name]) for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    count = f" ({len(values)})" if len(values) != 3 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{count}"

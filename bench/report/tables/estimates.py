"""What a model learns by each estimate, from estimates.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.report import document
from bench.study.grid import at_best, loss_of
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row
from zokernels.lab.runs.history import Mean


def table(rows: Sequence[Row]) -> str:
    """A table a model: cells down; held-out loss at each rate of the grid, and at the best."""
    return "\n\n".join(_table(own) for own in results.grouped(rows, "model", "task").values())


def gain(rows: Sequence[Row]) -> str:
    """In a sentence a model, what a population learns beside MeZO's pairs from as many forwards."""
    models = results.grouped([row for row in rows if row["task"] == "sst2"], "model")
    first, *others = (_gain(own) for own in models.values() if _is_compared(own))
    more = "".join(f" And {text}" for text in others)
    return f"Each at the best rate of its grid, {first}{more}"


def _is_compared(rows: Sequence[Row]) -> bool:
    return bool(_of(rows, "two_sided") and _of(rows, "population", "std"))


def _of(rows: Sequence[Row], estimator: str, *normalize: str) -> list[list[Row]]:
    """The cells that train all weights by ZO-SGD with an estimator, each at its best rate.

    Args:
        rows: Of a model.
        estimator: Theirs.
        normalize: What may divide a step; nothing may always.
    """
    cells = results.grouped(rows, "cell").values()
    return [
        at_best(own)
        for own in cells
        if own[0]["estimator"] == estimator
        and own[0]["optimizer"] == "zosgd"
        and own[0]["scheme"] == "full"
        and not own[0]["train_only"]
        and own[0]["normalize"] in ("", *normalize)
    ]


def _gain(rows: Sequence[Row]) -> str:
    # Pairs along normals, as MeZO has them, where they were run; of populations, most seeds first.
    pairs = min(_of(rows, "two_sided"), key=lambda own: own[0]["dist"])
    best = min(_of(rows, "population", "std"), key=lambda own: (-len(own), _mean_of(own)))
    before, theirs, ours = float(pairs[0]["loss_before"]), _mean_of(pairs), _mean_of(best)
    times = (before - ours) / (before - theirs)
    divided = ' with `normalize="std"`' if best[0]["normalize"] else ""
    first = pairs[0]
    return (
        f"{int(first['forwards']):,} forwards lowered the held-out loss of {first['model']} on "
        f"SST-2 from {before:.3f} to {ours:.3f} by a population of {best[0]['queries']}{divided} "
        f"and to {theirs:.3f} by pairs: {times:.2f} times the fall "
        f"({_seeds(best)}, and {_seeds(pairs)})."
    )


def _seeds(rows: Sequence[Row]) -> str:
    along = {"gaussian": "normals", "rademacher": "signs", "rank1": "rank one"}[rows[0]["dist"]]
    return f"{len(rows)} seed{'s' * (len(rows) > 1)} along {along}"


def name_of(row: Row) -> str:
    """A cell's name without its model's and its task's."""
    words = row["cell"].split()
    return " ".join(words[2:] if words[1] == row["task"] else words[1:])


def _mean_of(rows: Sequence[Row]) -> float:
    return statistics.mean(float(row["loss_after"]) for row in rows)


def _table(rows: Sequence[Row]) -> str:
    head = ("cell", "by rate, one seed", "best rate", "held-out loss", "dev accuracy")
    lines = []
    for own in results.grouped(rows, "cell").values():
        found = at_best(own)
        rates = sorted((r for r in own if r["seed"] == "0"), key=lambda row: float(row["lr"]))
        grid = ", ".join(f"{float(row['lr']):g}: {loss_of(row):.3f}" for row in rates)
        best = f"{float(found[0]['lr']):g}"
        loss, dev = _mean(found, "loss_after", 1, 3), _mean(found, "dev_after", 100, 1)
        lines.append((name_of(own[0]), grid, best, loss, dev))
    first = rows[0]
    before = Mean(float(first["dev_before"]), 500)
    caption = (
        f"**{first['model']}** on {first['task']}, {int(first['forwards']):,} forwards of 16 "
        "examples (a backward counts as two), linear decay. Loss of 400 held-out training "
        f"examples, {first['loss_before']} before; accuracy on 500 dev examples in %, "
        f"{100 * before.value:.1f} ± {100 * before.error:.1f} before. Mean ± sample "
        f"standard deviation over three seeds, or as many as in brackets. {results.caption(rows)}."
    )
    return f"{caption}\n\n{document.table(head, lines, 'llrrr')}"


def _mean(rows: Sequence[Row], name: str, unit: float, digits: int) -> str:
    values = [unit * float(row[name]) for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    count = f" ({len(values)})" if len(values) != 3 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{count}"

"""What a sweep found: a row a run, a row a cell, in CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zokernels.lab import files
from zokernels.lab.runs import folder
from zokernels.lab.sweeps.plan import Run, Skipped, text
from zokernels.lab.sweeps.pool import Outcome
from zokernels.lab.tasks.metric import ACCURACY, METRICS, Metric

_SETTINGS = (
    "task scheme optimizer template shots lr eps fo_lr hybrid_split num_queries steps batch_size "
    "schedule objective train_only".split()
)
_METRICS = (
    "metric dev_accuracy_before dev_accuracy_after dev_standard_error_after dev_examples "
    "dev_majority forwards backwards non_finite_steps mean_loss_first_tenth mean_loss_last_tenth "
    "trained_weights all_weights threads step_seconds seconds machine diverged".split()
)
_FIXED = ("part", "model", *_SETTINGS, "seed", "status", *_METRICS, "torch", "zokernels")


@dataclass(frozen=True)
class Cell:
    """The runs of a cell, over its seeds.

    Attributes:
        part: Its part of the sweep.
        values: The values of the grid's keys.
        seeds: The seeds that have a result.
        before: Mean metric before training.
        after: Mean metric after it.
        spread: Sample standard deviation of that over the seeds; None for one seed.
        majority: What the most frequent answer reaches.
        forwards: Forwards in training, mean.
        backwards: Backwards likewise.
        seconds: Of a whole run, mean.
        note: What is missing, and why.
        metric: What was measured.
    """

    part: str
    values: dict[str, Any]
    seeds: int = 0
    before: float | None = None
    after: float | None = None
    spread: float | None = None
    majority: float | None = None
    forwards: float | None = None
    backwards: float | None = None
    seconds: float | None = None
    note: str = ""
    metric: Metric = ACCURACY


def metrics_of(run: Run) -> dict[str, Any] | None:
    """The metrics of a run that came to its end; None of any other."""
    found = files.read_json(run.settings.out / folder.METRICS)
    return None if found is None or found.get("interrupted") else found


def rows(runs: Sequence[Run], outcomes: dict[Path, Outcome]) -> list[dict[str, Any]]:
    """A row a run, of those that have begun or ended somehow."""
    found = []
    for run in runs:
        s, metrics = run.settings, metrics_of(run)
        status = outcomes[s.out].status if s.out in outcomes else "not run"
        if metrics is not None:
            status = "failed" if metrics["failure"] else "finished"
        row = {"part": run.part, "model": s.title, "seed": s.seed, "status": status}
        row |= {name: getattr(s, name) for name in _SETTINGS}
        if metrics is not None:
            row |= {name: metrics.get(name) for name in _METRICS}
            row |= {name: metrics["versions"][name] for name in ("torch", "zokernels")}
        found.append(row)
    return found


def cells(
    runs: Sequence[Run], skipped: Sequence[Skipped], outcomes: dict[Path, Outcome]
) -> list[Cell]:
    """The cells in the order of the file; those that were left out at their part's end."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.part, json.dumps(run.cell)), []).append(run)
    found = [_cell(group, outcomes) for group in groups.values()]
    found += [Cell(s.part, s.cell, note=f"left out: {s.reason}") for s in skipped]
    order = list(dict.fromkeys(cell.part for cell in found))
    return sorted(found, key=lambda cell: order.index(cell.part))


def _cell(group: Sequence[Run], outcomes: dict[Path, Outcome]) -> Cell:
    done = [m for m in map(metrics_of, group) if m is not None and not m["failure"]]
    after = [m["dev_accuracy_after"] for m in done if m["dev_accuracy_after"] is not None]
    notes = []
    for run in group:
        metrics = metrics_of(run)
        if metrics is None:
            outcome = outcomes.get(run.settings.out, Outcome("not run"))
            why = f" ({outcome.reason})" if outcome.reason else ""
            notes.append(f"seed {run.settings.seed} {outcome.status}{why}")
        elif metrics["failure"]:
            notes.append(f"seed {run.settings.seed} failed ({metrics['failure']})")
        elif metrics.get("diverged"):
            notes.append(f"seed {run.settings.seed} diverged")
    if len(group) == 1 and done:
        notes.append("one seed")
    return Cell(
        group[0].part,
        group[0].cell,
        len(done),
        _mean(m["dev_accuracy_before"] for m in done),
        _mean(after),
        statistics.stdev(after) if len(after) > 1 else None,
        _mean(m.get("dev_majority") for m in done),
        _mean(m["forwards"] for m in done),
        _mean(m["backwards"] for m in done),
        _mean(m["seconds"] for m in done),
        "; ".join(notes),
        METRICS[done[0]["metric"]] if done else ACCURACY,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return statistics.fmean(found) if found else None


def runs_csv(found: Sequence[dict[str, Any]]) -> str:
    """A row a run."""
    return _csv(_FIXED, found)


def table_csv(found: Sequence[Cell]) -> str:
    """A row a cell, with the keys of every grid."""
    keys = list(dict.fromkeys(key for cell in found for key in cell.values))
    numbers = "seeds before after spread majority forwards backwards seconds note".split()
    return _csv(
        ["part", *keys, *numbers],
        [
            {"part": c.part, **c.values, **{name: getattr(c, name) for name in numbers}}
            for c in found
        ],
    )


def _csv(columns: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({k: _plain(v) for k, v in row.items()})
    return out.getvalue()


def _plain(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) and abs(value) >= 0.01 else value


def markdown(title: str, found: Sequence[Cell], plots: dict[str, str]) -> str:
    """The tables to read, a part each."""
    lines = [f"# {title}", ""]
    for part in dict.fromkeys(cell.part for cell in found):
        lines += [f"## {part}", "", part_table([c for c in found if c.part == part]), ""]
        if part in plots:
            lines += [f"![{part}]({plots[part]})", ""]
    lines += ["After: mean over the seeds ± their sample standard deviation.", ""]
    return "\n".join(lines)


def part_table(found: Sequence[Cell]) -> str:
    """The Markdown table of a part, with what most cells share said once below it."""
    keys = list(dict.fromkeys(key for cell in found for key in cell.values))
    head = [*keys, "before", "after", "seeds", "forwards", "backwards", "seconds", "note"]
    rule = [":--"] * len(keys) + ["--:"] * 6 + [":--"]
    lines = [head, rule]
    for c in found:
        before = "–" if c.before is None else c.metric.text(c.before)
        after = "–" if c.after is None else c.metric.text(c.after, c.spread)
        own = [text(c.values[k]) if k in c.values else "–" for k in keys]
        numbers = [before, after, str(c.seeds)]
        numbers += [f"{v:,.0f}" if v is not None else "–" for v in (c.forwards, c.backwards)]
        numbers.append(f"{c.seconds:.0f}" if c.seconds is not None else "–")
        lines.append([*own, *numbers, c.note.replace("|", "\\|")])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    majority = {c.metric.text(c.majority) for c in found if c.majority is not None}
    if len(majority) == 1:
        table += f"\n\nAlways the most frequent answer: {majority.pop()}."
    return table

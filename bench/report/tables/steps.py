"""Whole steps, from step.csv; bench/steps.sh measures them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.document import table
from zokernels.lab.benchmarks import peers, results
from zokernels.lab.benchmarks.results import Row

MODES = ("on_entry", "paired", "in_place")
# Name, type, mode, what was asked in multiples of two plain forwards; in docs/performance.md.
TARGETS = (
    ("2 × 64", "float32", 1.12),
    ("2 × 64", "bfloat16", 1.55),
    ("8 × 32", "float32", 1.10),
    ("2 × 64, rademacher", "float32", 1.08),
)
TIMES_MEZO = {"float32": 5, "bfloat16": 10}
_CASE = ("scheme", "loss", "rows", "length", "dtype", "queries", "dist", "lazy_logits")

Case = tuple[str, ...]


def latest(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    """The last row of each case and mode."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(_case(row), {})[row["perturb"]] = row
    return found


def compared(rows: Sequence[Row]) -> list[tuple[Row, dict[str, Row]]]:
    """Each row that has peers, the last of its case, with the last rows of that case's modes."""
    measured = {_case(row): row for row in rows if row["mezo"]}
    return [(row, latest(rows)[case]) for case, row in measured.items()]


def tables(rows: Sequence[Row]) -> str:
    """Steps as multiples of two plain forwards, where their time goes, and the peers'."""
    caption = (
        f"{results.caption(rows)}; {', '.join(results.distinct(rows, 'model'))} with random "
        "weights. Multiples of two plain forwards, medians, and quartiles in brackets. A case "
        "that was measured again has its last row here."
    )
    return "\n\n".join([caption, _steps(rows), _parts(rows), _peers(rows)])


def summary(rows: Sequence[Row]) -> str:
    """The step beside its forwards and MeZO's, for the README."""
    found = []
    for row, modes in compared(rows):
        task = latest(rows)[("full", "candidates", *_case(row)[2:])]["paired"]
        paired = float(modes["paired"]["ratio"])
        times = float(row["mezo"]) / paired
        found.append((row["dtype"], f"{paired:.2f}", f"{float(task['ratio']):.2f}", f"{times:.1f}"))
    (dtype, step, own, mezo), *others = found
    first = rows[0]
    return (
        f"A whole step of full fine-tuning, {first['model'].upper()} in {dtype} on "
        f'{first["machine"]}, takes {step} times its two plain forwards with `perturb="paired"`, '
        f"and {own} times them where the loss is a task's own; MeZO's step as published takes "
        f"{mezo} times as long."
        + "".join(f" In {other[0]} these are {_and(other[1:])}." for other in others)
    )


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def targets(rows: Sequence[Row]) -> str:
    """What was asked of a paired step, and what was measured."""
    found = {(_name(case), case[4]): modes for case, modes in latest(rows).items()}
    lines = []
    for name, dtype, asked in TARGETS:
        row = found.get((name, dtype), {}).get("paired")
        if row is None:
            lines.append((f"{name}, paired", dtype, f"≤ {asked:.2f}", "–", "–"))
            continue
        met = "yes" if float(row["ratio"]) <= asked else "no"
        cell = f"{row['ratio']} ({row['low']}–{row['high']})"
        lines.append((f"{name}, paired", dtype, f"≤ {asked:.2f}", cell, met))
    for row, modes in compared(rows):
        times_asked = TIMES_MEZO[row["dtype"]]
        times = float(row["mezo"]) / float(modes["paired"]["ratio"])
        met = "yes" if times >= times_asked else "no"
        what = "times as fast as MeZO, paired"
        lines.append((what, row["dtype"], f"≥ {times_asked}", f"{times:.1f}", met))
    return table(("", "type", "asked", "measured", "met"), lines, "llrrl")


def _case(row: Row) -> Case:
    return tuple(row[name] for name in _CASE)


def _steps(rows: Sequence[Row]) -> str:
    lines = [
        (_name(case), case[4], *(_cell(modes.get(mode)) for mode in MODES))
        for case, modes in latest(rows).items()
    ]
    return table(("step", "type", *MODES), lines, "llrrr")


def _parts(rows: Sequence[Row]) -> str:
    lines = [
        (_name(case), case[4], mode, row["forwards"], row["noise"], row["update"], row["rest"],
         row["memory_mb"].replace("-0", "0"))
        for case, modes in latest(rows).items()
        for mode, row in modes.items()
        if case[0] == "full" and case[5] == "1" and case[6] == "gaussian"
    ]  # fmt: skip
    head = ("step", "type", "mode", "forwards", "noise", "update", "rest", "MiB beyond forwards")
    return table(head, lines, "lllrrrrr")


def _peers(rows: Sequence[Row]) -> str:
    lines = []
    for name, title in peers.TITLES.items():
        for row, modes in compared(rows):
            if row[name]:
                ratios = [
                    f"{float(row[name]) / float(modes[mode]['ratio']):.1f}"
                    for mode in ("on_entry", "paired")
                ]
                lines.append((title, row["dtype"], row[name], *ratios))
    head = ("peer", "type", "two forwards", "times on_entry's step", "times paired's step")
    return table(head, lines, "llrrr")


def _name(case: Case) -> str:
    scheme, loss, rows, length, _, queries, dist, lazy = case
    parts = [f"{rows} × {length}"]
    parts += ["LoRA"] if scheme == "lora" else []
    parts += ["loss of two candidates"] if loss == "candidates" else []
    parts += [dist] if dist != "gaussian" else []
    parts += [f"{queries} queries"] if queries != "1" else []
    parts += ["whole logits"] if lazy == "False" else []
    return ", ".join(parts)


def _cell(row: Row | None) -> str:
    return f"{row['ratio']} ({row['low']}–{row['high']})" if row else "–"

"""Whole steps, from step.csv; bench/steps.sh measures them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.document import table
from zokernels.lab.benchmarks import peers, results
from zokernels.lab.benchmarks.results import Row

MODES = ("on_entry", "paired", "in_place")
# Name, type, mode, what was asked in multiples of the plain forwards; in docs/performance.md.
TARGETS = (
    ("2 × 64", "float32", "paired", 1.12),
    ("2 × 64", "bfloat16", "paired", 1.55),
    ("8 × 32", "float32", "paired", 1.10),
    ("2 × 64, rademacher", "float32", "paired", 1.08),
    ("2 × 64, rank1", "float32", "on_entry", 1.10),
    ("8 × 32, rank1", "float32", "on_entry", 1.05),
    ("2 × 64, rank1", "bfloat16", "on_entry", 1.25),
    ("2 × 64, rank1, 8 queries", "float32", "on_entry", 1.05),
    ("2 × 64, rank1, 8 queries", "bfloat16", "on_entry", 1.08),
    ("2 × 64, loss of two candidates, rank1", "float32", "on_entry", 0.75),
    ("2 × 64, loss of two candidates, rank1", "bfloat16", "on_entry", 0.85),
)
# A peer, the distribution and mode of the step beside it, how many times as fast it was to be.
TIMES: dict[tuple[str, str, str], dict[str, float]] = {
    ("mezo", "gaussian", "paired"): {"float32": 5, "bfloat16": 10},
    ("mezo", "rank1", "on_entry"): {"float32": 6, "bfloat16": 20},
    ("fo-sgd", "rank1", "on_entry"): {"float32": 1.6, "bfloat16": 2},
}
_CASE = ("scheme", "loss", "rows", "length", "dtype", "queries", "dist", "lazy_logits", "points")

Case = tuple[str, ...]
_SHOWN = ("mezo", "fo-sgd")


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
    """Steps as multiples of their plain forwards, where their time goes, and the peers'."""
    caption = (
        f"{results.caption(rows)}; {', '.join(results.distinct(rows, 'model'))} with random "
        "weights. Multiples of the step's plain forwards (two a query), medians, and quartiles in "
        "brackets. A case that was measured again has its last row here."
    )
    return "\n\n".join([caption, _steps(rows), _parts(rows), _peers(rows)])


_TITLES = {"gaussian": "the default"}


def summary(rows: Sequence[Row]) -> str:
    """The step beside its forwards and the peers', for the README."""
    known = latest(rows)
    lines = []
    for row, modes in compared(rows):
        # What `opt.step` does without a word of how.
        mode = "on_entry"
        case = dict(zip(_CASE, _case(row), strict=True))
        step = float(modes[mode]["ratio"])
        task = known.get(tuple({**case, "loss": "candidates"}.values()), {}).get(mode)
        many = known.get(tuple({**case, "queries": "8"}.values()), {}).get(mode)
        lines.append((
            _TITLES.get(row["dist"], f'`dist="{row["dist"]}"`'), row["dtype"], f"{step:.2f}",
            *(f"{float(other['ratio']):.2f}" if other else "–" for other in (many, task)),
            *(f"{float(row[peer]) / step:.1f}" if row[peer] else "–" for peer in _SHOWN),
        ))  # fmt: skip
    first = rows[0]
    head = ("step", "type", "one query", "eight", "a task's loss", "MeZO", "SGD by backpropagation")
    caption = (
        f"Steps of full fine-tuning, {first['model'].upper()} on {first['machine']}, in multiples "
        "of their own plain forwards, with one query and with eight, and where the loss is a "
        "task's own; and how many times as long the steps of MeZO as published and of SGD by "
        "backpropagation take:"
    )
    # What costs its forwards alone comes first.
    lines.sort(key=lambda line: "rank1" not in line[0])
    return f"{caption}\n\n{table(head, lines, 'llrrrrr')}"


def targets(rows: Sequence[Row]) -> str:
    """What was asked of a step, and what was measured."""
    found = {(_name(case), case[4]): modes for case, modes in latest(rows).items()}
    lines: list[tuple[str, ...]] = []
    for name, dtype, mode, asked in TARGETS:
        row = found.get((name, dtype), {}).get(mode)
        if row is None:
            lines.append((f"{name}, {mode}", dtype, f"≤ {asked:.2f}", "–", "–"))
            continue
        met = "yes" if float(row["ratio"]) <= asked else "no"
        cell = f"{row['ratio']} ({row['low']}–{row['high']})"
        lines.append((f"{name}, {mode}", dtype, f"≤ {asked:.2f}", cell, met))
    for (peer, dist, mode), wanted in TIMES.items():
        for row, modes in compared(rows):
            if row["dist"] != dist or not row[peer]:
                continue
            least = wanted[row["dtype"]]
            times = float(row[peer]) / float(modes[mode]["ratio"])
            met = "yes" if times >= least else "no"
            what = f"times as fast as {peers.TITLES[peer]}, {dist}, {mode}"
            lines.append((what, row["dtype"], f"≥ {least}", f"{times:.1f}", met))
    lines += _together(rows)
    return table(("", "type", "asked", "measured", "met"), lines, "llrrl")


def _together(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Sixteen points in one forward, beside the plain forward of as many rows."""
    lines: list[tuple[str, ...]] = []
    for case, modes in latest(rows).items():
        row = modes.get("paired")
        if row and row.get("together_ms"):
            plain = float(row["together_ms"]) / float(row["forwards_ms"])
            step = float(row["ratio"]) - float(row["update"])
            what = f"{_name(case)}: less its update, over the plain forward of as many rows"
            met = "yes" if step / plain <= 1.05 else "no"
            lines.append((what, row["dtype"], "≤ 1.05", f"{step / plain:.3f}", met))
    return lines


def _case(row: Row) -> Case:
    # Rows of before points were counted have two.
    return tuple(row.get(name) or "2" for name in _CASE)


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
        if case[0] == "full" and case[5] == "1" and case[6] != "rademacher"
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
                lines.append((title, f"{row['dist']}, {row['dtype']}", row[name], *ratios))
    head = ("peer", "beside", "two forwards", "times on_entry's step", "times paired's step")
    return table(head, lines, "llrrr")


def _name(case: Case) -> str:
    scheme, loss, rows, length, _, queries, dist, lazy, points = case
    parts = [f"{rows} × {length}"]
    parts += ["LoRA"] if scheme == "lora" else []
    parts += ["loss of two candidates"] if loss == "candidates" else []
    parts += [dist] if dist != "gaussian" else []
    parts += [f"{queries} queries"] if queries != "1" else []
    parts += [f"{points} points"] if points != "2" else []
    parts += ["whole logits"] if lazy == "False" else []
    return ", ".join(parts)


def _cell(row: Row | None) -> str:
    return f"{row['ratio']} ({row['low']}–{row['high']})" if row else "–"

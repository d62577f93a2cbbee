"""``zokernels verify``: does this machine compute what the specification says, bit for bit?"""

from __future__ import annotations

import difflib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from zokernels.lab import files
from zokernels.lab.cli import show
from zokernels.lab.errors import InputError
from zokernels.lab.runs import answers

if TYPE_CHECKING:
    from zokernels.lab.verification import Case, Outcome, Plan

# Failures that are told in full; the table counts them all.
_TOLD = 10


def command(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Id of a case, the beginning of one up to a slash, or a pattern with *."),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="More combinations, sizes and samples: many minutes.")
    ] = False,
    list_ids: Annotated[
        bool, typer.Option("--list", help="Print the cases' ids and run nothing.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Also write every outcome to this file.")
    ] = None,
) -> int:
    """Verify every backend, the noise, and whole runs on this machine; 1 if something differs."""
    answers.check(json)
    # The models and the noise's file need not be loaded for --help.
    from zokernels.lab import verification

    plan = verification.plan(deep)
    cases = _chosen(plan.cases, only or [], deep)
    if list_ids:
        for case in cases:
            print(case.id)
        return 0
    started = time.perf_counter()
    console = Console()
    outcomes = _run(cases, console)
    seconds = time.perf_counter() - started
    failed = [o for o in outcomes if o.failure is not None]
    _show(outcomes, console)
    if not only:
        for name, why in plan.missing.items():
            _say(console, f"Not verified, since it is not here: {name}: {why}")
    for o in failed[:_TOLD]:
        _say(console, f"\nFAILED {o.case.id}\n  {o.failure}\n  {_again(o.case, deep)}")
    if len(failed) > _TOLD:
        _say(console, f"\nand {len(failed) - _TOLD} more; --json FILE has all of them.")
    what = f"{len(failed)} of {len(outcomes)} cases FAILED" if failed else f"{len(outcomes)} passed"
    _say(console, f"{what} in {seconds:.0f} s.")
    if json is not None:
        files.write_json(json, _as_json(plan, outcomes, deep, seconds))
    return 1 if failed else 0


def _chosen(cases: list[Case], only: list[str], deep: bool) -> list[Case]:
    from zokernels.lab.verification import matches

    for pattern in only:
        if any(matches(case.id, [pattern]) for case in cases):
            continue
        words = {"/".join(c.id.split("/")[:n]) for c in cases for n in range(1, 10)}
        near = difflib.get_close_matches(pattern, sorted(words), 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        also = "" if deep else ", and some need --deep"
        raise InputError(
            f"--only {pattern} names no case of this machine; {hint}--list prints them all{also}."
        )
    return [case for case in cases if not only or matches(case.id, only)]


def _run(cases: list[Case], console: Console) -> list[Outcome]:
    outcomes: list[Outcome] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("verifying", total=len(cases), failed=0)
        for case in cases:
            progress.update(bar, description=" ".join(case.group))
            outcomes.append(case.outcome())
            count = sum(o.failure is not None for o in outcomes)
            progress.update(bar, advance=1, failed=count)
    return outcomes


def _show(outcomes: list[Outcome], console: Console) -> None:
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(o.case.group, []).append(o)
    # A row a group, in the order of the rooms.
    order = list(dict.fromkeys(first for first, _ in groups))
    rows = []
    for (first, second), mine in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
        failed = sum(o.failure is not None for o in mine)
        notes = list(dict.fromkeys(o.note for o in mine if o.note))
        rows.append(
            (first, second, str(len(mine) - failed),
             Text(str(failed), style="bold red" if failed else ""),
             f"{sum(o.seconds for o in mine):.1f}", notes[0] if len(notes) == 1 else "")
        )  # fmt: skip
    numbers = map(show.Column, ("passed", "failed", "seconds"))
    columns = [show.key("what"), show.key("of"), *numbers, show.words("found")]
    show.table(console, columns, rows, title="Verified")


def _again(case: Case, deep: bool) -> str:
    """The command that runs a case alone."""
    return f"zokernels verify {'--deep ' if deep else ''}--only {case.id}"


def _as_json(plan: Plan, outcomes: list[Outcome], deep: bool, seconds: float) -> dict[str, Any]:
    from zokernels.lab.cli.env import collect

    return {
        "passed": all(o.failure is None for o in outcomes),
        "deep": deep,
        "seconds": round(seconds, 2),
        "environment": collect(),
        "missing": plan.missing,
        "cases": [
            {
                "id": o.case.id,
                "passed": o.failure is None,
                "seconds": round(o.seconds, 4),
                "note": o.note,
                "failure": o.failure,
                "difference": vars(o.difference) if o.difference else None,
                "command": _again(o.case, deep),
            }
            for o in outcomes
        ],
    }


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

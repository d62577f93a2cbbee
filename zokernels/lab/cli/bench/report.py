"""``zokernels bench report``: the documents' tables and figures from bench/results."""

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from zokernels.lab.benchmarks.report import renewal
from zokernels.lab.benchmarks.report.catalog import PARTS
from zokernels.lab.tasks import folder
from zokernels.lab.tasks.errors import InputError


def command(
    root: Annotated[
        Path | None, typer.Option(help="A checkout; without it the one you stand in.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a part is out of date.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the outcome to this file.")] = None,
) -> int:
    """Make the tables, sentences and figures of README and docs from bench/results.

    Exit codes: 0 all is up to date now; 1 a part is out of date (--check); 2 a part could not be
    made, all others were.
    """
    folder.check_json(json)
    place = renewal.checkout(root or Path.cwd())
    if place is None or (root is not None and place != root):
        raise InputError(
            f"{root or Path.cwd()} is no checkout of zokernels, which has bench/results and docs; "
            "run this inside one, or name one with --root."
        )
    outcomes = renewal.renew(place, PARTS, check)
    for outcome in outcomes:
        _tell(outcome)
    counts = Counter(outcome.state for outcome in outcomes)
    print(f"{len(outcomes)} parts: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    if json is not None:
        folder.write_answer(json, {"report": [asdict(outcome) for outcome in outcomes]})
    if counts[renewal.REFUSED]:
        return 2
    return 1 if counts[renewal.STALE] else 0


def _tell(outcome: renewal.Outcome) -> None:
    what = f"{outcome.name} ({outcome.file})"
    if outcome.state == renewal.WRITTEN:
        print(f"{what} is written.")
    if outcome.state == renewal.STALE:
        print(f"{what} is out of date; run `zokernels bench report`.", file=sys.stderr)
    if outcome.state == renewal.REFUSED:
        print(f"{what}: {outcome.why}", file=sys.stderr)

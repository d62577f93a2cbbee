"""The documents' tables, sentences and figures from bench/results: ``python -m bench.report``.

Exit codes: 0 all is up to date now; 1 a part is out of date (--check); 2 a part could not be made,
all others were.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.report import renewal
from bench.report.catalog import PARTS
from zokernels.lab import files
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.runs import answers


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or check all parts, and tell of those that are not as they were."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--root", type=Path, help="a checkout; without it the one you stand in")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--json", type=Path, help="also write the outcome to this file")
    options = parser.parse_args(arguments)
    try:
        return report(options.root, options.check, options.json)
    except (InputError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def report(root: Path | None, check: bool, json: Path | None) -> int:
    """The exit code.

    Raises:
        InputError: If there is no checkout, or the outcome has nowhere to be.
        RunError: If the outcome can't be written; the parts are.
    """
    answers.check(json)
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
        files.write_answer(json, {"report": [asdict(outcome) for outcome in outcomes]})
    if counts[renewal.REFUSED]:
        return 2
    return 1 if counts[renewal.STALE] else 0


def _tell(outcome: renewal.Outcome) -> None:
    what = f"{outcome.name} ({outcome.file})"
    if outcome.state == renewal.WRITTEN:
        print(f"{what} is written.")
    if outcome.state == renewal.STALE:
        print(f"{what} is out of date; run `make report`.", file=sys.stderr)
    if outcome.state == renewal.REFUSED:
        print(f"{what}: {outcome.why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

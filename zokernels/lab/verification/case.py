"""A case of the verification: its id, what it runs, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from zokernels.lab.verification.difference import Difference


class Failed(Exception):
    """A case that did not come out as it must.

    Args:
        message: What was found, and what must be, in one sentence.
        difference: The first element that differs, where single elements were compared.
    """

    def __init__(self, message: str, difference: Difference | None = None):
        super().__init__(message)
        self.difference = difference


@dataclass(frozen=True)
class Case:
    """Something to verify.

    Args:
        id: Words between slashes; the first two are what the table of results has a row for.
        run: Returns what it found, in a few words or none, or raises.
    """

    id: str
    run: Callable[[], str]

    @property
    def group(self) -> tuple[str, str]:
        """The first two words of the id."""
        first, second, *_ = self.id.split("/")
        return first, second

    def outcome(self) -> Outcome:
        """Run it. Whatever it raises is a failure, not an end of the verification."""
        started = time.perf_counter()
        note, failure, difference = "", None, None
        try:
            note = self.run()
        except Failed as error:
            failure, difference = str(error), error.difference
        except Exception as error:
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(self, note, failure, difference, time.perf_counter() - started)


@dataclass(frozen=True)
class Outcome:
    """What came of a case; ``failure`` is None if it passed."""

    case: Case
    note: str
    failure: str | None
    difference: Difference | None
    seconds: float

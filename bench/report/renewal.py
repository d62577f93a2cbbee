"""Makes every part anew, or finds those that are out of date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import document, png
from bench.report.parts import Figure, Part, Table
from zokernels.lab import files
from zokernels.lab.benchmarks import results, style

CURRENT, WRITTEN, STALE, REFUSED = "current", "written", "stale", "refused"


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        name: The part's.
        file: The page or the PNG, from the root.
        state: "current", "written", "stale" (only checked) or "refused".
        why: A sentence, where it is refused.
    """

    name: str
    file: str
    state: str
    why: str = ""


def checkout(place: Path) -> Path | None:
    """The nearest folder from ``place`` upward that has results and documents; None if none has."""
    for root in (place, *place.parents):
        if (root / results.PLACE).is_dir() and (root / "docs").is_dir():
            return root
    return None


def renew(root: Path, parts: Sequence[Part], check: bool = False) -> list[Outcome]:
    """Make all parts from the rows; a part that can't be made keeps none of the others.

    Args:
        root: The checkout.
        parts: What to make.
        check: Write nothing, and call stale what would be written.
    """
    pages: dict[str, str] = {}
    found = []
    for part in parts:
        try:
            rows = [_rows(root, source, part.optional) for source in part.sources]
            changed = (
                _figure(root, part, rows, check)
                if isinstance(part, Figure)
                else _table(root, part, rows, pages)
            )
        except Refusal as refusal:
            found.append(Outcome(part.name, part.page, REFUSED, str(refusal)))
            continue
        state = (STALE if check else WRITTEN) if changed else CURRENT
        found.append(Outcome(part.name, part.page, state))
    if check:
        return found
    failed = {}
    for name in dict.fromkeys(o.file for o in found if o.state == WRITTEN and o.file in pages):
        try:
            files.write_text(root / name, pages[name])
        except OSError as error:
            failed[name] = f"{name} can't be written: {error.strerror}."
    return [
        Outcome(o.name, o.file, REFUSED, failed[o.file])
        if o.state == WRITTEN and o.file in failed
        else o
        for o in found
    ]


# What a table or a figure raises where the rows are not those that it is made of.
_UNFIT = (LookupError, ValueError, ArithmeticError)


class Refusal(Exception):
    """Why a part can't be made, in a sentence."""


def _rows(root: Path, source: str, optional: bool) -> list[results.Row]:
    place = results.PLACE / source
    try:
        found = results.read(root / place)
    except (OSError, ValueError) as error:
        raise Refusal(f"{place} can't be read: {error}; measure again.") from None
    if not found and not optional:
        raise Refusal(f"{place} is missing or has no rows; measure first.")
    return found


def _table(root: Path, part: Table, rows: list[list[results.Row]], pages: dict[str, str]) -> bool:
    """Whether the page changes; ``pages`` holds the text of those seen so far."""
    page = root / part.page
    if part.page not in pages:
        if not page.is_file():
            raise Refusal(f"{part.page} is missing.")
        try:
            # Bytes, so that the line ends stay what they are.
            pages[part.page] = page.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"{part.page} can't be read: {error}.") from None
    old = pages[part.page]
    try:
        pages[part.page] = document.replaced(old, part.name, part.make(*rows))
    except document.MarkerError as error:
        raise Refusal(f"{part.page} {error}.") from None
    except _UNFIT as error:
        raise _unfit(part, error) from None
    return pages[part.page] != old


def _figure(root: Path, part: Figure, rows: list[list[results.Row]], check: bool) -> bool:
    """Whether the file is out of date; it is drawn, unless this is a check."""
    path, digest = root / part.page, part.digest(rows, style.VERSION)
    if not any(rows):
        return False
    if png.note(path, style.KEYWORD) == digest:
        return False
    if check:
        return True
    try:
        data = style.png(part.draw, rows, digest)
    except ImportError as error:
        raise Refusal(f"{part.page} needs matplotlib: {error}; pip install matplotlib.") from None
    except _UNFIT as error:
        raise _unfit(part, error) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, data)
    except OSError as error:
        raise Refusal(f"{part.page} can't be written: {error.strerror}.") from None
    return True


def _unfit(part: Part, error: Exception) -> Refusal:
    what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return Refusal(
        f"{part.name} can't be made from {', '.join(part.sources)}: {what}; measure again."
    )

"""Generated parts of a page: what stands between two markers is written by a command."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Row = dict[str, str]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows written to {path}", file=sys.stderr)


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def replaced(page: Path, parts: dict[str, str]) -> str:
    """The page's text with every part put between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise SystemExit(f"{page} lacks the markers {begin} and {end}; put them in.")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def table(head: Sequence[str], lines: Sequence[Sequence[object]], align: str = "") -> str:
    """A Markdown table; ``align`` has "l" or "r" for each column."""
    align = align or "l" * len(head)
    rules = [":--" if side == "l" else "--:" for side in align]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, rules, *lines))

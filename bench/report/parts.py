"""What a report is made of: tables and sentences in pages, and figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zokernels.lab.benchmarks.results import Row

FIGURES = "docs/figures"


@dataclass(frozen=True)
class Table:
    """A table or a sentence of a page.

    Attributes:
        name: Of its markers, ``<!-- bench:NAME -->``.
        page: The file that it stands in, from the checkout's root.
        sources: Files under bench/results.
        make: Its Markdown, from the rows of each source.
        optional: Whether a source may be missing, which then has no rows.
    """

    name: str
    page: str
    sources: tuple[str, ...]
    make: Callable[..., str]
    optional: bool = False


@dataclass(frozen=True)
class Figure:
    """A PNG under docs/figures.

    A figure is up to date if it says that it was drawn by this version from these rows: its pixels
    depend on matplotlib's version and on fonts.

    Attributes:
        name: Of the file, without ``.png``.
        sources: Files under bench/results.
        draw: Draws on a matplotlib figure from the rows of each source.
        version: Another number has the figure drawn anew; raise it with every change of ``draw``.
        optional: Whether its sources may be missing: there is no figure then.
    """

    name: str
    sources: tuple[str, ...]
    draw: Callable[..., None]
    version: int
    optional: bool = False

    @property
    def page(self) -> str:
        """Its file, from the checkout's root."""
        return f"{FIGURES}/{self.name}.png"

    def digest(self, rows: Sequence[Sequence[Row]], style: int) -> str:
        """What the file must say of itself to be up to date.

        Args:
            rows: Of each source.
            style: The version of what all figures share.
        """
        seen: list[Any] = [self.name, self.version, style, list(map(list, rows))]
        text = json.dumps(seen, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


Part = Table | Figure

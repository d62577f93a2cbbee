"""Generated parts of a page: what stands between two markers is written by a command."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BEGIN = re.compile(r"<!-- bench:([\w-]+) -->")


class MarkerError(ValueError):
    """A page has not the markers that a part needs."""


def markers(text: str) -> list[str]:
    """The names of the parts that a page has a place for."""
    return _BEGIN.findall(text)


def replaced(text: str, name: str, content: str) -> str:
    """The text with ``content`` between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.

    Raises:
        MarkerError: If the two do not stand in the text once each, in this order.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise MarkerError(f"needs the lines {begin} and {end}, once each and in this order")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def table(head: Sequence[str], lines: Sequence[Sequence[object]], align: str = "") -> str:
    """A Markdown table; ``align`` has "l" or "r" for each column."""
    align = align or "l" * len(head)
    rules = [":--" if side == "l" else "--:" for side in align]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, rules, *lines))

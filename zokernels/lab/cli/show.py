"""What every command prints with: tables that a narrow terminal does not cut, and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Of a cell, the blanks beside it and the line after it; and of a table, the line before it.
_BESIDE, _BEFORE = 3, 1
# A word that is longer may be broken, so that a path does not push the numbers out; and on a
# terminal where not even one number fits beside such names, a shorter one.
_LONGEST = (24, 8)

Cell = str | Text


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        head: What stands above it.
        number: Whether it is never broken over lines, and stands to the right.
        key: Whether it says which row this is, and so stands in every part of a table.
    """

    head: str
    number: bool = True
    key: bool = False


def key(head: str) -> Column:
    """A column of words that says which row this is."""
    return Column(head, number=False, key=True)


def words(head: str) -> Column:
    """A column of words, which may take several lines."""
    return Column(head, number=False)


def table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    title: str = "",
    caption: str = "",
    lines: bool = False,
) -> None:
    """Print a table; columns that do not fit beside the others go below, with the rows' names.

    Args:
        console: Where to; its width decides.
        columns: The columns, those that are `key` first.
        rows: A cell a column, taken as it is; markup is a `Text`.
        title: Above it.
        caption: Below it.
        lines: Whether a line parts the rows.
    """
    if title:
        console.print(Text(title, style="italic"))
    cells = [
        [_text(column.head), *(_text(row[i]) for row in rows)] for i, column in enumerate(columns)
    ]
    for longest in _LONGEST:
        least = [_least(column, cells[i], longest) for i, column in enumerate(columns)]
        parts = list(_parts(console.width, columns, least))
        if all(_whole(least, places) <= console.width for places in parts):
            break
    for places in parts:
        made = _made(console.width, columns, cells, least, places)
        made.show_lines = lines
        # One number may be too wide all the same; the terminal then breaks the line.
        console.print(made, crop=False, no_wrap=True, overflow="ignore")
    if caption:
        console.print(Text(caption, style="dim italic"))


def say(sentence: str) -> None:
    """A sentence on stderr."""
    Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)


def _parts(width: int, columns: Sequence[Column], least: Sequence[int]) -> Iterator[list[int]]:
    """The places of the columns of each table, as many as fit beside those that are `key`."""
    keys = [i for i, column in enumerate(columns) if column.key]
    here: list[int] = []
    for i in (i for i, column in enumerate(columns) if not column.key):
        if here and _whole(least, [*keys, *here, i]) > width:
            yield [*keys, *here]
            here = []
        here.append(i)
    yield [*keys, *here]


def _made(
    width: int,
    columns: Sequence[Column],
    cells: Sequence[Sequence[Text]],
    least: Sequence[int],
    places: Sequence[int],
) -> Table:
    widths = [max(map(_width, column)) for column in cells]
    # Of the columns that can give way, the widest does.
    while _whole(widths, places) > width and (over := [i for i in places if widths[i] > least[i]]):
        widths[max(over, key=lambda i: widths[i])] -= 1
    made = Table(width=_whole(widths, places))
    for i in places:
        column = columns[i]
        made.add_column(
            Text(column.head), justify="right" if column.number else "left", overflow="fold",
            width=widths[i], no_wrap=column.number,
        )  # fmt: skip
    # The first cell of a column is its head.
    for row in range(1, len(cells[0])):
        made.add_row(*(cells[i][row] for i in places))
    return made


def _whole(widths: Sequence[int], places: Sequence[int]) -> int:
    return _BEFORE + sum(widths[i] + _BESIDE for i in places)


def _least(column: Column, cells: Sequence[Text], longest: int) -> int:
    """The width below which a column would break a number, or a word that is no monster."""
    if column.number:
        return max(map(_width, cells))
    words = [word for cell in cells for word in cell.plain.split()]
    return max((min(cell_len(word), longest) for word in words), default=0)


def _width(cell: Text) -> int:
    return max((cell_len(line) for line in cell.plain.splitlines()), default=0)


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)

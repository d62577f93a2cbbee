"""What every command of ``bench`` shares: where its rows go, how it shows them and its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zokernels.lab import files
from zokernels.lab.benchmarks import machine, results, style, tested
from zokernels.lab.cli.inputs import check_plot
from zokernels.lab.cli.show import say
from zokernels.lab.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL = Annotated[str, typer.Option(help="A configuration by name; its weights are random.")]
DTYPE = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DEVICE = Annotated[str, typer.Option(help="cpu, or cuda.")]
CSV = Annotated[Path | None, typer.Option("--csv", help="Append the rows to this file.")]
JSON = Annotated[Path | None, typer.Option("--json", help="Also write them to this file.")]
PLOT = Annotated[Path | None, typer.Option("--plot", help="Draw them: a .png, .svg or .pdf file.")]


@dataclass(frozen=True)
class Output:
    """The files that a command was asked for.

    Args:
        csv: Rows are appended to it.
        json: Replaced by the rows.
        plot: Replaced by a picture.
        columns: Of the rows.
        later: Those of them that an earlier version's CSV may lack.

    Raises:
        InputError: If one of the files could not be written; nothing is measured then.
    """

    csv: Path | None
    json: Path | None
    plot: Path | None
    columns: Sequence[str]
    later: Sequence[str] = machine.LATER

    def __post_init__(self) -> None:
        files.check_json(self.json)
        if self.csv is not None:
            results.check(self.csv, self.columns, self.later)
        if self.plot is not None:
            check_plot(self.plot)

    def write(
        self, name: str, found: Sequence[Mapping[str, Any]], draw: Callable[[], Figure]
    ) -> None:
        """Write the files.

        Args:
            name: Of the rows in the JSON file.
            found: The rows.
            draw: Makes the picture.

        Raises:
            RunError: If a file cannot be written; the others are.
        """
        jobs: list[tuple[str, Path | None, Callable[[Path], None]]] = [
            ("--csv", self.csv, lambda path: results.append(path, self.columns, found)),
            ("--json", self.json, lambda path: files.write_json(path, {name: list(found)})),
            ("--plot", self.plot, lambda path: style.save(draw(), path)),
        ]
        failed = []
        for option, path, write in jobs:
            try:
                if path is not None:
                    write(path)
            except OSError as error:
                failed.append(f"{option} {path} could not be written: {error.strerror}")
        if failed:
            raise RunError("; ".join(failed) + ".")


def progress() -> Progress:
    """A bar on stderr, for tasks whose description says what goes on."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def say_tests(outcome: str | None = None) -> None:
    """One line on stderr where the rows can't say that the tests passed."""
    outcome = outcome or tested.outcome()
    lines = {
        tested.FAILED: "A test failed for this code in the last run; the rows say so.",
        tested.NOT_RUN: "The tests were not run for this code; the rows say so. Run `make test`.",
        tested.NO_CHECKOUT: "Installed apart from its tests, so the rows can't say that they pass.",
    }
    if outcome in lines:
        say(lines[outcome])

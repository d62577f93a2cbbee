"""What every command of ``bench`` shares: where its rows go, how it shows them and its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from zokernels.lab import files
from zokernels.lab.benchmarks import forecast, machine, results, style, tested
from zokernels.lab.cli.inputs import check_plot
from zokernels.lab.cli.show import say
from zokernels.lab.errors import RunError
from zokernels.lab.runs import answers

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
        answers.check(self.json)
        if self.csv is not None:
            results.check(self.csv, self.columns, self.later)
        if self.plot is not None:
            check_plot(self.plot)


class Rows:
    """The rows of a command, which are in its files as soon as they are there.

    Args:
        out: The files.
        name: Of the rows in the JSON file.
    """

    def __init__(self, out: Output, name: str) -> None:
        self.out, self.name = out, name
        self.all: list[dict[str, Any]] = []
        self.interrupted = False
        self._waiting: list[dict[str, Any]] = []

    def add(self, *rows: dict[str, Any]) -> None:
        """Add rows and write them; what can't be written now is tried again with the next."""
        self.all += rows
        self._waiting += rows
        self._write()

    @contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Ctrl-C ends this part; where there is no row yet, it ends the command."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.all:
                raise
            self.interrupted = True

    def finish(self, draw: Callable[[], Figure]) -> int:
        """Draw them and return the exit code; a sentence says what Ctrl-C has left.

        Raises:
            RunError: If a file cannot be written; the others are.
        """
        failed = self._write()
        failed += self._try("--plot", self.out.plot, lambda path: style.save(draw(), path))
        if self.interrupted:
            paths = [path for path in (self.out.csv, self.out.json, self.out.plot) if path]
            where = f" in {' and '.join(map(str, paths))}" if paths else ", above"
            count = f"{len(self.all)} row{'s' * (len(self.all) != 1)}"
            say(f"Interrupted; what was measured before is kept{where}: {count}.")
        if failed:
            raise RunError("; ".join(failed) + ".")
        return 130 if self.interrupted else 0

    def _write(self) -> list[str]:
        waiting, self._waiting = self._waiting, []
        failed = []
        if waiting:
            failed = self._try(
                "--csv", self.out.csv, lambda path: results.append(path, self.out.columns, waiting)
            )
        if failed:
            self._waiting = waiting
        return failed + self._try(
            "--json", self.out.json, lambda path: files.write_json(path, {self.name: self.all})
        )

    def _try(self, option: str, path: Path | None, write: Callable[[Path], None]) -> list[str]:
        try:
            if path is not None:
                write(path)
        except OSError as error:
            return [f"{option} {path} could not be written: {error.strerror}"]
        return []


class Bar:
    """A bar on stderr that says what goes on and how long the rest takes, and lines above it."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def task(self, what: str, total: float) -> Task:
        """Something to be done, as so many parts."""
        return Task(self._progress, self._progress.add_task(what, total=total, left=""))

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self._progress.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Task:
    """A line of a `Bar`."""

    progress: Progress
    number: TaskID

    def advance(self) -> None:
        """One more part is done."""
        self.progress.advance(self.number)

    def show(
        self, what: str | None = None, done: float | None = None, left: float | None = None
    ) -> None:
        """Say what goes on, how much is done, or how many seconds the rest takes."""
        self.progress.update(self.number, description=what, completed=done)
        if left is not None:
            self.progress.update(self.number, left=f"{forecast.words(left)} left" if left else "")


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

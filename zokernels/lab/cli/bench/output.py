"""What every command of ``bench`` shares: where its rows go, how it shows them and its progress."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zokernels.lab import files
from zokernels.lab.benchmarks import machine, results, tested
from zokernels.lab.errors import InputError, RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL = Annotated[str, typer.Option(help="A configuration by name; its weights are random.")]
DTYPE = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DEVICE = Annotated[str, typer.Option(help="cpu, or cuda.")]
CSV = Annotated[Path | None, typer.Option("--csv", help="Append the rows to this file.")]
JSON = Annotated[Path | None, typer.Option("--json", help="Also write them to this file.")]
PLOT = Annotated[Path | None, typer.Option("--plot", help="Draw them: a .png, .svg or .pdf file.")]

_FORMS = (".png", ".svg", ".pdf")


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
            _check_plot(self.plot)

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
            ("--plot", self.plot, lambda path: _save(draw(), path)),
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


def lacks(package: str) -> str:
    """How to install a package that is not there; empty where it is."""
    named = {"transformers": "'.[hf]'", "matplotlib": "'matplotlib>=3.8'"}
    there = importlib.util.find_spec(package) is not None
    return "" if there else f"pip install {named.get(package, package)}"


def check_needs(what: str, package: str) -> None:
    """Raise unless a package is there that something can't do without.

    Raises:
        InputError: Saying how to install it.
    """
    if how := lacks(package):
        raise InputError(f"{what} needs {package}: {how}.")


def check_choice(option: str, value: str, allowed: Collection[str]) -> None:
    """Raise unless an option's value is one of those allowed.

    Raises:
        InputError: Naming them.
    """
    if value not in allowed:
        raise InputError(f"{option} must be one of {', '.join(allowed)}, got '{value}'.")


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


def say(sentence: str) -> None:
    """A sentence on stderr."""
    Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)


def _check_plot(path: Path) -> None:
    check_needs("--plot", "matplotlib")
    if path.suffix.lower() not in _FORMS:
        raise InputError(f"--plot {path} must end in {', '.join(_FORMS[:-1])} or {_FORMS[-1]}.")
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"--plot {path} is no ordinary file; name one, or a new one.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: its folder does not exist; make it first.")


def _save(figure: Figure, path: Path) -> None:
    draft = path.with_name(f".draft.{path.name}")
    try:
        figure.savefig(draft, dpi=150)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

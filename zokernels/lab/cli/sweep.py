"""``zokernels sweep``: a grid of runs from one file, and one table of what they found."""

import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from zokernels.lab.cli.slow import say_slow_run
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.files import write_answer, write_text
from zokernels.lab.runs import answers
from zokernels.lab.runs.interrupt import raised_by_sigterm
from zokernels.lab.sweeps import file, plots, table
from zokernels.lab.sweeps.folder import SweepFolder
from zokernels.lab.sweeps.plan import Run, plan
from zokernels.lab.sweeps.pool import Outcome, Pool, threads_each
from zokernels.lab.tasks.metric import METRICS

_BAD = ("failed", "refused", "died")


def command(
    sweep: Annotated[Path, typer.Argument(help="The sweep file; docs/sweeps.md has its form.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and tables; it may hold some.")],
    workers: Annotated[int, typer.Option(help="Processes, each with its share of threads.")] = 1,
    part: Annotated[
        list[str] | None, typer.Option(help="Do the runs of this part only; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and list the runs, no more.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write how many ended how here.")] = None,
) -> int:
    """Do every run of a grid that is not done yet, and write the table of all of them."""
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}.")
    found = file.read(sweep)
    runs, skipped = plan(found, out, sweep)
    if json is not None:
        answers.check(json, reads={sweep, *chain(*(answers.read_by(r.settings) for r in runs))})
    wanted = set(part or (known.name for known in found.parts))
    if unknown := wanted - {known.name for known in found.parts}:
        names = ", ".join(known.name for known in found.parts)
        raise InputError(f"--part must be one of {names}, got '{min(unknown)}'.")
    console = Console()
    if dry_run:
        chosen = [run for run in runs if run.part in wanted]
        for run in chosen:
            console.print(run.name, highlight=False, markup=False, soft_wrap=True)
        console.print(f"{len(chosen)} runs.", highlight=False)
        return 0
    with SweepFolder(out, found.text), raised_by_sigterm():
        began = time.monotonic()
        outcomes, stopped = _do(runs, wanted, out, workers, console)
        cells = table.cells(runs, skipped, outcomes)
        try:
            pictures = _write(out, found.title, runs, cells, outcomes)
        except OSError as error:
            raise RunError(
                f"The tables of {out} could not be written: {error.strerror}. Make room, and the "
                "same command writes them; no finished run is done again."
            ) from None
    counts = Counter(outcomes[r.settings.out].status for r in runs if r.settings.out in outcomes)
    counts["not run"] = len(runs) - counts.total()
    said = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    console.print(
        f"{len(runs)} runs: {said}, in {time.monotonic() - began:.0f} s. The table is "
        f"{out}/table.md, with {len(pictures)} plots; the same command does what is left.",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if json is not None:
        write_answer(json, {"runs": len(runs), **{k: n for k, n in counts.items() if n}})
    if stopped:
        return 130
    return 1 if any(counts[status] for status in _BAD) else 0


def _do(
    runs: list[Run], wanted: set[str], out: Path, workers: int, console: Console
) -> tuple[dict[Path, Outcome], bool]:
    """Does what is left, and says how every run ended, and whether Ctrl-C ended it all."""
    outcomes: dict[Path, Outcome] = {}
    for run in runs:
        if (metrics := table.metrics_of(run)) is not None:
            reason = metrics["failure"] or ""
            outcomes[run.settings.out] = Outcome("failed" if reason else "kept", reason)
    todo = [run for run in runs if run.settings.out not in outcomes and run.part in wanted]
    if not todo:
        return outcomes, False
    for run in todo:
        say_slow_run(run.settings)
    threads = threads_each(workers)
    console.print(
        f"{len(todo)} of {len(runs)} runs to do, by {min(workers, len(todo))} workers of "
        f"{threads} threads.",
        highlight=False,
    )
    with Display(console, len(runs), len(outcomes), min(workers, len(todo))) as display:

        def ended(number: int, run: Run, outcome: Outcome) -> None:
            outcomes[run.settings.out] = outcome
            display.ended(number, run, outcome)

        try:
            Pool(workers, threads, out, display.told, ended).do(todo)
        except KeyboardInterrupt:
            return outcomes, True
    return outcomes, False


def _write(
    out: Path,
    title: str,
    runs: list[Run],
    cells: list[table.Cell],
    outcomes: dict[Path, Outcome],
) -> dict[str, str]:
    pictures = {}
    for part in dict.fromkeys(cell.part for cell in cells):
        name = f"{part}.png"
        if plots.draw([c for c in cells if c.part == part], out / name, f"{title}: {part}"):
            pictures[part] = name
    write_text(out / "runs.csv", table.runs_csv(table.rows(runs, outcomes)))
    write_text(out / "table.csv", table.table_csv(cells))
    write_text(out / "table.md", table.markdown(title, cells, pictures))
    return pictures


class Display:
    """A bar for the whole and one for each worker; outside a terminal, a line a run."""

    def __init__(self, console: Console, runs: int, done: int, workers: int) -> None:
        self.console = console
        self._done, self._runs = done, runs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=runs, completed=done, loss="")
        self._bars = [
            self._progress.add_task(f"worker {i}", total=None, loss="") for i in range(workers)
        ]

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def told(self, number: int, run: Run, what: dict[str, Any]) -> None:
        """A worker's step."""
        loss = what.get("loss")
        self._progress.update(
            self._bars[number],
            description=run.name,
            total=run.settings.steps,
            completed=what.get("step", 0),
            loss=f"loss {loss:.4f}" if loss is not None else "",
        )

    def ended(self, number: int, run: Run, outcome: Outcome) -> None:
        """A run's end, in a line that stays."""
        self._done += outcome.status != "interrupted"
        self._progress.update(self._all, completed=self._done)
        self._progress.reset(self._bars[number], description=f"worker {number}", loss="")
        said = f"[{self._done}/{self._runs}] {run.name}: {outcome.status}"
        if (metrics := table.metrics_of(run)) is not None and not metrics["failure"]:
            metric, ends = METRICS[metrics["metric"]], ("before", "after")
            numbers = [metrics[f"dev_accuracy_{end}"] for end in ends]
            shown = ["none" if n is None else metric.text(n) for n in numbers]
            said += f", {' -> '.join(shown)} in {metrics['seconds']:.0f} s"
        if outcome.reason:
            said += f": {outcome.reason}"
        self.console.print(said, highlight=False, markup=False, soft_wrap=True)

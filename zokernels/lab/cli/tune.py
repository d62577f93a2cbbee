"""``zokernels tune``: which learning rate and ε a fine-tuning run wants, by forwards alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand

import zokernels as zk
from zokernels.lab import files
from zokernels.lab.cli import options, presets, show
from zokernels.lab.cli.inputs import check_choice, check_plot
from zokernels.lab.cli.progress import Sayer
from zokernels.lab.cli.slow import say_slow_run
from zokernels.lab.errors import InputError
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs import answers, checks, tuning
from zokernels.lab.runs.prepare import prepare
from zokernels.lab.runs.settings import PANEL, Settings, described
from zokernels.lab.runs.state import Run

BY = ("none", "group", "layer")
# Of finetune's options, what is about a run and not about its steps, or what is found here.
_NOT_HERE = (
    *(s.name for s in described() if s.metadata[PANEL] == "Run" and s.name != "device"),
    *"resume calibrate metric max_new_tokens lr schedule warmup eps_schedule eps_end".split(),
    *"probe_forwards weight_decay".split(),
)


class Command(TyperCommand):
    """Says of an option that is finetune's only what that is, where a parser knows it not."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of any command; raises InputError for an option of finetune."""
        own = {name for option in self.params for name in option.opts}
        for given in args:
            name = given.partition("=")[0]
            plain = name.removeprefix("--").removeprefix("no-").replace("-", "_")
            if name not in own and plain in _NOT_HERE:
                raise InputError(
                    f"{name} is an option of finetune; tune finds the rate and runs no steps, so "
                    "leave it out."
                )
        return super().parse_args(ctx, args)


@options.with_settings(but=_NOT_HERE)
def command(
    context: typer.Context,
    settings: dict[str, Any],
    preset: options.Preset = None,
    forwards: Annotated[int, typer.Option(help="How many there may be.")] = 800,
    by: Annotated[
        str, typer.Option(help="Also probe parts of the weights: group, layer or none.")
    ] = "none",
    plot: Annotated[
        Path | None, typer.Option(help="Also draw what was found: a .png, .svg or .pdf file.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write all numbers here.")] = None,
) -> int:
    """Measure which learning rate and eps a run of finetune with these options wants."""
    check_choice("--by", by, BY)
    if preset == "list":
        return presets.show()
    asked = Settings(**options.resolved(context, settings, preset), out=Path("unused"))
    reads = [*answers.read_by(asked)]
    answers.check(json, reads=reads)
    if plot is not None:
        check_plot(plot, reads)
    checks.check(asked)
    checks.check_probed(asked, "tune")
    quiet()
    say_slow_run(asked)
    console = Console()
    sayer = Sayer(console)
    run = Run(asked, sayer)
    prepare(run)
    found = _probe(run, forwards, None if by == "none" else by, console)
    _show(found, console)
    if found.parts:
        _show_parts(found, console)
    sayer.say(verdict(found, asked.steps))
    if json is not None:
        left_out = (*_NOT_HERE, "auto_lr", "tuned")
        own = {k: v for k, v in asked.plain().items() if k not in left_out}
        said = {"verdict": verdict(found, asked.steps)}
        files.write_answer(json, {"settings": own, **found.plain(), **said})
    if plot is not None:
        from zokernels.lab.cli import tune_plot

        tune_plot.write(found, plot, f"{asked.title} on {asked.task}")
    return 0


def _probe(run: Run, forwards: int, by: str | None, console: Console) -> zk.Probe:
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("forwards", total=None)
        return tuning.probe(
            run, forwards, by, lambda done, total: progress.update(bar, completed=done, total=total)
        )


def _show(found: zk.Probe, console: Console) -> None:
    whole = found.whole
    measured = [
        ("L", found.loss, "the loss"),
        ("‖g‖²", whole.squared_gradient, "the gradient of all data, squared"),
        ("E[d²]", found.mean_square, "the slope a step sees, squared: signal and noise"),
        ("h", whole.curvature, "the curvature along the noise, a Hessian's trace"),
        ("best lr", found.best_rate, "lowers the loss fastest, now"),
        ("largest lr", found.largest_rate, "above it the loss rises"),
    ]
    rows = [
        (name, str(number), str(number.directions), what)
        for name, number, what in measured
        if number is not None
    ]
    if found.eps_range is not None:
        low, high = found.eps_range
        # Beyond the ladder nothing was tried.
        less = " or less" if low == found.ladder[0].eps else ""
        more = " or more" if high == found.ladder[-1].eps else ""
        holds = f"{low:.0e}{less} to {high:.0e}{more}"
        rows.append(("eps", holds, "4", f"where slopes hold; here {found.eps:g}"))
    numbers = map(show.Column, ("value ± error", "directions"))
    columns = [show.key("number"), *numbers, show.words("is")]
    show.table(console, columns, rows, title="Measured")


def _show_parts(found: zk.Probe, console: Console) -> None:
    rows = []
    for part in found.parts:
        numbers = (part.squared_gradient, part.mean_square, part.curvature, part.fall or "–")
        rows.append((part.label, f"{part.weights:,}", *map(str, numbers)))
    heads = ("weights", "‖g‖²", "E[d²]", "h", "a step of it alone gains")
    columns = [show.key("part"), *map(show.Column, heads)]
    show.table(console, columns, rows, title="By part")


def verdict(found: zk.Probe, steps: int) -> str:
    """What to do, in a sentence or two.

    Args:
        found: What was found.
        steps: Of the run to come.
    """
    took = f"{found.forwards:,} forwards"
    if found.rate is None or found.best_rate is None or found.largest_rate is None:
        return f"After {took} no rate is advised: {found.why}"
    first, all_of_them = found.fall(), found.fall(steps)
    more = ""
    if all_of_them.value < found.loss.value:
        more = f", and {steps:,} by {all_of_them} were the numbers to stay what they are"
    return (
        f"Take --lr {found.rate.value:.2g} with --eps {found.eps:g} for {found.steps:,} steps. Now "
        f"the loss falls fastest at {found.best_rate}, and rises above "
        f"{found.largest_rate.value:.2g}; over a run their noise adds up, so that less is best. A "
        f"step then lowers the loss, {found.loss.value:.3g} now, by {first}{more} ({took})."
    )

"""``zokernels finetune``: a task, a model, and an optimizer."""

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from zokernels.lab import files
from zokernels.lab.cli import inputs, options, presets, show
from zokernels.lab.cli.slow import say_slow_run
from zokernels.lab.errors import InputError
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs import answers, checks, folder
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.processes import is_first
from zokernels.lab.runs.resume import settings_of
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings, option
from zokernels.lab.tasks.metric import METRICS


@options.with_settings()
def command(
    context: typer.Context,
    settings: dict[str, Any],
    preset: options.Preset = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Also write the metrics to this file.", rich_help_panel="Run"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder; it has all settings.", rich_help_panel="Run"
        ),
    ] = None,
) -> int:
    """Fine-tune a model on a task by forward passes and write a run folder."""
    if preset == "list" and resume is None:
        return presets.show()
    if resume is not None:
        _check_alone(context)
        asked = settings_of(resume)
    else:
        chosen = options.resolved(context, settings, preset)
        asked = Settings(**{**chosen, "out": chosen["out"] or Path()})
        if chosen["out"] is None:
            asked.out = Path("runs") / f"{Path(asked.task).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    answers.check(json, reads=answers.read_by(asked), out=asked.out)
    metrics = train(asked, _words(), resume=resume is not None)
    if json is not None and is_first():
        files.write_answer(json, metrics)
    return 130 if metrics["interrupted"] else 0


def _words() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _check_alone(context: typer.Context) -> None:
    """Refuses options beside --resume that would change the run."""
    for name in context.params:
        if name not in ("resume", "json") and options.is_given(context, name):
            raise InputError(
                f"--resume takes every setting from the run's folder; leave out {option(name)}."
            )


def train(settings: Settings, command_line: str = "", resume: bool = False) -> dict[str, Any]:
    """Runs the settings under a progress bar, says how it ended, and returns the metrics."""
    # rich's live display takes a moment to load, and `--help` needs none of it.
    from zokernels.lab.cli.progress import ProgressWatcher

    checks.check(settings)
    quiet()
    if not is_first():
        return Finetune(settings, Watcher(), command_line, resume).run()
    say_slow_run(settings)
    if how := inputs.lacks("matplotlib"):
        show.say(f"The report will have no plot, which needs matplotlib: {how}.")
    with ProgressWatcher(settings.steps) as watcher:
        metrics = Finetune(settings, watcher, command_line, resume).run()
        where = f"{settings.out}/{folder.REPORT}"
        if metrics["interrupted"]:
            weights = f"their weights are in {settings.out}/{folder.WEIGHTS}, the report in"
            watcher.say(
                f"Interrupted after {metrics['steps']} steps; "
                f"{weights if settings.save_weights else 'the report is in'} {where}."
            )
        else:
            watcher.say(ending(metrics, where))
        if metrics["diverged"]:
            watcher.say(metrics["diverged"])
    return metrics


def ending(metrics: dict[str, Any], where: str) -> str:
    """The line that a finished run ends with."""
    before, after = metrics["dev_accuracy_before"], metrics["dev_accuracy_after"]
    metric = METRICS[metrics["metric"]]
    if before is None or after is None:
        return f"{metrics['steps']} steps, {metrics['seconds']:.0f} s, nothing evaluated: {where}"
    return (
        f"dev {metric.name} {metric.text(before)} -> {metric.text(after)} ({metrics['data']}, "
        f"{metrics['steps']} steps, {metrics['seconds']:.0f} s): {where}"
    )

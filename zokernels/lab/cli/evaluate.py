"""``zokernels evaluate`` and ``predict``: a saved run, a model or an adapter, asked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from zokernels.lab import files
from zokernels.lab.cli import options
from zokernels.lab.cli.progress import Sayer
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.models.loading import quiet
from zokernels.lab.runs import answers, checks, saved
from zokernels.lab.runs.evaluate import accuracy, predictions
from zokernels.lab.runs.settings import Settings
from zokernels.lab.tasks import data

# What is asked does not depend on the others.
_ASKED = (
    "task columns metric template chat demos calibrate max_length max_new_tokens batch_size dtype "
    "device retry_oom".split()
)
_SAVED = typer.Argument(
    metavar="SAVED", help="Run folder, adapter's folder, or model as of finetune --model."
)


@options.with_settings(only=(*_ASKED, "data", "eval_data", "eval_examples"))
def command(
    context: typer.Context,
    settings: dict[str, Any],
    saved_as: Annotated[str, _SAVED],
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure a saved run, a model or an adapter, on its dev split or on the rows of --data."""
    s, sayer = _settings(context, settings, saved_as), Sayer(Console())
    answers.check(json, reads=answers.read_by(s))
    quiet()
    task = s.the_task()
    named = settings["data"] if options.is_given(context, "data") else None
    # Of a file all is meant, and of a folder what it has to report on.
    whole = named is not None and not Path(named).is_dir() and s.eval_data is None
    rows = data.rows_of(task, named, data.parsed(s.columns)) if named and whole else None
    run = saved.opened(s, rows, sayer)
    examples = data.part(run.splits.dev, s.measured)
    if not examples:
        raise InputError("--eval-examples 0 leaves nothing to measure; raise it.")
    began = time.perf_counter()
    found = accuracy(
        run.scorer, examples, s.batch_size, calibrate=s.calibrate, retry_oom=s.retry_oom
    )
    metric, source = run.task.metric, named if rows is not None else run.splits.source
    sayer.say(
        f"{metric.name} {metric.text(found.value, found.error)} ({found.examples:,} examples of "
        f"{source}, {time.perf_counter() - began:.1f} s)"
    )
    if json is not None:
        files.write_answer(
            json,
            {
                "model": saved_as, "task": run.task.name, "data": source, "metric": metric.name,
                "value": found.value, "standard_error": found.error, "examples": found.examples,
            },
        )  # fmt: skip


@options.with_settings(only=_ASKED)
def predict(
    context: typer.Context,
    settings: dict[str, Any],
    saved_as: Annotated[str, _SAVED],
    rows: Annotated[str, typer.Argument(help="File with the rows to answer, or data set.")],
    out: Annotated[
        Path | None, typer.Option(help="File of JSON lines for the answers, instead of the screen.")
    ] = None,
) -> None:
    """Answer rows that need no label: each row, with what the model says, as a line of JSON."""
    s = _settings(context, settings, saved_as)
    given = [Path(rows)] if Path(rows).exists() else []
    answers.check(out, "--out", [*answers.read_by(s), *given])
    quiet()
    examples = data.rows_of(s.the_task(), rows, data.parsed(s.columns), labelled=False)
    run = saved.opened(s, examples, Sayer(Console(stderr=True)))
    lines = [
        files.json_of(line, ensure_ascii=False, default=str) + "\n"
        for line in predictions(run.scorer, examples, s.batch_size, s.calibrate)
    ]
    text = "".join(lines)
    try:
        if out is not None:
            return files.write_text(out, text)
    except OSError as error:
        print(text, end="")
        raise RunError(
            f"--out {out} could not be written: {error.strerror}. The answers are on the screen."
        ) from None
    print(text, end="")


def _settings(context: typer.Context, settings: dict[str, Any], saved_as: str) -> Settings:
    given = {k: v for k, v in settings.items() if options.is_given(context, k)}
    given.setdefault("device", settings["device"])
    s = saved.settings_of(saved_as, given)
    checks.check_each(s)
    return s

"""``zokernels bench step``: a whole step beside its two forwards, and beside the peers' steps."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console

from zokernels import noise
from zokernels.lab.benchmarks import forecast, passes, plots, suite, timing
from zokernels.lab.benchmarks import peers as others
from zokernels.lab.cli import inputs, show
from zokernels.lab.cli.bench import output
from zokernels.lab.cli.slow import say_slow
from zokernels.lab.errors import InputError


def command(
    model: output.MODEL = "opt-125m",
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 64,
    dtype: output.DTYPE = "float32",
    device: output.DEVICE = "cpu",
    optimizer: Annotated[str, typer.Option(help="As for finetune.")] = "zo-sgd",
    queries: Annotated[int, typer.Option(min=1, help="Directions a step.")] = 1,
    dist: Annotated[str, typer.Option(help="gaussian, rademacher or rank1.")] = "gaussian",
    points: Annotated[
        int, typer.Option(min=2, help="Points of a forward with --perturb paired.")
    ] = 2,
    scheme: Annotated[str, typer.Option(help="What is trained, as for finetune.")] = "full",
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            help="on_entry, paired or in_place, and on CUDA also graphed_on_entry, graphed_paired "
            "or graphed_in_place: the step as a CUDA graph. May be repeated."
        ),
    ] = None,
    loss: Annotated[
        str, typer.Option(help="tokens: of all; candidates: two answers of one token, as a task.")
    ] = "tokens",
    lazy_logits: Annotated[bool, typer.Option(help="Logits only where the loss looks.")] = True,
    peers: Annotated[
        bool, typer.Option(help="Also MeZO's, torchzero's and first-order steps, of one query.")
    ] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, in turn.")] = 20,
    csv_file: output.CSV = None,
    json: output.JSON = None,
    plot: output.PLOT = None,
) -> int:
    """Time a step against the forwards it is made of, with random weights and tokens."""
    inputs.check_needs("bench step", "transformers")
    from zokernels.lab.benchmarks import models, step

    out = output.Output(csv_file, json, plot, step.COLUMNS, step.LATER)
    modes = perturb or ["on_entry", "paired"]
    inputs.check_choice("--model", model, models.NAMES)
    inputs.check_choice("--dtype", dtype, passes.DTYPES)
    inputs.check_choice("--dist", dist, noise.KINDS)
    inputs.check_choice("--loss", loss, step.LOSSES)
    for mode in modes:
        inputs.check_choice("--perturb", mode, (*step.MODES, *step.GRAPHED))
        _check_graphed(mode, device, loss, mode in step.GRAPHED)
    models.check(model, rows, length, dtype, device)
    say_slow(device)
    # The peers are timed once, beside the first mode that is no graph.
    waiting = others.available() if peers and queries == 1 else []
    kept, before = output.Rows(out, "step"), timing.busy()
    with output.Bar() as bar, kept.until_interrupted():
        for place, mode in enumerate(modes):
            names, waiting = ([], waiting) if mode in step.GRAPHED else (waiting, [])
            case = step.Case(
                model, rows, length, dtype, device, optimizer, dist, mode, lazy_logits, scheme,
                loss, queries, points if mode == "paired" else 2, tuple(names),
            )  # fmt: skip
            task = bar.task(f"{model} {dtype} {mode}", repeats)
            done = partial(_repeated, bar, task, repeats, len(modes) - place - 1, [])
            result = step.measure(case, repeats, done)
            kept.add(step.row(case, result))
            bar.say(suite.headline("step", kept.all[-1:])[0])
    found, console = kept.all, Console()
    _show(console, found)
    for line in _comparison(others.beside(found)):
        console.print(line, highlight=False)
    if device == "cpu" and (disturbed := timing.others(before, timing.busy())):
        show.say(disturbed)
    output.say_tests(str(found[0]["tests"]))
    return kept.finish(lambda: plots.step(found))


def _repeated(
    bar: output.Bar, task: output.Task, repeats: int, modes_left: int, ends: list[float]
) -> None:
    """A repetition has ended, as those at ``ends`` did."""
    ends.append(time.perf_counter())
    task.advance()
    if len(ends) == 1:
        return
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    left = each * (repeats - len(ends))
    task.show(left=left)
    if len(ends) == 2:
        more = f", and {modes_left} more of --perturb after it" if modes_left else ""
        bar.say(
            f"{repeats} repetitions, {forecast.words(left)} by the time of one{more}; Ctrl-C keeps "
            "the rows that are there."
        )


def _check_graphed(mode: str, device: str, loss: str, graphed: bool) -> None:
    if graphed and not device.startswith("cuda"):
        raise InputError(f"--perturb {mode} captures a CUDA graph; give --device cuda with it.")
    if graphed and loss != "tokens":
        raise InputError(f"--perturb {mode} takes the loss of all tokens; leave --loss out.")


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    first, forwards = rows[0], 2 * int(rows[0]["queries"])
    shown = {
        "a step": lambda row: f"{row['ratio']} ({row['low']} to {row['high']})",
        "  its forwards": lambda row: row["forwards"],
        "  noise": lambda row: row["noise"],
        "  update": lambda row: row["update"],
        "  rest, Python": lambda row: row["rest"],
        "milliseconds": lambda row: row["step_ms"],
        f"of {forwards} plain forwards": lambda row: row["forwards_ms"],
        "of plain forwards of the batch repeated": lambda row: row["together_ms"],
        "tokens a second": lambda row: row["tokens_per_s"],
        "nanoseconds a weight": lambda row: row["ns_per_weight"],
        "peak memory beyond the forwards, MiB": lambda row: row["memory_mb"],
    }
    lines = []
    for name, value in shown.items():
        values = [str(value(row)) for row in rows]
        if any(values):
            lines.append((name, *(v or "–" for v in values)))
    show.table(
        console,
        [show.key("what"), *(show.Column(row["perturb"]) for row in rows)],
        lines,
        title=f"{first['model']}, {first['scheme']}, {first['dtype']}, {first['rows']} × "
        f"{first['length']} tokens, {first['optimizer']}\nMultiples of {forwards} plain forwards, "
        "those timed in turn with the column's own steps; medians and quartiles",
    )


def _comparison(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{title}: {row[name]} times the two forwards, "
        f"{float(row[name]) / float(row['ratio']):.1f} times this step ({row['perturb']})"
        for name, title in others.TITLES.items()
        if row.get(name)
    ]

"""``zokernels bench memory``: what each optimizer holds at its peak, by length and batch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from zokernels import noise
from zokernels.lab.benchmarks import forecast, passes, plots, suite
from zokernels.lab.cli import inputs, show
from zokernels.lab.cli.bench import output
from zokernels.lab.cli.slow import say_slow
from zokernels.lab.errors import InputError

if TYPE_CHECKING:
    from zokernels.lab.benchmarks.instruments import footprint

_OPTIMIZERS = [
    "inference", "zo-sgd", "zo-sgd-sign", "zo-sgd-mmt", "zo-sgd-cons", "zo-adam", "forward-grad",
    "hybrid", "fo-sgd", "fo-adam",
]  # fmt: skip


def command(
    model: output.MODEL = "opt-125m",
    optimizer: Annotated[
        list[str] | None, typer.Option(help="As for finetune, or inference; may be repeated.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the batch.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a row.")] = None,
    dtype: output.DTYPE = "float32",
    perturb: Annotated[str, typer.Option(help="on_entry, paired or in_place.")] = "on_entry",
    dist: Annotated[str, typer.Option(help="gaussian, rademacher or rank1.")] = "gaussian",
    points: Annotated[
        int, typer.Option(min=2, help="Points of a forward with --perturb paired.")
    ] = 2,
    device: output.DEVICE = "cpu",
    measure: Annotated[
        bool, typer.Option(help="Measure what fits here, or only by arithmetic.")
    ] = True,
    gpu_memory: Annotated[
        float, typer.Option(min=1, help="GiB of one GPU, for how many a step needs.")
    ] = 80.0,
    csv_file: output.CSV = None,
    json: output.JSON = None,
    plot: output.PLOT = None,
) -> int:
    """Peak memory of every optimizer, measured and by arithmetic; 1 if a measurement fails.

    What this machine does not hold is by arithmetic alone, and marked so.
    """
    inputs.check_needs("bench memory", "transformers")
    from zokernels.lab.benchmarks import memory, models
    from zokernels.lab.benchmarks.instruments import footprint

    out = output.Output(csv_file, json, plot, memory.COLUMNS, memory.LATER)
    inputs.check_choice("--model", model, models.NAMES)
    inputs.check_choice("--dtype", dtype, passes.DTYPES)
    inputs.check_choice("--perturb", perturb, ("on_entry", "paired", "in_place"))
    inputs.check_choice("--dist", dist, noise.KINDS)
    if points != 2 and perturb != "paired":
        raise InputError(f"--points {points} needs --perturb paired; got --perturb {perturb}.")
    wanted = optimizer or _OPTIMIZERS
    for name in wanted:
        inputs.check_choice("--optimizer", name, footprint.KINDS)
    batches, lengths = rows or [4], length or [64, 256, 1024]
    for option, values in (("--rows", batches), ("--length", lengths)):
        if min(values) < 1:
            raise InputError(f"{option} must be at least 1, got {min(values)}.")
    models.check_shape(model, max(lengths), device)
    cells = [
        footprint.Cell(model, name, batch, tokens, dtype, perturb, device, dist, points)
        for name, batch, tokens in itertools.product(wanted, batches, lengths)
    ]
    if measure:
        say_slow(device)
    kept = output.Rows(out, "memory")
    with output.Bar() as bar, kept.until_interrupted():
        expected = _forecast(bar, cells) if measure else forecast.Forecast([1.0] * len(cells))
        task = bar.task("", len(cells))
        for cell in cells:
            task.show(f"{cell.optimizer}, {cell.rows} × {cell.length}")
            began = time.perf_counter()
            kept.add(memory.row(cell, measure))
            expected.done(time.perf_counter() - began)
            bar.say(suite.headline("memory", kept.all[-1:])[0])
            task.advance()
            task.show(left=expected.left)
    found = kept.all
    _show(found, gpu_memory)
    output.say_tests(str(found[0]["tests"]))
    code = kept.finish(lambda: plots.memory(found))
    failed = [row for row in found if row["source"].startswith(memory.FAILED)]
    for row in failed:
        show.say(f"{row['optimizer']}, {row['rows']} × {row['length']} {row['source']}")
    return code or int(bool(failed))


def _forecast(bar: output.Bar, cells: Sequence[footprint.Cell]) -> forecast.Forecast:
    """How long they take, which is said."""
    from zokernels.lab.benchmarks import memory

    first = cells[0]
    product = forecast.seconds_of_a_product(passes.DTYPES[first.dtype], first.device)
    task, found = bar.task("Arithmetic", len(cells)), []
    for cell in cells:
        found.append(memory.guess(cell, product))
        task.advance()
    expected = forecast.Forecast(found)
    to_measure = sum(seconds > 0 for seconds in found)
    bar.say(
        f"{to_measure} of {len(cells)} cells to measure, each in a process of its own: "
        f"{forecast.words(expected.left)}, judged by their sizes; Ctrl-C keeps the rows that are "
        "there."
    )
    return expected


def _show(rows: list[dict[str, Any]], gpu_memory: float) -> None:
    first = rows[0]
    ways = ", ".join(dict.fromkeys(row["perturb"] for row in rows if row["perturb"]))
    ways += ", ".join(dict.fromkeys(f" by {row['dist']}" for row in rows if row["perturb"]))
    heads = (
        "measured", "arithmetic", "weights", "state", "scratch", "run", "GPUs", "s a step",
    )  # fmt: skip
    lines = []
    for row in rows:
        parts = [row[f"{name}_mb"] for name in ("theory", "weights", "state", "scratch", "run")]
        how = row["source"].split()[0].rstrip(":")
        lines.append(
            (
                row["optimizer"],
                f"{row['rows']}×{row['length']}",
                how if how in ("killed", "failed") else _gib(row["peak_mb"]),
                *(_gib(value) for value in parts),
                str(_gpus(row, gpu_memory)),
                row["step_s"] or "–",
            )
        )
    show.table(
        Console(),
        [show.key("optimizer"), show.Column("tokens", key=True), *map(show.Column, heads)],
        lines,
        title=f"{first['model']}, all weights, {first['dtype']}. Peak memory of a step in GiB",
        caption="inference: two forwards. GPUs: of how many the memory together holds the peak, "
        f"{gpu_memory:g} GiB each; as measured, or by arithmetic where the step was not run. "
        f"Weights perturbed {ways or '–'}.",
    )


def _gib(megabytes: str) -> str:
    return f"{float(megabytes) / 1024:.2f}" if megabytes else "–"


def _gpus(row: dict[str, Any], gpu_memory: float) -> int:
    needed = float(row["peak_mb"] or row["theory_mb"]) / 1024
    return -int(-needed // gpu_memory)

"""``zokernels bench ops``: each pass beside the floor that its bytes set, and beside its peers."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from zokernels.lab.benchmarks import forecast, machine, ops, passes, plots, results
from zokernels.lab.benchmarks.shapes import read as read_shapes
from zokernels.lab.cli import inputs, show
from zokernels.lab.cli.bench import output
from zokernels.lab.errors import InputError


def command(
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick",
            help="Also float16, every instruction set, mask and state, and compiled peers; "
            "three rounds.",
        ),
    ] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be repeated.")
    ] = None,
    numel: Annotated[
        int | None, typer.Option(min=1, help="Weights: 50 million, on a GPU 100 million.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of a round, at most.")] = 15,
    rounds: Annotated[int | None, typer.Option(min=1, help="1, with --full 3.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Fewer repetitions, to take about this long.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also MeZO's expressions and torch.optim.")] = True,
    shapes: Annotated[
        Path | None,
        typer.Option(
            help="On a GPU, also the Triton kernels in groups of these shapes: a CSV with the "
            "columns op, dist, rows and warps."
        ),
    ] = None,
    csv_file: output.CSV = None,
    json: output.JSON = None,
    plot: output.PLOT = None,
) -> int:
    """Time the passes over the weights in alternation with their memory floors and peers."""
    out = output.Output(csv_file, json, plot, ops.COLUMNS, ops.LATER)
    for name in dtype or ():
        inputs.check_choice("--dtype", name, passes.DTYPES)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    on_gpu = device.startswith("cuda")
    if shapes is not None and not on_gpu:
        raise InputError(f"--shapes is for the Triton kernels, but --device is {device}; use cuda.")
    # Each once, in the order of the table.
    chosen = [d for d in passes.DTYPES if d in (dtype or (passes.DTYPES if full else _QUICK))]
    plan = ops.Plan(
        device=device,
        numel=numel or (100_000_000 if on_gpu else 50_000_000),
        dtypes=tuple(chosen),
        full=full,
        peers=peers,
        repeats=repeats,
        rounds=rounds or (3 if full else 1),
        seconds=seconds if seconds is not None else (600 if full else 60),
        shapes=tuple(read_shapes(shapes)) if shapes is not None else (),
    )
    _check_memory(plan)
    try:
        with output.Bar() as bar:
            task = bar.task("Preparing", 1.0)
            found = ops.measure(
                plan,
                lambda what, share: task.show(what, done=share),
                said=lambda seconds: bar.say(
                    f"The repetitions take {forecast.words(seconds)}, by one of each case; Ctrl-C "
                    "keeps those that are there."
                ),
            )
    except passes.Unavailable as error:
        raise InputError(str(error)) from None
    console = Console()
    console.print(
        f"Passes over {plan.numel:,} weights: nanoseconds a weight; multiples of the memory floor "
        "(the same bytes read and written), medians and quartiles; and how many times as fast as "
        "MeZO's expression and as the best peer of the pass.",
        results.caption(found.rows),
        sep="\n",
        highlight=False,
    )
    tables(console, found.rows)
    for note in found.notes:
        show.say(note)
    output.say_tests(found.rows[0]["tests"])
    kept = output.Rows(out, "ops")
    kept.interrupted = found.interrupted
    kept.add(*found.rows)
    return kept.finish(lambda: plots.ops(found.rows))


_QUICK = ("float32", "bfloat16")


def tables(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print a table a type: of each pass its time, as a multiple of the floor, and of the peers."""
    heads = ("ns", "× floor", "× MeZO", "× best")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines = []
        for row in (row for row in rows if row["dtype"] == dtype):
            middle, low, high = (
                _short(row[name]) for name in ("ratio_to_floor_median", "low", "high")
            )
            lines.append(
                (
                    passes.words(row["op"], row["dist"], row["variant"], row["shape"]),
                    row["case"].removeprefix("native-"),
                    row["ns_per_weight"],
                    f"{middle} ({low}–{high})" if row["case"] != passes.FLOOR else "1",
                    _short(row["speedup_over_mezo"]),
                    _short(row["speedup_over_fastest_peer"]),
                )
            )
        columns = [show.key("pass"), show.key("by"), *map(show.Column, heads)]
        show.table(console, columns, lines, title=dtype)


def _short(number: str) -> str:
    return f"{float(number):#.3g}".rstrip(".") if number else ""


def _check_device(device: str) -> None:
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got '{device}'.")
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device is {device}, but torch sees no CUDA device; use cpu.")


def _check_memory(plan: ops.Plan) -> None:
    """Raise if the tensors do not fit: weights twice, what an expression makes, and states."""
    widths = [passes.DTYPES[dtype].itemsize for dtype in plan.dtypes]
    states = 3 if plan.full else 2
    # torch.optim keeps weights, a gradient and states of its own for each rule.
    own = sum(range(2, 3 + states)) + states if plan.peers else 0
    made = 2 if plan.device != "cpu" else 1
    needed = plan.numel * (sum((2 + own) * w for w in widths) + 2 * max(widths) + 4 * states * made)
    free = machine.free_memory(plan.device)
    if free is not None and needed > free:
        raise InputError(
            f"--numel {plan.numel:,} takes up to {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} "
            "GiB are free; choose a smaller one, or one --dtype."
        )

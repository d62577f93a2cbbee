"""``zokernels bench compare``: the passes of another commit beside those of the working tree."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zokernels.lab import files
from zokernels.lab.benchmarks import compare, forecast, machine, ops, passes
from zokernels.lab.cli import inputs, show
from zokernels.lab.cli.bench import output
from zokernels.lab.runs import answers


def command(
    base: Annotated[str, typer.Argument(help="A commit: HEAD, main, a tag or a hash.")],
    runs: Annotated[int, typer.Option(min=1, help="Processes of each side, in turn.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions in a process.")] = 7,
    numel: Annotated[int, typer.Option(min=1, help="Weights in a tensor.")] = 20_000_000,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32 and bfloat16; may be repeated.")
    ] = None,
    json: output.JSON = None,
) -> int:
    """Compare the passes of a commit with the working tree's, on this CPU, in alternation."""
    answers.check(json)
    dtypes = tuple(dict.fromkeys(dtype or ("float32", "bfloat16")))
    for name in dtypes:
        inputs.check_choice("--dtype", name, passes.DTYPES)
    commit = compare.resolve(base)
    plan = ops.Plan(numel=numel, dtypes=dtypes, peers=False, repeats=repeats)
    try:
        with tempfile.TemporaryDirectory(prefix="zokernels-base-") as scratch:
            sides = _measure(commit, Path(scratch), plan, runs)
    except KeyboardInterrupt:
        show.say("Interrupted; the commit's folder is removed, and nothing was compared.")
        return 130
    found = compare.differences(*sides)
    here = machine.commit()
    console = Console()
    table(console, found, f"{base} ({commit[:9]})", here)
    console.print(_sentence(found, runs), highlight=False, soft_wrap=True)
    if json is not None:
        about = machine.about() | {"base": commit, "runs": runs, "numel": numel}
        rows = [asdict(f) | {"key": list(f.key)} for f in found]
        files.write_answer(json, {"environment": about, "compare": rows})
    return 0


def _measure(commit: str, scratch: Path, plan: ops.Plan, runs: int) -> compare.Sides:
    with output.Bar() as bar:
        task = bar.task(f"Building {commit[:9]}", 1 + 2 * runs)
        compare.unpack(commit, scratch)
        task.show("Measuring", done=1)
        expected, began = forecast.Forecast([1.0] * 2 * runs), [time.perf_counter()]

        def done() -> None:
            began.append(time.perf_counter())
            expected.done(began[-1] - began[-2])
            task.advance()
            task.show(left=expected.left)
            if len(began) == 2:
                said = forecast.words(expected.left)
                bar.say(f"{2 * runs} processes, {said} by the time of the first.")

        return compare.alternate(scratch, machine.ROOT, plan, runs, done)


def table(console: Console, found: list[compare.Difference], base: str, here: str) -> None:
    """Print a line a pass."""
    heads = ("base", "here", "here / base")
    rows = []
    for f in found:
        dtype, op, dist, variant, case = f.key
        rows.append(
            (f"{dtype} {passes.words(op, dist, variant)}, {case.removeprefix('native-')}",
             f"{f.base:.3g}", f"{f.here:.3g}", f"{f.ratio:.3f} ({f.low:.3f}–{f.high:.3f})",
             f.verdict)
        )  # fmt: skip
    show.table(
        console,
        [show.key("pass"), *map(show.Column, heads), show.words("")],
        rows,
        title=f"Working tree ({here}) over {base}: above 1 is slower\nThe fastest of a process in "
        "multiples of the memory floor, a floor in ns a weight; medians over processes, of the "
        "ratio quartiles too",
    )


def _sentence(found: list[compare.Difference], runs: int) -> str:
    if runs < compare.FEWEST:
        return f"With fewer than {compare.FEWEST} runs a side, nothing is called a difference."
    said = [
        f"{sum(f.verdict == verdict for f in found)} {verdict}" for verdict in ("slower", "faster")
    ]
    return (
        f"Of {len(found)} passes {' and '.join(said)} beyond the noise: every process of one side "
        f"was slower than every one of the other, by more than {compare.LEAST:.0%}."
    )

"""``zokernels replay``: a fine-tuned model from its base and a log of kilobytes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zokernels.lab import files
from zokernels.lab.cli.finetune import quiet
from zokernels.lab.cli.slow import say_slow
from zokernels.lab.runs import answers


def command(
    base: Annotated[str, typer.Argument(help="Model the run began with, named as there.")],
    run: Annotated[Path, typer.Argument(help="Run folder, or trajectory file.")],
    out: Annotated[Path | None, typer.Option(help="New folder for the model.")] = None,
    until: Annotated[
        int | None,
        typer.Option(help="Steps; without it those of the saved weights, or all."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with the weights that the run saved.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to replay.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Kernels to use; see zokernels env.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write what was done here.")] = None,
) -> None:
    """Make the fine-tuned model, at any of its steps, from the base model and the run's log."""
    # transformers takes seconds to load, and --help needs none of it.
    from zokernels.lab.runs.rebuild import rebuild

    answers.check(json, reads=[path for path in (Path(base), run) if path.exists()])
    quiet()
    say_slow(device, backend)
    found = rebuild(
        base, run, out, until=until, verify=verify, device=device, backend=backend
    )  # fmt: skip
    if json is not None:
        files.write_answer(json, found)
    parts = [
        f"Replayed {found['steps']:,} of {found['recorded_steps']:,} steps "
        f"({found['bytes']:,} bytes) in {found['seconds']:.1f} s"
    ]
    if found["torn_bytes"]:
        parts.append(f"a torn last record of {found['torn_bytes']} bytes was left out")
    if found["verified"]:
        parts.append("the saved weights are the same, bit for bit")
    if out is not None:
        parts.append(f"the model is in {out}")
    Console().print("; ".join(parts) + ".", highlight=False, markup=False, soft_wrap=True)

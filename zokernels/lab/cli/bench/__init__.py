"""``zokernels bench``: how fast it is here, and what the compiler makes of the kernels."""

import typer

from zokernels.lab.cli.bench import all as everything
from zokernels.lab.cli.bench import codegen, compare, memory, ops, step

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.command("ops")(ops.command)
app.command("step")(step.command)
app.command("memory")(memory.command)
app.command("codegen")(codegen.command)
app.command("all")(everything.command)
app.command("compare")(compare.command)

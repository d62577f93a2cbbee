"""``zokernels bench``: how fast it is here, and what the compiler makes of the kernels."""

import typer

from zokernels.cli.bench import codegen, report, step

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.command("codegen")(codegen.command)
app.command("report")(report.command)
app.command("step")(step.command)

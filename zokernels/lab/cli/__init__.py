"""The command line: ``zokernels finetune``, and the commands around it."""

import atexit
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import zokernels as zk
from zokernels.lab.cli import (
    bench,
    env,
    evaluate,
    finetune,
    replay,
    slow,
    sweep,
    tune,
    verify,
)  # fmt: skip
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.runs.processes import is_first, launched

__all__ = ["app", "end", "main"]

# Columns of a terminal.
_TABLES_FROM = 80
_NOTHING = "Interrupted before there was anything to keep."


class _Interrupted(Exception):
    """A Ctrl-C in a command, and what the command says of it."""


class _Commands(TyperGroup):
    """Keeps Ctrl-C from typer, which by its version says "Aborted" or ends without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(str(error) or _NOTHING) from None


app = typer.Typer(
    name="zokernels",
    cls=_Commands,
    help="Fine-tune a language model with forward passes only.",
    no_args_is_help=True,
    add_completion=False,
    # Below it typer's own tables cut the names of options; its plain form wraps.
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= _TABLES_FROM else None,
    pretty_exceptions_enable=False,
)
app.command("tune", cls=tune.Command)(tune.command)
app.command("finetune")(finetune.command)
app.command("evaluate")(evaluate.command)
app.command("predict")(evaluate.predict)
app.command("sweep")(sweep.command)
app.command("replay")(replay.command)
app.command("verify")(verify.command)
app.command("env")(env.command)
app.add_typer(bench.app, name="bench")


def _say_version(asked: bool) -> None:
    if asked:
        print(f"zokernels {zk.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fine-tune a language model with forward passes only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: done. 1: the run failed. 2: what was given cannot be used. 130: interrupted. Whatever goes
    wrong is said in one sentence on stderr.
    """
    try:
        with warnings.catch_warnings():
            # What an optimizer says to a program, a command says in its own words.
            warnings.filterwarnings("ignore", slow.OF_AN_OPTIMIZER, UserWarning)
            result = app(args=argv, prog_name="zokernels", standalone_mode=False)
    except InputError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except _Interrupted as error:
        return _fail(str(error), 130)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_NOTHING, 130)
    except Exception as error:
        # Usage errors come from typer's or click's own parser, by its version; both have these.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _fail(message(), 2) if message() else 2
    return result if isinstance(result, int) else 0


def end() -> NoReturn:
    """Runs the command of the shell, and ends the process with its exit code."""
    code = main()
    if launched() > 1:
        # Torch keeps a group of processes that a mesh or a default argument names, and the threads
        # of one may abort the interpreter as it ends, whereupon torchrun ends the other processes.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(sentence: str, code: int) -> int:
    # Of several processes each would say the same.
    if is_first():
        print(f"zokernels: {' '.join(sentence.split())}", file=sys.stderr)
    return code

"""``zokernels bench all``: every benchmark with settings for this machine, into one folder."""

import json as json_module
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from zokernels.lab import files
from zokernels.lab.benchmarks import machine, suite
from zokernels.lab.cli import inputs, show
from zokernels.lab.cli.bench import output
from zokernels.lab.errors import InputError
from zokernels.lab.runs import answers

SUMMARY = "summary.json"
# Seconds that an interrupted command may take to write its rows.
_PATIENCE = 30.0


def command(
    out: Annotated[Path, typer.Option(help="A new or empty folder for rows and pictures.")],
    full: Annotated[bool, typer.Option("--full/--quick", help="Minutes, or half an hour.")] = False,
    json: output.JSON = None,
) -> int:
    """Run ops, step, memory and codegen one after the other; 1 if one of them failed."""
    answers.check(json)
    _check_folder(out)
    runs = suite.runs(full)
    total, most = sum(r.minutes for r in runs), sum(r.limit for r in runs) / 60
    show.say(
        f"{', '.join(r.name for r in runs)}: about {total:.0f} minutes on two cores, at most "
        f"{most:.0f}, into {out}. Let nothing else run."
    )
    output.say_tests()
    if how := inputs.lacks("matplotlib"):
        show.say(f"No pictures: they need matplotlib, {how}.")
    out.mkdir(parents=True, exist_ok=True)
    about = machine.about("cuda" if torch.cuda.is_available() else "cpu")
    results: list[dict[str, Any]] = []
    code = 0
    try:
        for run in runs:
            results.append(_run(run, out))
    except KeyboardInterrupt:
        show.say("Interrupted; what was done before is kept.")
        code = 130
    found = {"environment": about, "runs": results}
    files.write_answer(out / SUMMARY, found)
    if json is not None:
        files.write_answer(json, found)
    _show(results, out)
    failed = any(r["outcome"] in ("failed", "stopped") for r in results)
    return code or int(failed)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a new folder.")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty; name a new folder.")


def _run(run: suite.Run, out: Path) -> dict[str, Any]:
    """One command in a process of its own, so that none finds the memory of another."""
    result: dict[str, Any] = {"name": run.name, "outcome": "left out", "seconds": 0.0}
    if run.needs and (how := inputs.lacks(run.needs)):
        return result | {"why": f"it needs {run.needs}: {how}"}
    files = {"--csv": f"{run.command}.csv", "--json": f"{run.name}.json"}
    if not inputs.lacks("matplotlib"):
        files["--plot"] = f"{run.name}.png"
    named = [part for option, name in files.items() for part in (option, str(out / name))]
    program = [sys.executable, "-m", "zokernels.lab.cli", "bench"]
    command = [*program, run.command, *run.options, *named]
    Console(stderr=True).rule(f"bench {run.command} {' '.join(run.options)}")
    started = time.perf_counter()
    try:
        code = _process(command, run.limit, machine.environment())
    except subprocess.TimeoutExpired:
        return result | {"outcome": "stopped", "why": f"it took more than {run.limit:.0f} s"}
    result["seconds"] = round(time.perf_counter() - started, 1)
    if code:
        return result | {"outcome": "failed", "why": f"exit code {code}; what it said is above"}
    rows = json_module.loads((out / files["--json"]).read_text(encoding="utf-8"))[run.command]
    return result | {
        "outcome": "done",
        "files": list(files.values()),
        "lines": suite.headline(run.command, rows),
    }


def _process(command: list[str], limit: float, environment: dict[str, str]) -> int:
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait(limit)
        except KeyboardInterrupt:
            # It reached that process too, which writes down what it has.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            raise
        finally:
            process.kill()


def _show(results: list[dict[str, Any]], out: Path) -> None:
    rows = []
    for result in results:
        said = result.get("lines") or [f"{result['outcome']}: {result['why']}"]
        rows.append((f"{result['name']}\n{result['seconds']:.0f} s", "\n".join(said)))
    columns = [show.key("run"), show.words("outcome")]
    show.table(Console(), columns, rows, title=f"Summary; all of it is in {out}", lines=True)

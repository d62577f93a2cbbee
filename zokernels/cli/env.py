"""``zokernels env``: what is installed, and which backends this machine has."""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import zokernels as zk
from zokernels.tasks import folder, report


def command(
    json: Annotated[Path | None, typer.Option(help="Also write it to this file.")] = None,
) -> None:
    """Show versions, the processor, and the backends with the reason for each that is missing."""
    folder.check_json(json)
    found = collect()
    if json is not None:
        folder.write_answer(json, found)
    console = Console()
    machine = Table("what", "value", title="Environment", title_justify="left")
    for name, value in found["versions"].items():
        machine.add_row(name, value or "not installed")
    for name in ("processor", "cores", "threads", "gpu"):
        machine.add_row(name, str(found[name]))
    console.print(machine)
    backends = Table("backend", "available", "what it is, or why not", title_justify="left")
    for name, state in found["backends"].items():
        backends.add_row(name, "yes" if state["available"] else "no", state["reason"])
    console.print(backends)


def collect() -> dict[str, Any]:
    """The environment as plain values."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "versions": report.versions(),
        "processor": report.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "backends": {
            name: {"available": bool(state.available), "reason": str(state.reason)}
            for name, state in zk.backends().items()
        },
    }

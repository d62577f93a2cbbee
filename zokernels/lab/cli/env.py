"""``zokernels env``: what is installed, and which backends this machine has."""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import zokernels as zk
from zokernels.lab import files
from zokernels.lab.cli import show
from zokernels.lab.runs import answers, report

_PACKAGES = ("accelerate", "datasets", "safetensors", "tokenizers", "trl", "matplotlib")
# What changes speed or which code runs; no variable that names a place of the user's.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CXX", "GOMP_SPINCOUNT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
    "TRITON_INTERPRET", "ZOKERNELS_CXXFLAGS", "ZOKERNELS_ISA",
)  # fmt: skip


def command(
    json: Annotated[Path | None, typer.Option(help="Also write it to this file.")] = None,
) -> None:
    """Show what a bug report needs: versions, the machine, and each backend, or why not."""
    answers.check(json)
    found = collect()
    if json is not None:
        files.write_answer(json, found)
    console = Console()
    machine = [(name, value or "not installed") for name, value in found["versions"].items()]
    machine += [
        (name.replace("_", " "), _shown(value))
        for name, value in found.items()
        if name not in ("versions", "backends")
    ]
    show.table(console, [show.key("what"), show.words("value")], machine, title="Environment")
    backends = [
        (name, "yes" if state["available"] else "no", state["reason"])
        for name, state in found["backends"].items()
    ]
    heads = ("available", "what it is, or why not")
    show.table(console, [show.key("backend"), *map(show.words, heads)], backends)


def collect() -> dict[str, Any]:
    """The environment as plain values."""
    native = zk.backends()["native"]
    return {
        # Torch's own word has the kind of build too, +cpu or +cu130.
        "versions": {
            **report.versions(),
            "torch": torch.__version__,
            **report.versions(_PACKAGES),
        },
        "commit": _commit(),
        "system": platform.platform(),
        "processor": report.processor(),
        "instruction_sets": list(native.instruction_sets),
        "native_built_with": native.built_with,
        "compiler": _compiler(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "cuda": torch.version.cuda,
        "gpu": _gpus(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "backends": {
            name: {"available": bool(state.available), "reason": str(state.reason)}
            for name, state in zk.backends().items()
        },
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def _commit() -> str | None:
    """The commit and whether it was changed, where the package is a checkout's own."""
    root = Path(zk.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    head = _line_of(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    changed = _line_of(["git", "-C", str(root), "status", "--porcelain", "--", "zokernels", "csrc"])
    return f"{head}, changed" if head and changed else head


def _compiler() -> str | None:
    """What an install would compile with now."""
    return _line_of([*shlex.split(os.environ.get("CXX", "c++")), "--version"])


def _memory() -> str | None:
    if not hasattr(os, "sysconf"):
        return None
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"


def _gpus() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        found.append(
            f"{about.name} (sm_{about.major}{about.minor}, {about.total_memory / 2**30:.1f} GiB)"
        )
    return found


def _line_of(command: list[str]) -> str | None:
    """The first line that a program prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)

"""Where a number was measured: the columns that every row of a benchmark begins with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import zokernels as zk
from zokernels.lab.benchmarks import tested

ROOT = tested.ROOT
COLUMNS = ("date", "commit", "machine", "threads", "python", "torch", "tests")
# Columns that rows of earlier versions lack; there they are read as empty.
LATER = ("tests",)
# What the numbers depend on; a change of these since the commit makes it "-dirty".
MEASURED = ("zokernels", "csrc", "setup.py", "bench/*.py")


def about(device: str = "cpu") -> dict[str, object]:
    """The values of `COLUMNS` on this machine, now."""
    on_gpu = device.startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": torch.cuda.get_device_name(device) if on_gpu else cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tests": tested.outcome(),
    }


def commit() -> str:
    """The short commit, with "-dirty" if what is measured differs from it.

    An installed package knows none, even inside another repository's folder: "unknown". A checkout
    that was copied without its history, or with an older one, is told by ZOKERNELS_COMMIT.
    """
    if not tested.is_checkout():
        return "unknown"
    if told := os.environ.get("ZOKERNELS_COMMIT"):
        return told
    try:
        head = _git("rev-parse", "--short", "HEAD").strip()
        dirty = _git("status", "--porcelain", "--", *MEASURED).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    sources = [*(ROOT / "csrc").iterdir(), ROOT / "setup.py"]
    library = zk.backends()["native"].library
    built = library.stat().st_mtime if library else float("inf")
    if max(s.stat().st_mtime for s in sources) > built:
        print("The native library is older than its sources; build it again.", file=sys.stderr)
        dirty = "stale build"
    return head + ("-dirty" if dirty else "")


def cpu() -> str:
    """The CPU's model and how many cores there are."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in info.read_text().splitlines())
        )
        model = fields.get("model name", model)
        # A virtual machine may hide the model's name, but the number tells the generation.
        if "cpu family" in fields and "model" in fields:
            model += f" (family {fields['cpu family']} model {fields['model']})"
    return f"{model}, {os.cpu_count()} cores"


def gcc() -> str:
    """The gcc that compiled the native library, as written in the library itself."""
    native = zk.backends()["native"]
    if native.library is None:
        return ""
    found = re.search(r"GCC: \([^)]*\) ([\w.]+)", native.built_with or "")
    return found[1] if found else "unknown"


def environment() -> dict[str, str]:
    """The variables for a process that is to import this very package, wherever it starts."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def triton() -> str:
    """The version of triton, or "" without it."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that a process can still have; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

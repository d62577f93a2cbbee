"""The most memory held at a time: of the process on a CPU, of the allocator on CUDA."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_reset(device: str) -> bool:
    """Whether the mark can be set back, so that a part of a process can be measured."""
    return device.startswith("cuda") or _CLEAR.exists()


def reset(device: str) -> None:
    """Set the mark back to what is held now, where that can be done."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif can_reset(device):
        # 5 does it (proc(5)).
        _CLEAR.write_text("5")


def mark(device: str) -> int:
    """Bytes at the peak since the last `reset`."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _of("VmHWM")


def held(device: str) -> int:
    """Bytes held now."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else _of("VmRSS")


def _of(field: str) -> int:
    if not _STATUS.exists():
        # Elsewhere the high-water mark since the process began is all there is.
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024

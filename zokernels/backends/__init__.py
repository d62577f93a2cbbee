"""Who can run a pass: what is there, and for what isn't, why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from zokernels.backends import native, reference

NAMES = ("reference", "native")


@dataclass(frozen=True)
class Backend:
    """One backend: whether it can be used here, and a sentence that says what or why not."""

    name: str
    available: bool
    reason: str


def backends() -> dict[str, Backend]:
    """Every backend by name, with the reason for one that is not available."""
    missing = native.why_missing()
    if missing is None:
        sets = ", ".join(native.instruction_sets())
        described = Backend("native", True, f"C++ for CPU tensors; instruction sets here: {sets}.")
    else:
        described = Backend("native", False, missing)
    plain = Backend("reference", True, "Plain PyTorch on any device: the specification, slow.")
    return {"reference": plain, "native": described}


def select(params: Sequence[torch.Tensor], name: str | None) -> ModuleType:
    """The module that runs a pass over these tensors.

    Args:
        params: The tensors of the call, all of one device.
        name: A backend's name, or None for the best one for the device.

    Raises:
        ValueError: If the name is unknown, or the backend cannot take these tensors.
        RuntimeError: If the backend named is not available.
    """
    if name not in (None, *NAMES):
        raise ValueError(f"backend is {name!r}, but it must be None or one of {', '.join(NAMES)}.")
    if name == "reference" or not params:
        return reference
    refusal = _why_not_native(params)
    if refusal is None:
        missing = native.why_missing()
        if missing is None:
            return native
        if name == "native":
            raise RuntimeError(f"backend='native' was asked for, but {missing}")
    elif name == "native":
        raise ValueError(f"backend='native' was asked for, but {refusal}")
    return reference


def _why_not_native(params: Sequence[torch.Tensor]) -> str | None:
    if params[0].device.type != "cpu":
        return f"it runs on CPU tensors and these are on {params[0].device}; use backend=None."
    if any(p.dtype is torch.float64 for p in params):
        return "it has no float64; use backend=None or 'reference'."
    return None

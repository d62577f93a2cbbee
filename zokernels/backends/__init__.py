"""Who can run a pass: what is there, and for what isn't, why not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from zokernels.backends import native, reference

NAMES = ("reference", "native", "triton")

# Older ones flush subnormals in division and square root.
_OLDEST_TRITON = (3, 6)
# Older ones' interpreter takes an array of one number for that number, which this NumPy refuses.
_INTERPRETER, _NUMPY = (3, 7), (2, 4)


@dataclass(frozen=True)
class Backend:
    """One backend: whether it can be used here, and a sentence that says what or why not.

    Attributes:
        name: As the ops take it.
        available: Whether it can run a pass here.
        reason: What it is, or why it can't.
        instruction_sets: Of "native" those of this CPU and build, slowest first; the environment's
            ``ZOKERNELS_ISA`` names the one to use.
        library: Of "native" the file, if it was built.
        built_with: The compiler that made it.
    """

    name: str
    available: bool
    reason: str
    instruction_sets: tuple[str, ...] = ()
    library: Path | None = None
    built_with: str | None = None


def backends() -> dict[str, Backend]:
    """Every backend by name, with the reason for one that is not available."""
    missing = native.why_missing()
    library = native.LIBRARY if native.LIBRARY.exists() else None
    sets = native.instruction_sets() if missing is None else ()
    what = missing or f"C++ for CPU tensors; instruction sets here: {', '.join(sets)}."
    described = Backend("native", missing is None, what, sets, library, native.built_with())
    plain = Backend("reference", True, "Plain PyTorch on any device: the specification, slow.")
    no_triton = _why_no_triton() or _why_no_device()
    kernels = Backend("triton", no_triton is None, no_triton or _what_triton_is())
    return {"reference": plain, "native": described, "triton": kernels}


def select(params: Sequence[torch.Tensor], name: str | None, kind: int) -> ModuleType:
    """The module that runs a pass over these tensors.

    Args:
        params: The tensors of the call, all of one device.
        name: A backend's name, or None for the best one for the device.
        kind: The distribution's number, of `zokernels.noise.KINDS`.

    Raises:
        ValueError: If the name is unknown, or the backend cannot take these tensors.
        RuntimeError: If the backend named is not available.
    """
    if name not in (None, *NAMES):
        raise ValueError(f"backend is {name!r}, but it must be None or one of {', '.join(NAMES)}.")
    if name == "reference" or not params:
        return reference
    # Without a name triton is not even imported for tensors that native or the reference takes.
    if (name or ("triton" if params[0].device.type == "cuda" else "native")) == "native":
        missing, refusal, module = native.why_missing(), _why_not_native(params), lambda: native
    else:
        missing, module = _why_no_triton(), _triton
        refusal = None if missing else _why_not_triton(params, name)
    if missing is None and refusal is None and kind not in module().KINDS:
        refusal = "it does not draw this distribution; use backend=None or 'reference'."
    if missing is None and refusal is None:
        return module()
    if name is None:
        return reference
    if missing is not None:
        raise RuntimeError(f"backend={name!r} was asked for, but {missing}")
    raise ValueError(f"backend={name!r} was asked for, but {refusal}")


def of_products(dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """The backend whose `shift` perturbs products, whoever draws; None where torch has to.

    A forward's sums are then the same beside every backend.
    """
    if dtype is torch.float64 or why_missing(device) is not None:
        return None
    if device.type == "cuda":
        return None if _triton().INTERPRETED else _triton()
    return native if device.type == "cpu" else None


def why_missing(device: torch.device) -> str | None:
    """Why the kernels for a device are not there, so that its tensors go to the reference.

    None if they are, or if there are none for such a device.
    """
    if device.type == "cuda":
        return _why_no_triton()
    return native.why_missing() if device.type == "cpu" else None


def _why_not_native(params: Sequence[torch.Tensor]) -> str | None:
    if params[0].device.type != "cpu":
        return f"it runs on CPU tensors and these are on {params[0].device}; use backend=None."
    return _why_not_narrow(params)


def _why_not_triton(params: Sequence[torch.Tensor], name: str | None) -> str | None:
    kind, interpreted = params[0].device.type, _triton().INTERPRETED
    if kind != "cuda" and not (kind == "cpu" and interpreted):
        return (
            f"it runs on CUDA tensors and these are on {params[0].device}; use backend=None, or "
            "set TRITON_INTERPRET=1 before the program starts to run it in Triton's interpreter."
        )
    # Interpreted it is exact and slow, so it must be asked for by name.
    if kind == "cuda" and interpreted and name is None:
        return "TRITON_INTERPRET is set."
    return _why_not_narrow(params)


def _why_not_narrow(params: Sequence[torch.Tensor]) -> str | None:
    if any(p.dtype is torch.float64 for p in params):
        return "it has no float64; use backend=None or 'reference'."
    return None


@functools.cache
def _why_no_triton() -> str | None:
    """None if triton can be imported, else one sentence that says why not."""
    try:
        import triton
    except ImportError as error:
        return f"the triton backend is missing: {error}; pip install triton (Linux)."
    if _version(triton) < _OLDEST_TRITON:
        wanted = ".".join(map(str, _OLDEST_TRITON))
        return (
            f"the triton backend needs triton {wanted} or newer, and {triton.__version__} is "
            "installed, whose division flushes subnormals; pip install -U triton."
        )
    return why_not_interpreted() if _triton().INTERPRETED else None


def why_not_interpreted() -> str | None:
    """None if triton, which must be there, can interpret kernels, else one sentence."""
    import numpy
    import triton

    if _version(triton) >= _INTERPRETER or _version(numpy) < _NUMPY:
        return None
    return (
        f"triton {triton.__version__} can't interpret kernels beside numpy {numpy.__version__}; "
        "pip install 'numpy<2.4', or triton 3.7 or newer."
    )


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(x) for x in module.__version__.split("+")[0].split(".")[:2])


def _why_no_device() -> str | None:
    if torch.cuda.is_available() or _triton().INTERPRETED:
        return None
    taken = "the native backend"
    if native.why_missing() is not None:
        taken = "the reference, since the native backend is missing"
    return f"triton is installed, but torch sees no CUDA device; CPU tensors take {taken}."


def _what_triton_is() -> str:
    import triton

    where = "for CPU tensors, in its interpreter" if _triton().INTERPRETED else "for CUDA tensors"
    return f"Triton {triton.__version__} kernels {where}."


def _triton() -> ModuleType:
    # Imported when asked for: `import zokernels` then does not import triton.
    from zokernels.backends import triton

    return triton

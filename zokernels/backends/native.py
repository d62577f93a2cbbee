"""The passes in C++: one call for a whole list of CPU tensors, through a plain C interface."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zokernels.backends.plan import AddNoise, ApplyUpdate, Pass
from zokernels.masks import BitsOf, MagnitudeOf, MaskOf, RandomOf

LIBRARY = Path(__file__).with_name("_native.so")
BUILD_ERROR = Path(__file__).with_name("_build_error.txt")

# Slowest to fastest; the values are those of csrc/zokernels.h.
_ISAS = {"portable": 0, "avx2": 1, "avx512": 2}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ADD_NOISE = 0
_RULES = {"sign": 1, "momentum": 2, "adam": 3}
_KEEP_ALL, _KEEP_RANDOM, _KEEP_MAGNITUDE, _KEEP_BITS = range(4)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("in_", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("states", ctypes.c_void_p * 3),
        ("numel", ctypes.c_int64),
        ("offset", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("state_dtypes", ctypes.c_int32 * 3),
        ("keep", ctypes.c_int32),
        ("keep_below", ctypes.c_uint32),
        ("keep_seed", ctypes.c_uint64),
        ("bits", ctypes.c_void_p),
        ("keep_threshold", ctypes.c_float),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        ("tensors", ctypes.POINTER(_Tensor)),
        ("tensor_count", ctypes.c_int64),
        ("seeds", ctypes.POINTER(ctypes.c_uint64)),
        ("coeffs", ctypes.POINTER(ctypes.c_float)),
        ("seed_count", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("decays", ctypes.POINTER(ctypes.c_float)),
        ("rounding_seeds", ctypes.POINTER(ctypes.c_uint64)),
        ("rates", ctypes.POINTER(ctypes.c_float)),
        ("scales", ctypes.POINTER(ctypes.c_float)),
        ("rule", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("amsgrad", ctypes.c_int32),
        ("beta1", ctypes.c_float),
        ("one_minus_beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("one_minus_beta2", ctypes.c_float),
        ("adam_eps", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def add_noise(plan: AddNoise) -> None:
    """Run the pass on ``torch.get_num_threads()`` threads."""
    _run(plan, plan.out, [()] * len(plan.params), rule=_ADD_NOISE)


def apply_update(plan: ApplyUpdate) -> None:
    """Run the pass on ``torch.get_num_threads()`` threads."""
    names = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "adam_eps", "amsgrad")
    _run(
        plan, plan.params, plan.states, rule=_RULES[plan.rule], rates=_floats(plan.rates),
        scales=_floats(plan.scales), **{name: getattr(plan, name) for name in names},
    )  # fmt: skip


def _run(
    plan: Pass,
    targets: Sequence[torch.Tensor],
    states: Sequence[Sequence[torch.Tensor]],
    **of_rule: Any,
) -> None:
    library = _library()
    tensors = (_Tensor * len(plan.params))()
    for i, (p, out, mine) in enumerate(zip(plan.params, targets, states, strict=True)):
        tensors[i] = _Tensor(
            p.data_ptr(), out.data_ptr(), tuple(s.data_ptr() for s in mine), p.numel(),
            plan.offsets[i], plan.streams[i], _DTYPES[p.dtype],
            tuple(_DTYPES[s.dtype] for s in mine), *_keep(plan.masks[i]),
        )  # fmt: skip
    args = _Pass(
        tensors=tensors,
        tensor_count=len(plan.params),
        seeds=(ctypes.c_uint64 * len(plan.seeds))(*plan.seeds),
        coeffs=_floats(plan.coeffs),
        seed_count=len(plan.seeds),
        queries=plan.queries,
        decays=_floats(plan.decays),
        rounding_seeds=(ctypes.c_uint64 * plan.steps)(*plan.rounding_seeds),
        kind=plan.kind,
        stochastic=plan.stochastic,
        threads=torch.get_num_threads(),
        **of_rule,
    )
    isa = instruction_set()
    if library.zk_run(ctypes.byref(args), _ISAS[isa]) != 0:
        raise RuntimeError(f"The native backend has no {isa} code in this build.")


def _floats(values: Sequence[float]) -> Any:
    return (ctypes.c_float * len(values))(*values)


def instruction_sets() -> list[str]:
    """The instruction sets of this CPU and build, slowest first."""
    return [name for name, number in _ISAS.items() if _library().zk_has_isa(number)]


def instruction_set() -> str:
    """The one that is used: the fastest, or what ``ZOKERNELS_ISA`` names.

    Raises:
        RuntimeError: If ``ZOKERNELS_ISA`` names one that is not here.
    """
    wanted = os.environ.get("ZOKERNELS_ISA")
    here = instruction_sets()
    if not wanted:
        return here[-1]
    if wanted not in here:
        raise RuntimeError(f"ZOKERNELS_ISA is {wanted!r}, but this CPU and build have {here}.")
    return wanted


def why_missing() -> str | None:
    """None if the backend can be used, else one sentence that says why not."""
    if not LIBRARY.exists():
        cause = "it was not built"
        if BUILD_ERROR.exists():
            cause = BUILD_ERROR.read_text(encoding="utf-8").strip().rstrip(".")
        return f"the native backend is missing: {cause}. Install a C++ compiler and reinstall."
    try:
        _library()
    except OSError as error:
        return f"the native backend does not load: {error}."
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    # Loaded after torch, it shares torch's own thread pool (the same libgomp).
    library = ctypes.CDLL(str(LIBRARY))
    library.zk_run.argtypes = [ctypes.POINTER(_Pass), ctypes.c_int]
    library.zk_has_isa.argtypes = [ctypes.c_int]
    return library


def _keep(mask: MaskOf) -> tuple[int, int, int, int | None, float]:
    """(keep, keep_below, keep_seed, bits, keep_threshold) of `_Tensor`."""
    match mask:
        case RandomOf(below, seed):
            return _KEEP_RANDOM, below, seed, None, 0.0
        case MagnitudeOf(threshold):
            return _KEEP_MAGNITUDE, 0, 0, None, threshold
        case BitsOf(packed):
            return _KEEP_BITS, 0, 0, packed.data_ptr(), 0.0
        case _:
            return _KEEP_ALL, 0, 0, None, 0.0

"""The passes in C++: one call for a whole list of CPU tensors, through a plain C interface."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zokernels import noise
from zokernels.backends.plan import AddNoise, ApplyUpdate, Pass, Shift
from zokernels.masks import BitsOf, MagnitudeOf, MaskOf, RandomOf

# The distributions that it draws.
KINDS = (noise.GAUSSIAN, noise.RADEMACHER, noise.RANK1)
LIBRARY = Path(__file__).with_name("_native.so")
BUILD_ERROR = Path(__file__).with_name("_build_error.txt")

# Of each processor slowest to fastest; the values are those of csrc/zokernels.h.
_ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ADD_NOISE = 0
_RULES = {"sign": 1, "momentum": 2, "adam": 3}
_KEEP_ALL, _KEEP_RANDOM, _KEEP_MAGNITUDE, _KEEP_BITS = range(4)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("in_", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("mirror", ctypes.c_void_p),
        ("states", ctypes.c_void_p * 3),
        ("numel", ctypes.c_int64),
        ("columns", ctypes.c_int64),
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
    # Whose memory the addresses are: an address keeps nothing alive, nor does a caller's local that
    # is not used again, where something rewrites the caller's code.
    owners: tuple[Any, ...] = ()


class _Shift(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "taken", "given", "bias", "scales", "y")),
        *((name, ctypes.c_int64) for name in ("lanes", "rows", "in_", "out")),
        *((name, ctypes.c_int64) for name in ("signs_step", "bias_step")),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]
    owners: tuple[Any, ...] = ()  # see `_Pass`


def add_noise(plan: AddNoise) -> None:
    """Run the pass on ``torch.get_num_threads()`` threads."""
    _run(arguments(plan))


def apply_update(plan: ApplyUpdate) -> None:
    """Run the pass on ``torch.get_num_threads()`` threads."""
    _run(arguments(plan))


def shift(plan: Shift) -> None:
    """Run the shift on ``torch.get_num_threads()`` threads; sums depend on the instruction set."""
    _ran(_library().zk_run_shift, shift_arguments(plan))


def arguments(plan: AddNoise | ApplyUpdate) -> _Pass:
    """What the library gets of a pass."""
    if isinstance(plan, AddNoise):
        return _arguments(plan, _tensors(plan, plan.out), rule=_ADD_NOISE)
    names = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "adam_eps", "amsgrad")
    tensors = _tensors(plan, plan.params)
    for tensor, mine in zip(tensors, plan.states, strict=True):
        tensor.states = tuple(s.data_ptr() for s in mine)
        tensor.state_dtypes = tuple(_DTYPES[s.dtype] for s in mine)
    return _arguments(
        plan, tensors, rule=_RULES[plan.rule], rates=_floats(plan.rates),
        scales=_floats(plan.scales), **{name: getattr(plan, name) for name in names},
    )  # fmt: skip


def shift_arguments(plan: Shift) -> _Shift:
    """What the library gets of a shift."""
    x, bias, scales = plan.x, plan.bias, plan.scales.contiguous()
    args = _Shift(
        x.data_ptr(), plan.taken.data_ptr(), plan.given.data_ptr(),
        None if bias is None else bias.data_ptr(), scales.data_ptr(), plan.y.data_ptr(),
        *x.shape, plan.given.shape[1], plan.taken.stride(0), plan.bias_step,
        _DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    args.owners = (plan, scales)
    return args


class Prepared:
    """An ``add_noise`` pass that runs again and again: only numbers and places change.

    Args:
        plan: The pass, of one step, with neither mask nor stochastic rounding. Its tensors stay
            where they are in memory for as long as this is used.
        mirrors: Where decay · w − Σ cₖ zₖ goes, one a tensor; or None.
    """

    def __init__(self, plan: AddNoise, mirrors: Sequence[torch.Tensor] | None = None):
        self.plan = plan
        self._tensors = _tensors(plan, plan.out)
        if mirrors is not None:
            for tensor, mirror in zip(self._tensors, mirrors, strict=True):
                tensor.mirror = mirror.data_ptr()
        self._args = _arguments(plan, self._tensors, rule=_ADD_NOISE)
        self._args.owners += (mirrors,)
        self._size = plan.params[0].element_size()
        self._start = plan.params[0].data_ptr()

    def run(self, seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        """The whole pass."""
        self._set(seeds, coeffs)
        _run(self._args)

    def run_range(
        self, seeds: Sequence[int], coeffs: Sequence[float], begin: int, end: int
    ) -> None:
        """Elements ``begin`` … ``end`` − 1 of the only tensor, to the start of its ``out``."""
        self._set(seeds, coeffs)
        tensor = self._tensors[0]
        tensor.in_ = self._start + begin * self._size
        tensor.offset = self.plan.offsets[0] + begin
        tensor.numel = end - begin
        _run(self._args)

    def run_rows(self, seeds: Sequence[int], coeffs: Sequence[float], rows: torch.Tensor) -> None:
        """The given rows of the only tensor, a matrix, one after the other to its ``out``.

        Args:
            seeds: As of the plan.
            coeffs: As of the plan.
            rows: Their numbers, a one-dimensional int64 tensor, all in range.
        """
        self._set(seeds, coeffs)
        count, width = len(rows), self.plan.params[0].shape[1]
        template = _Tensor.from_buffer_copy(self._tensors[0])
        template.numel = width
        table = torch.frombuffer(bytearray(template), dtype=torch.int64).repeat(count, 1)
        places = torch.arange(count) * (width * self._size)
        for name, steps in (
            ("in_", rows * (width * self._size)), ("offset", rows * width),
            ("out", places), ("mirror", places if template.mirror else None),
        ):  # fmt: skip
            if steps is not None:
                table[:, getattr(_Tensor, name).offset // 8] += steps
        owners = self._args.owners
        self._args.owners = (*owners, table)
        self._args.tensors = ctypes.cast(table.data_ptr(), ctypes.POINTER(_Tensor))
        self._args.tensor_count = count
        _run(self._args)
        self._args.tensors = self._tensors
        self._args.tensor_count = 1
        self._args.owners = owners

    def _set(self, seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        for k, (seed, coeff) in enumerate(zip(seeds, coeffs, strict=True)):
            self._args.seeds[k] = seed
            self._args.coeffs[k] = coeff
        self._args.threads = torch.get_num_threads()


def _tensors(plan: Pass, targets: Sequence[torch.Tensor]) -> Any:
    tensors = (_Tensor * len(plan.params))()
    for i, (p, out) in enumerate(zip(plan.params, targets, strict=True)):
        tensor = tensors[i]
        tensor.in_, tensor.out, tensor.numel = p.data_ptr(), out.data_ptr(), p.numel()
        tensor.columns, tensor.offset = plan.columns[i], plan.offsets[i]
        tensor.stream = plan.streams[i]
        tensor.dtype = _DTYPES[p.dtype]
        (
            tensor.keep, tensor.keep_below, tensor.keep_seed, tensor.bits, tensor.keep_threshold,
        ) = _keep(plan.masks[i])  # fmt: skip
    return tensors


def _arguments(plan: Pass, tensors: Any, **of_rule: Any) -> _Pass:
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
    args.owners = (plan,)
    return args


def _run(args: _Pass) -> None:
    _ran(_library().zk_run, args)


def _ran(function: Any, args: ctypes.Structure) -> None:
    isa = instruction_set()
    if function(ctypes.byref(args), _ISAS[isa]) != 0:
        raise RuntimeError(f"The native backend has no {isa} code in this build.")


def _floats(values: Sequence[float]) -> Any:
    return (ctypes.c_float * len(values))(*values)


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this CPU and build, slowest first."""
    return tuple(name for name, number in _ISAS.items() if _library().zk_has_isa(number))


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
        raise RuntimeError(
            f"ZOKERNELS_ISA is {wanted!r}, but this CPU and build have {', '.join(here)}."
        )
    return wanted


def built_with() -> str | None:
    """The compiler that made the library, by the mark that gcc and clang leave in it."""
    if not LIBRARY.exists():
        return None
    mark = re.search(rb"GCC: \([^\0]*|[\w ]*clang version [^\0]*", LIBRARY.read_bytes())
    return mark[0].decode("ascii", "replace") if mark else None


def why_missing() -> str | None:
    """None if the backend can be used, else one sentence that says why not."""
    if not LIBRARY.exists():
        cause = "it was not built. Install a C++ compiler and reinstall."
        if BUILD_ERROR.exists():
            cause = BUILD_ERROR.read_text(encoding="utf-8").strip()
        return f"the native backend is missing: {cause}"
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
    library.zk_run_shift.argtypes = [ctypes.POINTER(_Shift), ctypes.c_int]
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

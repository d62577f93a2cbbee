"""The passes over the weights: each op's contract, its checks, and who runs it.

Every backend gives the same bits; `zokernels.backends.reference` is the specification.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from zokernels import masks, noise
from zokernels.backends import select
from zokernels.backends.plan import AddNoise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

__all__ = ["add_noise", "add_noise_"]


def add_noise_(
    params: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    *,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    dist: str = "gaussian",
    mask: masks.Mask | None = None,
    decay: float | Sequence[float] = 1.0,
    rounding: str = "nearest",
    rounding_seed: int | Sequence[int] = 0,
    each_step: bool = False,
    backend: str | None = None,
) -> None:
    """Add noise to the weights in place: w ← decay · w + Σₖ cₖ zₖ, rounded once.

    For each element, in binary32: ``acc = decay · w``, then ``acc = fma(cₖ, zₖ, acc)`` for k in
    order, then one rounding to the tensor's type. A call with decay 1 and all coefficients 0
    writes nothing. Tensors of float64 are computed in binary64 (multiply, then add) by the
    reference.

    Args:
        params: Contiguous tensors of one device, float32, bfloat16, float16 or float64, that do
            not overlap.
        seeds: K ≥ 1 seeds of directions, 0 … 2⁶⁴ − 1.
        coeffs: K finite coefficients, rounded once to binary32.
        streams: The number of each tensor's noise stream; by default its position in ``params``.
        offsets: Where each tensor starts in its whole, row-major parameter; by default 0. A shard
            gets the noise of its part.
        dist: ``"gaussian"`` or ``"rademacher"``.
        mask: One of `zokernels.masks`; elements outside it stay as they are.
        decay: Factor on the weight before the noise; with ``each_step`` one for all or one a seed.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"`` (16-bit types only).
        rounding_seed: Seed of stochastic rounding; with ``each_step`` one for all or one a seed.
        each_step: Apply decay, mask and rounding for every seed in turn, as K calls would: the
            replay of K steps in one pass over memory.
        backend: ``None`` (the best for the device), ``"reference"`` or ``"native"``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the tensors do not fit; nothing is written.
        RuntimeError: If the backend named is not there.
    """
    plan = _plan(
        params, params, seeds, coeffs, streams, offsets, dist, mask, decay, rounding,
        rounding_seed, each_step,
    )  # fmt: skip
    runs = [(select(part.params, backend), _trim(part)) for part in _by_arithmetic(plan)]
    for run, part in runs:
        if part is not None:
            run.add_noise(part)
            _mark_written(part.out)


def add_noise(
    params: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    *,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    dist: str = "gaussian",
    mask: masks.Mask | None = None,
    decay: float | Sequence[float] = 1.0,
    rounding: str = "nearest",
    rounding_seed: int | Sequence[int] = 0,
    each_step: bool = False,
    backend: str | None = None,
) -> None:
    """Write decay · w + Σₖ cₖ zₖ into ``out`` and leave ``params`` alone.

    Args and errors as for `add_noise_`; ``out`` holds one tensor for each of ``params``, of the
    same number of elements, type and device, and overlaps none of them. Elements outside the
    mask are copied.
    """
    _check_out(params, out)
    plan = _plan(
        params, out, seeds, coeffs, streams, offsets, dist, mask, decay, rounding,
        rounding_seed, each_step,
    )  # fmt: skip
    runs = [(select(part.params, backend), part) for part in _by_arithmetic(plan)]
    for run, part in runs:
        trimmed = _trim(part)
        if trimmed is not None:
            run.add_noise(trimmed)
            _mark_written(part.out)
        else:
            for source, target in zip(part.params, part.out, strict=True):
                target.detach().copy_(source.detach().view_as(target))


def _plan(
    params: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    streams: Sequence[int] | None,
    offsets: Sequence[int] | None,
    dist: str,
    mask: masks.Mask | None,
    decay: float | Sequence[float],
    rounding: str,
    rounding_seed: int | Sequence[int],
    each_step: bool,
) -> AddNoise:
    """The pass in plain numbers, or an error before a byte is written."""
    check_tensors(params, "params")
    _check_apart([*params, *out] if out is not params else params)
    if dist not in noise.KINDS:
        raise ValueError(f"dist is {dist!r}, but it must be one of {_names(noise.KINDS)}.")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is {rounding!r}, but it must be 'nearest' or 'stochastic'.")
    seeds, coeffs = list(seeds), list(coeffs)
    if not seeds:
        raise ValueError("seeds is empty, but a pass needs at least one seed (K >= 1).")
    if len(coeffs) != len(seeds):
        raise ValueError(
            f"coeffs has {len(coeffs)} numbers, but seeds has {len(seeds)}; give one for each seed."
        )
    streams = list(range(len(params))) if streams is None else list(streams)
    offsets = [0] * len(params) if offsets is None else list(offsets)
    for name, values in (("streams", streams), ("offsets", offsets)):
        if len(values) != len(params):
            raise ValueError(
                f"{name} has {len(values)} numbers, but params has {len(params)} tensors; "
                "give one for each tensor."
            )
    steps = len(seeds) if each_step else 1
    decays = _per_step(decay, steps, "decay", each_step)
    rounding_seeds = _per_step(rounding_seed, steps, "rounding_seed", each_step)
    for seed in [*seeds, *rounding_seeds]:
        noise.check_address(0, seed, 0, 0)
    for p, stream, offset in zip(params, streams, offsets, strict=True):
        noise.check_address(p.numel(), 0, stream, offset)
    return AddNoise(
        params=params,
        out=out,
        streams=streams,
        offsets=offsets,
        seeds=seeds,
        coeffs=[_finite(c, "a coefficient") for c in coeffs],
        decays=[_finite(d, "decay") for d in decays],
        kind=noise.KINDS[dist],
        masks=masks.resolve(mask, params),
        stochastic=rounding == "stochastic",
        rounding_seeds=rounding_seeds,
        each_step=each_step,
    )


def _by_arithmetic(plan: AddNoise) -> list[AddNoise]:
    """The plan split in tensors computed in binary32, with numbers rounded to it, and binary64."""
    parts = []
    for wide in (False, True):
        chosen = [i for i, p in enumerate(plan.params) if (p.dtype is torch.float64) == wide]
        if not chosen:
            continue
        part = plan
        if len(chosen) < len(plan.params):
            fields = ("params", "out", "streams", "offsets", "masks")
            some: dict[str, Any] = {f: [getattr(plan, f)[i] for i in chosen] for f in fields}
            part = replace(plan, **some)
        if not wide:
            part = replace(
                part,
                coeffs=[_binary32(c, "a coefficient") for c in part.coeffs],
                decays=[_binary32(d, "decay") for d in part.decays],
                masks=[_mask32(m) for m in part.masks],
            )
        parts.append(part)
    return parts


def _trim(plan: AddNoise) -> AddNoise | None:
    """The plan without steps that write nothing; None if nothing is left to do."""
    if not plan.each_step:
        idle = plan.decays[0] == 1 and not any(plan.coeffs)
        return None if idle else plan
    active = [k for k, c in enumerate(plan.coeffs) if c != 0 or plan.decays[k] != 1]
    if len(active) == len(plan.seeds):
        return plan
    fields = ("seeds", "coeffs", "decays", "rounding_seeds")
    kept: dict[str, Any] = {f: [getattr(plan, f)[k] for k in active] for f in fields}
    return replace(plan, **kept) if active else None


def check_tensors(tensors: Sequence[torch.Tensor], name: str) -> None:
    """Raise unless these are dense, contiguous floating-point tensors of one device."""
    if isinstance(tensors, torch.Tensor):
        raise TypeError(f"{name} is one tensor, but it must be a list of tensors: [tensor].")
    device = None
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}[{i}] is a {type(t).__name__}, but it must be a tensor.")
        if t.layout is not torch.strided or t.is_meta:
            raise ValueError(
                f"{name}[{i}] is {'a meta' if t.is_meta else 'a sparse'} tensor, but its weights "
                "must be dense and in memory."
            )
        if t.dtype not in DTYPES:
            raise TypeError(
                f"{name}[{i}] has type {t.dtype}, but it must be one of {_names(DTYPES)}."
            )
        if not t.is_contiguous():
            raise ValueError(
                f"{name}[{i}] of shape {tuple(t.shape)} is not contiguous, but an element's noise "
                "follows from its place in memory; pass t.contiguous() and copy the result back."
            )
        device = device or t.device
        if t.device != device:
            raise ValueError(
                f"{name}[{i}] is on {t.device}, but {name}[0] is on {device}; "
                "call once for each device."
            )


def _check_out(params: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    check_tensors(params, "params")
    check_tensors(out, "out")
    if len(out) != len(params):
        raise ValueError(f"out has {len(out)} tensors, but params has {len(params)}; give as many.")
    for i, (p, o) in enumerate(zip(params, out, strict=True)):
        if (p.numel(), p.dtype, p.device) != (o.numel(), o.dtype, o.device):
            raise ValueError(
                f"out[{i}] is {o.numel()} × {o.dtype} on {o.device}, but params[{i}] is "
                f"{p.numel()} × {p.dtype} on {p.device}; they must agree."
            )


def _check_apart(tensors: Sequence[torch.Tensor]) -> None:
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i)
        for i, t in enumerate(tensors)
        if t.numel()
    )
    for (_, end, i), (begin, _, j) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ValueError(
                f"Tensors {min(i, j)} and {max(i, j)} of the call overlap in memory, but each "
                "weight may be written once; pass tied or shared weights one time only."
            )


def _per_step(value: object, steps: int, name: str, each_step: bool) -> list:
    if not isinstance(value, list | tuple):
        return [value] * steps
    if not each_step:
        raise ValueError(
            f"{name} is a list, but one number a seed goes with each_step=True only; "
            "give one number."
        )
    if len(value) != steps:
        raise ValueError(
            f"{name} has {len(value)} numbers, but seeds has {steps}; "
            "give one for all or one for each seed."
        )
    return list(value)


def _finite(x: float, name: str) -> float:
    try:
        x = float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {x!r}, but it must be a number.") from None
    if not math.isfinite(x):
        raise ValueError(f"{name} is {x}, but it must be finite.")
    return x


def _binary32(x: float, name: str) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        raise ValueError(
            f"{name} is {x}, but it must stay finite in binary32 (at most 3.4e38)."
        ) from None


def _mask32(mask: masks.MaskOf) -> masks.MaskOf:
    if isinstance(mask, masks.MagnitudeOf) and math.isfinite(mask.threshold):
        return masks.MagnitudeOf(_binary32(mask.threshold, "a magnitude threshold"))
    return mask


def _mark_written(tensors: Sequence[torch.Tensor]) -> None:
    # Autograd then notices when a tensor it saved was written behind its back.
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _names(values: object) -> str:
    return ", ".join(str(v).removeprefix("torch.") for v in values)  # type: ignore[attr-defined]

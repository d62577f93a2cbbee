"""Refusing what no pass could do, before a byte is written. Every refusal is a sentence."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch

from zokernels import masks, noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDINGS = ("nearest", "stochastic")


def numbers_of_pass(
    params: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    *,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    columns: Sequence[int | None] | None = None,
    dist: str = "gaussian",
    mask: masks.Mask | None = None,
    decay: float | Sequence[float] = 1.0,
    rounding: str = "nearest",
    rounding_seed: int | Sequence[int] = 0,
    each_step: bool | int = False,
) -> dict[str, Any]:
    """The fields of `Pass`, checked; the arguments are those of `zokernels.ops.add_noise_`."""
    check_tensors(params, "params")
    if not isinstance(dist, str) or dist not in noise.KINDS:
        raise ValueError(f"dist is {dist!r}, but it must be one of {names(noise.KINDS)}.")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}, but it must be 'nearest' or 'stochastic'.")
    seeds, coeffs = listed(seeds, "seeds"), listed(coeffs, "coeffs")
    if not seeds:
        raise ValueError("seeds is empty, but a pass needs at least one seed (K >= 1).")
    if len(coeffs) != len(seeds):
        raise ValueError(
            f"coeffs has {len(coeffs)} numbers, but seeds has {len(seeds)}; give one for each seed."
        )
    places = list(range(len(params)))
    streams = places if streams is None else one_each(streams, "streams", params)
    offsets = [0] * len(params) if offsets is None else one_each(offsets, "offsets", params)
    queries = _queries(each_step, len(seeds))
    decays = per_step(decay, "decay", len(seeds), each_step)
    rounding_seeds = per_step(rounding_seed, "rounding_seed", len(seeds), each_step)
    for seed in [*seeds, *rounding_seeds]:
        noise.check_address(0, seed, 0, 0)
    for p, stream, offset in zip(params, streams, offsets, strict=True):
        noise.check_address(p.numel(), 0, stream, offset)
    return dict(
        params=params,
        streams=streams,
        offsets=offsets,
        columns=_columns(columns, params, dist),
        seeds=seeds,
        coeffs=[finite(c, "a coefficient") for c in coeffs],
        queries=queries,
        decays=[finite(d, "decay") for d in decays],
        kind=noise.KINDS[dist],
        masks=masks.resolve(mask, params),
        stochastic=rounding == "stochastic",
        rounding_seeds=rounding_seeds,
    )


def _columns(columns: Any, params: Sequence[torch.Tensor], dist: str) -> list[int]:
    """How many columns a rank-one direction has of each tensor."""
    if dist != "rank1":
        if columns is not None:
            raise ValueError(
                f"columns are given, but dist is {dist!r}, whose noise knows no rows and columns; "
                "omit them, or use dist='rank1'."
            )
        return [0] * len(params)
    given = [None] * len(params) if columns is None else one_each(columns, "columns", params)
    for c in given:
        if c is not None and (isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < 2**63):
            raise ValueError(
                f"columns has {c!r}, but it must have an integer, at least 1, for each tensor: the "
                "columns of the whole parameter; 0 for one with fewer than two dimensions, None "
                "for what the tensor's own shape says."
            )
    return [
        noise.columns_of(p.shape) if c is None else c for p, c in zip(params, given, strict=True)
    ]


def one_each(value: Any, name: str, params: Sequence[torch.Tensor]) -> list:
    """The numbers in a list that has one for each tensor."""
    values = listed(value, name)
    if len(values) != len(params):
        raise ValueError(
            f"{name} has {len(values)} numbers, but params has {len(params)} tensors; "
            "give one for each tensor."
        )
    return values


def listed(value: Any, name: str) -> list:
    """The numbers in a list."""
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, but it must be a list of numbers.") from None


def per_step(value: Any, name: str, seeds: int, each_step: bool | int) -> list:
    """``value`` once for each step of the pass: as given, or one for all."""
    steps = seeds // _queries(each_step, seeds)
    if not isinstance(value, list | tuple):
        return [value] * steps
    if not each_step:
        raise ValueError(
            f"{name} is a list, but one number a step goes with each_step only; give one number."
        )
    if len(value) != steps:
        raise ValueError(
            f"{name} has {len(value)} numbers, but the {seeds} seeds make {steps} steps; "
            "give one for all or one for each step."
        )
    return list(value)


def _queries(each_step: bool | int, seeds: int) -> int:
    """Seeds a step: ``True`` means one, ``False`` all of them."""
    if not isinstance(each_step, int) or each_step < 0 or (each_step and seeds % each_step):
        raise ValueError(
            f"each_step is {each_step!r}, but it must be False, True, or the number of seeds a "
            f"step, which divides the number of seeds ({seeds})."
        )
    return int(each_step) or seeds


def check_tensors(tensors: Sequence[torch.Tensor], name: str) -> None:
    """Raise unless these are dense, contiguous floating-point tensors of one device."""
    if isinstance(tensors, torch.Tensor):
        raise TypeError(f"{name} is one tensor, but it must be a list of tensors: [tensor].")
    if not (hasattr(tensors, "__len__") and hasattr(tensors, "__iter__")):
        raise TypeError(f"{name} is {tensors!r}, but it must be a list of tensors: [tensor].")
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
                f"{name}[{i}] has type {t.dtype}, but it must be one of {names(DTYPES)}."
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


def check_out(params: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Raise unless ``out`` can take the results for ``params``."""
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


def check_apart(tensors: Sequence[torch.Tensor]) -> None:
    """Raise if two of the tensors share memory, or one has none, as in a tracer's rehearsal."""
    if any(t.numel() and not t.data_ptr() for t in tensors):
        raise ValueError(
            "A tensor of the call is a fake one, without memory, whose weights can't be written; "
            "call the op outside of what is traced or exported."
        )
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


def finite(x: float, name: str) -> float:
    """The number as a float, or an error if it is none or not finite."""
    try:
        x = float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {x!r}, but it must be a number.") from None
    if not math.isfinite(x):
        raise ValueError(f"{name} is {x}, but it must be finite.")
    return x


def binary32(x: float, name: str) -> float:
    """The number rounded to binary32, or an error if that is infinite."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        raise ValueError(
            f"{name} is {x}, but it must stay finite in binary32 (at most 3.4e38)."
        ) from None


def mask32(mask: masks.MaskOf) -> masks.MaskOf:
    """The mask with a threshold rounded to binary32."""
    if isinstance(mask, masks.MagnitudeOf) and math.isfinite(mask.threshold):
        return masks.MagnitudeOf(binary32(mask.threshold, "a magnitude threshold"))
    return mask


def names(values: object) -> str:
    """The values in a sentence."""
    return ", ".join(str(v).removeprefix("torch.") for v in values)  # type: ignore[attr-defined]

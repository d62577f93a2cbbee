"""Masks: which elements a pass may touch.

Where a mask is 0 the element stays as it is, bit for bit, weight decay included. The numbers of a
mask are one for all tensors of a call or a sequence with one a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["Bits", "Magnitude", "Random"]

T = TypeVar("T")


@dataclass(frozen=True)
class Random:
    """Keep a random share of the elements, drawn from the noise's own mask stream.

    Args:
        keep: Expected share kept, 0 … 1; it is realised as ``round(keep · 65536) / 65536``.
        seed: Seed of the mask, 0 … 2⁶⁴ − 1, apart from the seeds of the directions.

    Raises:
        ValueError: If a share or a seed is outside its range.
    """

    keep: float | Sequence[float]
    seed: int | Sequence[int]

    def __post_init__(self) -> None:
        for keep in _each(self.keep):
            if not 0.0 <= keep <= 1.0:
                raise ValueError(f"Random(keep={keep}): a share lies between 0 and 1.")
        for seed in _each(self.seed):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
                raise ValueError(
                    f"Random(seed={seed!r}): a seed is an integer between 0 and 2**64 - 1."
                )


@dataclass(frozen=True)
class Magnitude:
    """Keep the elements with ``|w| ≤ threshold``, judged on the stored, unperturbed weight.

    This is Sparse-MeZO's rule (Liu et al., 2024). The two sides of a perturbation and the update
    see the same mask, since none of them judges a perturbed weight. A pass of several steps
    (``each_step``) judges afresh before every step; one of several directions judges once, for
    all of them.

    Args:
        threshold: Largest magnitude kept, at least 0; it is rounded once to binary32.

    Raises:
        ValueError: If a threshold is negative or NaN.
    """

    threshold: float | Sequence[float]

    def __post_init__(self) -> None:
        for threshold in _each(self.threshold):
            if not threshold >= 0:
                raise ValueError(
                    f"Magnitude(threshold={threshold}): a threshold is a number of at least 0."
                )


class Bits:
    """Keep the elements whose bit is set in a static mask of one bit a weight.

    Args:
        tensors: One mask for each tensor of the call: a bool tensor of the parameter's shape, or
            a packed uint8 tensor of ``ceil(numel / 8)`` bytes, where element i has bit ``i % 8``
            (1 = lowest) of byte ``i // 8``.

    Raises:
        TypeError: If a mask is neither bool nor uint8.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.sizes = [t.numel() if t.dtype is torch.bool else None for t in tensors]
        self.packed = [_packed(t) for t in tensors]

    def __repr__(self) -> str:
        return f"Bits({len(self.packed)} tensors)"


Mask = Random | Magnitude | Bits


@dataclass(frozen=True)
class RandomOf:
    """`Random` for one tensor: keep where the 16-bit draw is below ``below``."""

    below: int
    seed: int


@dataclass(frozen=True)
class MagnitudeOf:
    """`Magnitude` for one tensor."""

    threshold: float


@dataclass(frozen=True)
class BitsOf:
    """`Bits` for one tensor: the packed bytes."""

    packed: torch.Tensor


MaskOf = RandomOf | MagnitudeOf | BitsOf | None


def resolve(mask: Mask | None, params: Sequence[torch.Tensor]) -> list[MaskOf]:
    """One mask for each tensor, checked against it.

    Raises:
        TypeError: If ``mask`` is not one of this module's masks.
        ValueError: If its numbers or tensors do not fit ``params``.
    """
    count = len(params)
    if mask is None:
        return [None] * count
    if isinstance(mask, Random):
        keeps = _spread(mask.keep, count, "Random(keep)")
        seeds = _spread(mask.seed, count, "Random(seed)")
        return [
            RandomOf(round(keep * 65536), seed) for keep, seed in zip(keeps, seeds, strict=True)
        ]
    if isinstance(mask, Magnitude):
        return [MagnitudeOf(t) for t in _spread(mask.threshold, count, "Magnitude(threshold)")]
    if isinstance(mask, Bits):
        return _resolve_bits(mask, params)
    raise TypeError(
        f"mask is {mask!r}, but it must be None or one of zokernels.masks: Random, Magnitude, Bits."
    )


def _resolve_bits(mask: Bits, params: Sequence[torch.Tensor]) -> list[MaskOf]:
    if len(mask.packed) != len(params):
        raise ValueError(
            f"Bits holds {len(mask.packed)} masks, but the call has {len(params)} tensors; "
            "give one mask for each tensor."
        )
    for i, (packed, size, p) in enumerate(zip(mask.packed, mask.sizes, params, strict=True)):
        if packed.numel() != -(-p.numel() // 8) or size not in (None, p.numel()):
            raise ValueError(
                f"Bits: mask {i} has {packed.numel()} bytes, but tensor {i} has {p.numel()} "
                f"elements and needs {-(-p.numel() // 8)}."
            )
        if packed.device != p.device:
            raise ValueError(
                f"Bits: mask {i} is on {packed.device}, but tensor {i} is on {p.device}; "
                "move the mask there."
            )
    return [BitsOf(packed) for packed in mask.packed]


def _packed(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype is torch.uint8:
        return mask.reshape(-1).contiguous()
    if mask.dtype is not torch.bool:
        raise TypeError(f"Bits: a mask has type {mask.dtype}, but it must be bool or packed uint8.")
    flat = mask.reshape(-1)
    whole = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=mask.device)
    whole[: flat.numel()] = flat
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    return (whole.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def _each(value: T | Sequence[T]) -> Sequence[T]:
    return value if isinstance(value, list | tuple) else [value]  # type: ignore[list-item]


def _spread(value: T | Sequence[T], count: int, name: str) -> Sequence[T]:
    """``value`` once for each of ``count`` tensors."""
    if not isinstance(value, list | tuple):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} numbers, but the call has {count} tensors; "
            "give one number for all or one for each."
        )
    return value


def take(mask: Mask | None, chosen: Sequence[int]) -> Mask | None:
    """The mask for a part of a call's tensors, given by their positions."""
    if isinstance(mask, Random):
        return Random(_choose(mask.keep, chosen), _choose(mask.seed, chosen))
    if isinstance(mask, Magnitude):
        return Magnitude(_choose(mask.threshold, chosen))
    if isinstance(mask, Bits):
        part = Bits([])
        part.sizes = [mask.sizes[i] for i in chosen]
        part.packed = [mask.packed[i] for i in chosen]
        return part
    return mask


def to_plain(mask: Mask | None) -> dict | None:
    """The mask as a dict of numbers, lists and tensors, as optimizers store it."""
    match mask:
        case None:
            return None
        case Random():
            return {"kind": "random", "keep": mask.keep, "seed": mask.seed}
        case Magnitude():
            return {"kind": "magnitude", "threshold": mask.threshold}
        case Bits():
            return {"kind": "bits", "packed": mask.packed}
    raise TypeError(
        f"mask is {mask!r}, but it must be None or one of zokernels.masks: Random, Magnitude, Bits."
    )


def from_plain(plain: dict | None) -> Mask | None:
    """The mask that `to_plain` described."""
    if plain is None:
        return None
    kind, rest = plain["kind"], {k: v for k, v in plain.items() if k != "kind"}
    if kind == "bits":
        return Bits(rest["packed"])
    return Random(**rest) if kind == "random" else Magnitude(**rest)


def _choose(value: T | Sequence[T], chosen: Sequence[int]) -> T | Sequence[T]:
    return [value[i] for i in chosen] if isinstance(value, list | tuple) else value


def concatenate(parts: Sequence[tuple[Mask | None, int]]) -> Mask | None:
    """One mask for the tensors of several calls: (mask, number of tensors) each, of one kind."""
    kinds = [mask for mask, _ in parts if mask is not None]
    if not kinds:
        return None
    if isinstance(kinds[0], Bits):
        joined = Bits([])
        for mask in kinds:
            assert isinstance(mask, Bits)
            joined.sizes += mask.sizes
            joined.packed += mask.packed
        return joined

    def numbers(field: str) -> list:
        return [x for mask, n in parts for x in _spread(getattr(mask, field), n, field)]

    if isinstance(kinds[0], Random):
        return Random(numbers("keep"), numbers("seed"))
    return Magnitude(numbers("threshold"))


def kept(mask: Magnitude, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The elements of each tensor that a mask by magnitude keeps, as bool tensors."""
    thresholds = _spread(mask.threshold, len(weights), "Magnitude(threshold)")
    # The threshold is rounded once to binary32, as in the passes; of float64 weights it is not.
    return [
        w.abs() <= (t if w.dtype is torch.float64 else float(torch.tensor(t, dtype=torch.float32)))
        for w, t in zip(weights, thresholds, strict=True)
    ]

"""The passes in plain PyTorch: what every other backend equals, bit for bit.

Only separate ``*``, ``+``, ``−`` on float32 are used: PyTorch contracts ``add(alpha=)``,
``addcmul`` and ``lerp`` to fused multiply–adds, and differs between devices there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zokernels import noise
from zokernels.backends.plan import AddNoise
from zokernels.masks import BitsOf, MagnitudeOf, MaskOf, RandomOf

# Bounds the int64 and float64 temporaries of a chunk to about 100 MB.
_CHUNK = 1 << 20


@torch.no_grad()
def add_noise(plan: AddNoise) -> None:
    """Run the pass, on whatever device the tensors live."""
    for i, (param, out) in enumerate(zip(plan.params, plan.out, strict=True)):
        source, target = param.detach().view(-1), out.detach().view(-1)
        for start in range(0, source.numel(), _CHUNK):
            part = slice(start, min(start + _CHUNK, source.numel()))
            target[part] = _add_noise_to(source[part], plan, i, start)


def _add_noise_to(weight: torch.Tensor, plan: AddNoise, i: int, start: int) -> torch.Tensor:
    for terms, decay, rounding_seed in _steps(plan):
        at: dict[str, Any] = dict(
            stream=plan.streams[i], offset=plan.offsets[i] + start, device=weight.device
        )
        keep = _keep(weight, plan.masks[i], start, at)
        acc = weight.to(_arithmetic_type(weight.dtype)) * decay
        for seed, coeff in terms:
            acc = _fma(coeff, _draw(plan.kind, weight.numel(), seed, at), acc)
        if plan.stochastic and weight.dtype in (torch.bfloat16, torch.float16):
            u = noise.uniform16(weight.numel(), noise.ROUNDING, rounding_seed, **at)
            new = _round_stochastic(acc, u, weight.dtype)
        else:
            new = acc.to(weight.dtype)
        weight = new if keep is None else torch.where(keep, new, weight)
    return weight


def _steps(plan: AddNoise) -> Iterator[tuple[list[tuple[int, float]], float, int]]:
    """Each rounding of the pass: its (seed, coefficient) terms, decay and rounding seed."""
    terms = list(zip(plan.seeds, plan.coeffs, strict=True))
    if not plan.each_step:
        yield terms, plan.decays[0], plan.rounding_seeds[0]
        return
    for term, decay, seed in zip(terms, plan.decays, plan.rounding_seeds, strict=True):
        yield [term], decay, seed


def _draw(kind: int, numel: int, seed: int, at: dict[str, Any]) -> torch.Tensor:
    draw = noise.gaussian if kind == noise.GAUSSIAN else noise.rademacher
    return draw(numel, seed=seed, **at)


def _keep(
    weight: torch.Tensor, mask: MaskOf, start: int, at: dict[str, Any]
) -> torch.Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, RandomOf):
        return noise.uniform16(weight.numel(), noise.MASK, mask.seed, **at) < mask.below
    if isinstance(mask, MagnitudeOf):
        return weight.to(_arithmetic_type(weight.dtype)).abs() <= mask.threshold
    assert isinstance(mask, BitsOf)
    index = torch.arange(start, start + weight.numel(), device=weight.device)
    return (mask.packed[index >> 3].to(torch.int64) >> (index & 7) & 1).bool()


def _arithmetic_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _fma(c: float, z: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """Return c · z + acc: rounded once to binary32, or in binary64 by multiply, then add."""
    product = z.double() * c
    if acc.dtype is torch.float64:
        return product + acc
    return _sum_to_odd(product, acc.double()).float()


def _sum_to_odd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a + b in binary64, rounded to odd, so that rounding it again to binary32 is exact.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", IEEE Trans. Computers 57 (2008). The error is Knuth's two-sum.
    """
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    outward = (error > 0) == (total > 0)
    return torch.where(inexact, bits + torch.where(outward, 1, -1), bits).view(torch.float64)


def _round_stochastic(acc: torch.Tensor, u: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bits = acc.view(torch.int32).to(torch.int64)
    if dtype is torch.bfloat16:
        rounded = _from_bits(bits + u & ~0xFFFF)
    else:
        normal = _from_bits(bits + (u & 0x1FFF) & ~0x1FFF)
        magnitude = acc.abs()
        # int64 of the clamped value: what is above 2⁻¹⁴ takes the other branch.
        units = (magnitude.clamp(max=2.0**-14) * 2.0**40).to(torch.int64)
        small = ((units + u) >> 16).to(torch.float32) * 2.0**-24
        rounded = torch.where(magnitude >= 2.0**-14, normal, torch.copysign(small, acc))
    return torch.where(acc.isfinite(), rounded, acc).to(dtype)


def _from_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)

"""The passes in plain PyTorch: what every other backend equals, bit for bit.

Only separate ``*``, ``+``, ``−`` on float32 are used: PyTorch contracts ``add(alpha=)``,
``addcmul`` and ``lerp`` to fused multiply–adds, and differs between devices there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from zokernels import noise
from zokernels.backends.plan import AddNoise, ApplyUpdate, Pass
from zokernels.masks import BitsOf, MagnitudeOf, MaskOf, RandomOf

KINDS = noise.KINDS.values()

# Bounds the int64 and float64 temporaries of a chunk to about 100 MB.
_CHUNK = 1 << 20


@torch.no_grad()
def add_noise(plan: AddNoise) -> None:
    """Run the pass, on whatever device the tensors live."""
    for i, (param, out) in enumerate(zip(plan.params, plan.out, strict=True)):
        source, target = param.detach().view(-1), out.detach().view(-1)
        for part in _chunks(source.numel()):
            target[part] = _add_noise_to(source[part], plan, i, part.start)


@torch.no_grad()
def apply_update(plan: ApplyUpdate) -> None:
    """Run the pass, on whatever device the tensors live."""
    for i, (param, states) in enumerate(zip(plan.params, plan.states, strict=True)):
        whole = [t.detach().view(-1) for t in (param, *states)]
        for part in _chunks(param.numel()):
            results = _update([t[part] for t in whole], plan, i, part.start)
            for target, result in zip(whole, results, strict=True):
                target[part] = result


def _chunks(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _CHUNK):
        yield slice(start, min(start + _CHUNK, numel))


def _add_noise_to(weight: torch.Tensor, plan: AddNoise, i: int, start: int) -> torch.Tensor:
    at = _at(plan, i, start, weight)
    for step in range(plan.steps):
        acc = weight.to(_arithmetic_type(weight.dtype)) * plan.decays[step]
        for seed, coeff in plan.terms(step):
            acc = _fma(_draw(plan, i, weight.numel(), seed, at), coeff, acc)
        new = _round(acc, weight.dtype, plan.stochastic, plan.rounding_seeds[step], at)
        weight = _where(_keep(weight, plan.masks[i], start, at), new, weight)
    return weight


def _update(
    before: list[torch.Tensor], plan: ApplyUpdate, i: int, start: int
) -> list[torch.Tensor]:
    """Weight and states after every step of the pass."""
    at = _at(plan, i, start, before[0])
    for step in range(plan.steps):
        weight, *states = before
        wide = [t.to(_arithmetic_type(weight.dtype)) for t in before]
        g = torch.zeros_like(wide[0])
        for seed, coeff in plan.terms(step):
            g = _fma(_draw(plan, i, g.numel(), seed, at), coeff, g)
        seed = plan.rounding_seeds[step]

        def stored(value: torch.Tensor, number: int, seed: int = seed) -> torch.Tensor:
            # A 16-bit state is always rounded stochastically: to nearest, most steps are lost.
            dtype = states[number - 1].dtype  # noqa: B023
            return _round(value, dtype, True, (seed + number) % 2**64, at).to(value.dtype)

        new_states, direction = _RULES[plan.rule](g, wide[1:], plan, step, stored)
        acc = _fma(direction, plan.rates[step], wide[0] * plan.decays[step])
        new = _round(acc, weight.dtype, plan.stochastic, seed, at)
        keep = _keep(weight, plan.masks[i], start, at)
        before = [_where(keep, *pair) for pair in zip([new, *new_states], before, strict=True)]
    return before


# What a rule gives: the new states, and the direction d of w ← fma(−lr, d, decay·w).
Outcome = tuple[list[torch.Tensor], torch.Tensor]
Store = Callable[[torch.Tensor, int], torch.Tensor]


def _sign(
    g: torch.Tensor, states: list[torch.Tensor], plan: ApplyUpdate, step: int, stored: Store
) -> Outcome:
    return [], (g > 0).to(g.dtype) - (g < 0).to(g.dtype)


def _momentum(
    g: torch.Tensor, states: list[torch.Tensor], plan: ApplyUpdate, step: int, stored: Store
) -> Outcome:
    m = stored(_fma(states[0], plan.beta1, g), 1)
    return [m], m


def _adam(
    g: torch.Tensor, states: list[torch.Tensor], plan: ApplyUpdate, step: int, stored: Store
) -> Outcome:
    m = stored(_fma(states[0], plan.beta1, g * plan.one_minus_beta1), 1)
    v = stored(_fma(states[1], plan.beta2, g * plan.one_minus_beta2 * g), 2)
    kept = [m, v]
    if plan.amsgrad:
        v = torch.where(v > states[2], v, states[2])
        kept.append(v)
    return kept, m / (_sqrt(v * plan.scales[step]) + plan.adam_eps)


_RULES = {"sign": _sign, "momentum": _momentum, "adam": _adam}


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    # PyTorch's float32 root on CPU is not correctly rounded; in binary64 and rounded once it is.
    return x.double().sqrt().to(x.dtype)


def _at(plan: Pass, i: int, start: int, like: torch.Tensor) -> dict[str, Any]:
    """Where a chunk's noise lies."""
    return dict(stream=plan.streams[i], offset=plan.offsets[i] + start, device=like.device)


def _where(keep: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    new = new.to(old.dtype)
    return new if keep is None else torch.where(keep, new, old)


def _draw(plan: Pass, i: int, numel: int, seed: int, at: dict[str, Any]) -> torch.Tensor:
    if plan.kind == noise.RANK1:
        return noise.signs_of_rank1(numel, plan.columns[i], seed, **at)
    return noise.DRAWS[plan.kind](numel, seed=seed, **at)


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


def _fma(x: torch.Tensor, c: float, acc: torch.Tensor) -> torch.Tensor:
    """Return x · c + acc: rounded once to binary32, or in binary64 by multiply, then add."""
    product = x.double() * c
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


def _round(
    acc: torch.Tensor, dtype: torch.dtype, stochastic: bool, seed: int, at: dict[str, Any]
) -> torch.Tensor:
    if stochastic and dtype in (torch.bfloat16, torch.float16):
        u = noise.uniform16(acc.numel(), noise.ROUNDING, seed, **at)
        return _round_stochastic(acc, u, dtype)
    return acc.to(dtype)


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

"""The reference against exact arithmetic: the first elements of every tensor of every pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch

from zokernels import masks
from zokernels.lab.verification import exact, passes
from zokernels.lab.verification.case import Case, Failed
from zokernels.lab.verification.difference import Difference, pattern

# Elements of a tensor that are computed: more than a block of eight.
_FIRST = 9
_MASK, _ROUNDING = 2, 3

State = dict[str, Fraction]


def cases() -> Iterator[Case]:
    """A case for each combination that `passes` has by default."""
    for spec in passes.specs(deep=False):
        yield Case(f"exact/reference/{spec.words}", functools.partial(check, spec))


def check(spec: passes.Spec) -> str:
    """Raise Failed unless the reference gives the numbers of exact arithmetic."""
    names, got = passes.expect(spec)
    params, call = passes.arguments(spec, "cpu")
    states = passes.make_states(spec, params) if spec.op in passes.RULES else [{} for _ in params]
    # Of a call that writes elsewhere the results come first, as of the others.
    after: dict[str, torch.Tensor] = dict(zip(names, got, strict=True))
    results = list(after.items())[: len(params)]
    for i, (p, before) in enumerate(zip(params, states, strict=True)):
        tensors = {results[i][0]: results[i][1]}
        tensors |= {k: t for k, t in after.items() if k.startswith(f"states[{i}]")}
        for e in range(min(_FIRST, p.numel())):
            values = [float(t[e]) for t in (p, *before.values())]
            if not all(map(math.isfinite, values)):
                continue
            w, *state = map(Fraction, values)
            try:
                new, moved = _element(spec, call, i, e, w, dict(zip(before, state, strict=True)))
            except exact.NotFinite:
                continue
            for (name, t), value in zip(tensors.items(), [new, *moved.values()], strict=True):
                if Fraction(float(t[e])) != value:
                    _fail(name, t, e, value)
    return ""


def _fail(name: str, t: torch.Tensor, e: int, value: Fraction) -> None:
    right = pattern(torch.tensor([float(value)], dtype=torch.float64).to(t.dtype), 0)
    difference = Difference(name, e, right, pattern(t, e), 1, t.numel())
    raise Failed(f"the reference is not what exact arithmetic gives: {difference}", difference)


def _element(
    spec: passes.Spec, call: dict[str, Any], i: int, e: int, w: Fraction, state: State
) -> tuple[Fraction, State]:
    """Weight and states of an element after the pass."""
    stream, index = call["streams"][i], call["offsets"][i] + e
    draw = exact.gaussian if call["dist"] == "gaussian" else exact.rademacher
    if call["dist"] == "rank1":
        draw = functools.partial(exact.rank1, columns=call["columns"][i])
    queries = call["each_step"] or len(call["seeds"])
    for step in range(len(call["seeds"]) // queries):
        decay, seed = (
            v[step] if isinstance(v, list) else v for v in (call["decay"], call["rounding_seed"])
        )
        if not _kept(call["mask"], i, e, w, stream, index):
            continue
        part = slice(step * queries, (step + 1) * queries)
        terms = [
            (_binary32(c), draw(s, stream, index))
            for s, c in zip(call["seeds"][part], call["coeffs"][part], strict=True)
        ]

        def narrow(
            x: Fraction, dtype: str, stochastic: bool, number: int = 0, seed: int = seed
        ) -> Fraction:
            if not stochastic or dtype == "float32":
                return exact.round_to(x, dtype)
            u = exact.uniform16((seed + number) % 2**64, stream, _ROUNDING, index)
            return exact.round_stochastic(x, u, dtype)

        acc = exact.round_to(_binary32(decay) * w)
        if spec.op in passes.RULES:
            g = Fraction(0)
            for c, z in terms:
                g = exact.fma(c, z, g)
            kind = "bfloat16" if spec.narrow_state else "float32"
            state, direction, lr = _rule(
                spec, g, state, step, lambda x, n, kind=kind, to=narrow: to(x, kind, True, n)
            )
            acc = exact.fma(-lr, direction, acc)
        else:
            for c, z in terms:
                acc = exact.fma(c, z, acc)
        w = narrow(acc, spec.dtype, spec.rounding == "stochastic")
    return w, state


def _rule(
    spec: passes.Spec, g: Fraction, state: State, step: int, store: Any
) -> tuple[State, Fraction, Fraction]:
    """The states, the direction d of w ← fma(−lr, d, decay·w), and lr."""
    rule = passes.RULES[spec.op]
    lr, scale = passes.LRS[step] if spec.each_step else passes.LR, 1.0
    if rule["rule"] == "sign":
        return {}, Fraction((g > 0) - (g < 0)), _binary32(lr)
    if rule["rule"] == "momentum":
        m = store(exact.fma(_binary32(rule["beta"]), state["m"], g), 1)
        return {"m": m}, m, _binary32(lr)
    b1, b2 = rule["betas"]
    m = exact.fma(_binary32(b1), state["m"], exact.round_to(_binary32(1 - b1) * g))
    squared = exact.round_to(exact.round_to(_binary32(1 - b2) * g) * g)
    new = {"m": store(m, 1), "v": store(exact.fma(_binary32(b2), state["v"], squared), 2)}
    v = new["v"]
    if rule.get("amsgrad"):
        v = new["v_max"] = max(v, state["v_max"])
    if "step" in rule:
        t = rule["step"] + step
        lr, scale = lr / (1 - b1**t), 1 / (1 - b2**t)
    below = exact.root(exact.round_to(v * _binary32(scale)))
    below = exact.round_to(below + _binary32(rule["adam_eps"]))
    return new, exact.round_to(new["m"] / below), _binary32(lr)


def _kept(mask: masks.Mask | None, i: int, e: int, w: Fraction, stream: int, index: int) -> bool:
    if isinstance(mask, masks.Random):
        assert isinstance(mask.keep, list) and isinstance(mask.seed, int)
        below = round(mask.keep[i] * 65536)
        return exact.uniform16(mask.seed, stream, _MASK, index) < below
    if isinstance(mask, masks.Magnitude):
        assert isinstance(mask.threshold, float)
        return abs(w) <= _binary32(mask.threshold)
    if isinstance(mask, masks.Bits):
        return bool(int(mask.packed[i][e // 8]) >> e % 8 & 1)
    return True


def _binary32(number: float) -> Fraction:
    return exact.round_to(Fraction(number))

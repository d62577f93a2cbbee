"""The passes over the weights: each op's contract, its checks, and who runs it.

Every backend gives the same bits; `zokernels.backends.reference` is the specification.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

import torch
from typing_extensions import Unpack

from zokernels.backends import checks, rules, select, shards
from zokernels.backends.keywords import PassKeywords, RuleKeywords, defaults, takes
from zokernels.backends.plan import AddNoise, ApplyUpdate, Pass
from zokernels.backends.tracer import untraced

__all__ = ["PassKeywords", "RuleKeywords", "add_noise", "add_noise_", "apply_update_", "listening"]

P = TypeVar("P", bound=Pass)
_OF_PASS, _OF_RULE = tuple(defaults(checks.numbers_of_pass)), tuple(defaults(rules.numbers))

# What a listener is told of a pass that wrote weights: the rule ("add_noise" for the pass without
# one), tensors, seeds, coefficients, and the keywords.
Listener = Callable[[str, Sequence[torch.Tensor], Sequence[int], Sequence[float], dict], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)

# Gets a pass, checked and planned, and the backend that would run it.
Taker = Callable[[ModuleType, Pass], None]
_taker: ContextVar[Taker | None] = ContextVar("taker", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every in-place pass of this thread inside the block, once it is done.

    What a trajectory records is thus what entered the pass, whatever rule made the call.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def taking(taker: Taker) -> Iterator[None]:
    """Hand the passes of this thread inside the block to ``taker`` instead of running them.

    Listeners are told of them all the same.
    """
    token = _taker.set(taker)
    try:
        yield
    finally:
        _taker.reset(token)


@untraced
@takes(checks.numbers_of_pass)
def add_noise_(
    params: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    **how: Unpack[PassKeywords],
) -> None:
    """Add noise to the weights in place: w ← decay · w + Σₖ cₖ zₖ, rounded once.

    For each element, in binary32: ``acc = decay · w``, then ``acc = fma(cₖ, zₖ, acc)`` for k in
    order, then one rounding to the tensor's type. A call with decay 1 and all coefficients 0
    writes nothing. Tensors of float64 are computed in binary64 (multiply, then add) by the
    reference.

    Args:
        params: Contiguous tensors of one device, float32, bfloat16, float16 or float64, that do
            not overlap. Of a `DTensor` each process writes its part, with the noise of the whole.
        seeds: K ≥ 1 seeds of directions, 0 … 2⁶⁴ − 1.
        coeffs: K finite coefficients, rounded once to binary32.
        **how: The keywords of `PassKeywords`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the tensors do not fit; nothing is written.
        RuntimeError: If the backend named is not there.
    """
    here, numbers = _checked(params, None, seeds, coeffs, how)
    checks.check_apart(here.params)
    _run(AddNoise(**numbers, out=here.params), how)
    tell("add_noise", params, seeds, coeffs, **how)


@untraced
@takes(checks.numbers_of_pass)
def add_noise(
    params: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    **how: Unpack[PassKeywords],
) -> None:
    """Write decay · w + Σₖ cₖ zₖ into ``out`` and leave ``params`` alone.

    Args and errors as for `add_noise_`; ``out`` holds one tensor for each of ``params``, of the
    same number of elements, type and device, and overlaps none of them. Elements outside the
    mask are copied.
    """
    checks.check_out(params, out)
    here, numbers = _checked(params, [[t] for t in out], seeds, coeffs, how)
    out = [t for (t,) in here.others]
    checks.check_apart([*here.params, *out])
    _run(AddNoise(**numbers, out=out), how)


@untraced
@takes(checks.numbers_of_pass, rules.numbers)
def apply_update_(
    params: Sequence[torch.Tensor],
    states: Sequence[rules.State] | None,
    rule: str,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    *,
    lr: float | Sequence[float],
    **how: Unpack[RuleKeywords],
) -> None:
    """Put the pseudo-gradient g = Σₖ cₖ zₖ through a rule with state, in one pass.

    For each element, in binary32 (in float64 tensors binary64, multiply, then add): g = 0, then
    ``g = fma(cₖ, zₖ, g)`` for k in order, then

    - ``"sign"``: w ← fma(−lr, sign(g), decay·w);
    - ``"momentum"``: m ← fma(β, m, g), w ← fma(−lr, m, decay·w);
    - ``"adam"``: m ← fma(β₁, m, (1−β₁)·g), v ← fma(β₂, v, ((1−β₂)·g)·g),
      w ← fma(−lr, m / (√v̂ + ϵ), decay·w), with v̂ = v, or with ``amsgrad`` v̂ ← max(v̂, v).

    A state is rounded to its type as soon as it is made, and w uses what was stored; a bfloat16
    state always by stochastic rounding, with the kind-3 numbers under ``rounding_seed + 1`` for m
    and ``+ 2`` for v.

    Args:
        params: As for `add_noise_`.
        states: One entry a tensor: ``{"m": …}``, ``{"m": …, "v": …}`` or with ``amsgrad``
            ``{"m": …, "v": …, "v_max": …}``, or the same tensors in this order; None for "sign".
            Contiguous, as many elements as the tensor, float32 or bfloat16 (float64 for float64).
        rule: ``"sign"``, ``"momentum"`` or ``"adam"``.
        seeds: K ≥ 1 seeds of directions.
        coeffs: K finite coefficients, dₖ/q.
        lr: Learning rate, finite; with ``each_step`` one for all or one a step.
        **how: The keywords of `PassKeywords` and `RuleKeywords`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the tensors do not fit; nothing is written.
        RuntimeError: If the backend named is not there.

    Sources: signSGD (Bernstein et al., 2018), heavy-ball momentum, Adam
    (Kingma and Ba, 2015), ZO-AdaMM (Chen et al., 2019) for AMSGrad without bias correction.
    """
    here, numbers = _checked(params, None, seeds, coeffs, how)
    rates = checks.per_step(lr, "lr", len(seeds), how["each_step"])
    ordered = rules.check_states(rule, states, params, how["amsgrad"])
    numbers |= rules.numbers(rule, rates, **{name: how[name] for name in _OF_RULE})  # type: ignore[literal-required]
    plan = ApplyUpdate(**numbers, states=_here(params, ordered, how).others)
    checks.check_apart(plan.written)
    _run(plan, how)
    tell(rule, params, seeds, coeffs, states=ordered, lr=lr, **how)


def _checked(
    params: Sequence[torch.Tensor],
    others: Sequence[Sequence[torch.Tensor]] | None,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    how: Any,
) -> tuple[shards.Cut, dict[str, Any]]:
    """The pass over what this process holds, and its fields that every pass has."""
    here = _here(params, others, how)
    asked = {name: how[name] for name in _OF_PASS}
    asked |= {name: getattr(here, name) for name in ("streams", "offsets", "columns", "mask")}
    return here, checks.numbers_of_pass(here.params, seeds, coeffs, **asked)


def _run(plan: Pass, how: Any) -> None:
    """Run a pass, each arithmetic's part by its backend."""
    # All of them are found before one writes.
    runs = [(select(part.params, how["backend"], part.kind), part) for part in _by_arithmetic(plan)]
    for run, part in runs:
        if isinstance(part, AddNoise):
            trimmed = _trim(part)
            if trimmed is None:
                _copy(part)
                continue
            part = trimmed
        taker = _taker.get()
        if taker is not None:
            taker(run, part)
            continue
        (run.add_noise if isinstance(part, AddNoise) else run.apply_update)(part)
        # Autograd then notices when a tensor it saved was written behind its back.
        written = [t for t in part.written if not t.is_inference()]
        torch.autograd.graph.increment_version(written)


def _copy(plan: AddNoise) -> None:
    """What a pass that adds nothing does; in place that is nothing."""
    for source, target in zip(plan.params, plan.out, strict=True):
        if target is not source:
            target.detach().copy_(source.detach().view_as(target))


def _here(
    params: Sequence[torch.Tensor], others: Sequence[Sequence[torch.Tensor]] | None, how: Any
) -> shards.Cut:
    """The pass over what this process holds, with what goes with each of the tensors."""
    places = (how["streams"], how["offsets"], how["columns"], how["mask"])
    if not shards.among(params):
        return shards.Cut(params, others or (), *places)
    return shards.cut(params, others or [()] * len(params), *places, how["dist"] == "rank1")


def tell(
    rule: str,
    params: Sequence[torch.Tensor],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    **keywords: Any,
) -> None:
    """Say to who listens that a pass was made, with all of its keywords."""
    listener = _listener.get()
    if listener is not None:
        listener(rule, params, seeds, coeffs, keywords)


def _by_arithmetic(plan: P) -> list[P]:
    """The plan split in tensors computed in binary32, with numbers rounded to it, and binary64."""
    parts = []
    for wide in (False, True):
        chosen = [i for i, p in enumerate(plan.params) if (p.dtype is torch.float64) == wide]
        if not chosen:
            continue
        part = plan
        if len(chosen) < len(plan.params):
            fields = [f for f in _PER_TENSOR if hasattr(plan, f)]
            some: dict[str, Any] = {f: [getattr(plan, f)[i] for i in chosen] for f in fields}
            part = replace(part, **some)
        if not wide:
            rounded = {f: _binary32(getattr(part, f), w) for f, w in _NUMBERS if hasattr(part, f)}
            part = replace(part, **rounded, masks=[checks.mask32(m) for m in part.masks])
        parts.append(part)
    return parts


_PER_TENSOR = ("params", "out", "states", "streams", "offsets", "columns", "masks")
_NUMBERS = (
    ("coeffs", "a coefficient"), ("decays", "decay"), ("rates", "lr"), ("scales", "the scale of v"),
    ("beta1", "beta"), ("one_minus_beta1", "1 - beta"), ("beta2", "beta2"),
    ("one_minus_beta2", "1 - beta2"), ("adam_eps", "adam_eps"),
)  # fmt: skip


def _binary32(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [checks.binary32(x, name) for x in value]
    return checks.binary32(value, name)


def _trim(plan: AddNoise) -> AddNoise | None:
    """The plan without steps that write nothing; None if nothing is left to do."""
    active = [
        s for s, decay in enumerate(plan.decays) if decay != 1 or any(c for _, c in plan.terms(s))
    ]
    if len(active) == plan.steps:
        return plan
    terms = [term for s in active for term in plan.terms(s)]
    kept: dict[str, Any] = {
        f: [getattr(plan, f)[s] for s in active] for f in ("decays", "rounding_seeds")
    }
    kept |= {"seeds": [s for s, _ in terms], "coeffs": [c for _, c in terms]}
    return replace(plan, **kept) if active else None

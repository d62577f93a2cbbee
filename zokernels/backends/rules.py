"""The update rules with state: what each keeps, and its numbers as every backend takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zokernels.backends import checks

# The state tensors of each rule, in order; "v_max" is there with `amsgrad` only.
STATES = {"sign": (), "momentum": ("m",), "adam": ("m", "v", "v_max")}

State = Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor


def state_names(rule: str, amsgrad: bool = False) -> tuple[str, ...]:
    """The names of a rule's states, in order.

    Raises:
        ValueError: If there is no such rule.
    """
    if not isinstance(rule, str) or rule not in STATES:
        raise ValueError(f"rule is {rule!r}, but it must be one of {checks.names(STATES)}.")
    return STATES[rule] if amsgrad or rule != "adam" else STATES[rule][:2]


def check_states(
    rule: str,
    states: Sequence[State] | None,
    params: Sequence[torch.Tensor],
    amsgrad: bool,
) -> list[list[torch.Tensor]]:
    """The state tensors of each parameter in the rule's order.

    Raises:
        TypeError: If a state has a type that no state can have.
        ValueError: If one is missing, or does not fit its parameter.
    """
    if not isinstance(amsgrad, bool | int):
        raise TypeError(f"amsgrad is {amsgrad!r}, but it must be True or False.")
    names = state_names(rule, amsgrad)
    if not names:
        return [[] for _ in params]
    if states is not None and not hasattr(states, "__len__") or _is_scalar(states):
        raise TypeError(
            f"states is {states!r}, but rule {rule!r} needs a list with one entry for each tensor."
        )
    if states is None or len(states) != len(params):
        count = "None" if states is None else f"{len(states)} entries"
        raise ValueError(
            f"states is {count}, but rule {rule!r} needs one entry for each of the {len(params)} "
            f"tensors: a dict with {', '.join(names)}."
        )
    found = []
    for i, (state, p) in enumerate(zip(states, params, strict=True)):
        tensors = in_order(state, names, i)
        checks.check_tensors([p, *tensors], f"params[{i}] and its states")
        for name, t in zip(names, tensors, strict=True):
            wide = p.dtype is torch.float64
            allowed = (torch.float64,) if wide else (torch.float32, torch.bfloat16)
            if t.dtype not in allowed:
                raise TypeError(
                    f"states[{i}][{name!r}] has type {t.dtype}, but for a tensor of {p.dtype} it "
                    f"must be {' or '.join(map(str, allowed))}."
                )
            if t.numel() != p.numel():
                raise ValueError(
                    f"states[{i}][{name!r}] has {t.numel()} elements, but params[{i}] has "
                    f"{p.numel()}; they must agree."
                )
        if amsgrad and rule == "adam" and tensors[2].dtype != tensors[1].dtype:
            raise TypeError(
                f"states[{i}]['v_max'] has type {tensors[2].dtype} and 'v' {tensors[1].dtype}, but "
                "the one holds values of the other; give both the same type."
            )
        found.append(tensors)
    return found


def _is_scalar(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def in_order(state: State, names: tuple[str, ...], i: int) -> list[torch.Tensor]:
    """The tensors of a state in the rule's order; ``i`` is its number in a message."""
    if isinstance(state, torch.Tensor):
        state = [state]
    if isinstance(state, Mapping):
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(
                f"states[{i}] has {checks.names(state) or 'nothing'}, but {missing[0]!r} is "
                f"missing; give a dict with {', '.join(names)}."
            )
        return [state[name] for name in names]
    if not hasattr(state, "__len__"):
        raise TypeError(
            f"states[{i}] is {state!r}, but it must be a dict with {', '.join(names)}, or these "
            "tensors in a list."
        )
    if len(state) != len(names):
        raise ValueError(
            f"states[{i}] has {len(state)} tensors, but the rule keeps {len(names)}: "
            f"{', '.join(names)}."
        )
    return list(state)


def numbers(
    rule: str,
    lrs: Sequence[float],
    *,
    beta: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    amsgrad: bool = False,
    step: int | None = None,
) -> dict[str, Any]:
    """The rule's fields of `ApplyUpdate`, in binary64.

    Raises:
        ValueError: If a number is outside its range.
    """
    lrs = [checks.finite(lr, "lr") for lr in lrs]
    beta1 = beta2 = 0.0
    if rule == "momentum":
        beta1 = _share(beta, "beta")
    scales = [1.0] * len(lrs)
    if rule == "adam":
        pair = checks.listed(betas, "betas")
        if len(pair) != 2:
            raise ValueError(f"betas is {betas!r}, but it must be two numbers, (beta1, beta2).")
        beta1, beta2 = (_share(b, f"betas[{i}]") for i, b in enumerate(pair))
        if step is not None:
            lrs, scales = _correct(lrs, beta1, beta2, step)
    if not checks.finite(adam_eps, "adam_eps") >= 0:
        raise ValueError(f"adam_eps is {adam_eps}, but it must be at least 0.")
    return dict(
        rule=rule,
        rates=[-lr for lr in lrs],
        scales=scales,
        beta1=beta1,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        adam_eps=float(adam_eps),
        amsgrad=bool(amsgrad and rule == "adam"),
    )


def _share(value: float, name: str) -> float:
    if not 0.0 <= checks.finite(value, name) <= 1.0:
        raise ValueError(f"{name} is {value}, but it must lie between 0 and 1.")
    return float(value)


def _correct(
    lrs: Sequence[float], beta1: float, beta2: float, step: int
) -> tuple[list[float], list[float]]:
    """Adam's bias correction, folded in the learning rate and a factor on v̂."""
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step is {step!r}, but Adam's steps count from 1; give None for none.")
    if max(beta1, beta2) == 1.0:
        raise ValueError(
            f"betas is {(beta1, beta2)}, but bias correction divides by 1 - beta; "
            "give betas below 1, or step=None."
        )
    times = range(step, step + len(lrs))
    rates = [lr / (1.0 - beta1**t) for lr, t in zip(lrs, times, strict=True)]
    return rates, [1.0 / (1.0 - beta2**t) for t in times]

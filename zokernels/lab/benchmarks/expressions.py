"""The usual expressions of a perturbation and of an update: what the passes are compared with.

MeZO's is written from its paper (Malladi et al., 2023, Algorithm 1), with the arithmetic that the
published procedure uses; the updates are the same noise through the rule's formula or torch.optim.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zokernels.lab.benchmarks.passes import EPS, LR, Case, Pass, Tensors, Unavailable

SCALE = 1.0


def cases(dtype: str, device: str, full: bool) -> list[Case]:
    """The peers of one type: each op has one in the quick set."""

    def peer(op: str, name: str, build: Callable[[str, Tensors], Pass]) -> Case:
        return Case(dtype, op, "gaussian", "", name, partial(build, dtype), peer=True)

    add = "add_noise_"
    found = [peer(add, "mezo", _mezo), peer(add, "mezo-inplace", _mezo_inplace)]
    if full:
        found.append(peer(add, "mezo-compiled", _mezo_compiled))
        found.append(peer(add, "mezo-inplace-compiled", _mezo_inplace_compiled))
    if device.startswith("cuda"):
        found.append(peer(add, "triton-randn", _triton_randn))
    found.append(peer("sign", "expression", _sign))
    rules = ("momentum", "adam", "amsgrad") if full else ("momentum", "adam")
    return [*found, *(peer(rule, "torch-optim", partial(_optim, rule)) for rule in rules)]


def _published(p: torch.Tensor) -> torch.Tensor:
    # Noise drawn in the weights' type, a new tensor each time.
    z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
    return p + SCALE * z * EPS


def _inplace(p: torch.Tensor) -> None:
    p.add_(torch.randn_like(p), alpha=SCALE * EPS)


def _mezo(dtype: str, tensors: Tensors) -> Pass:
    p = tensors.weights(dtype, replaced=True)
    return lambda: _assign(p, _published(p))


def _mezo_inplace(dtype: str, tensors: Tensors) -> Pass:
    p = tensors.weights(dtype)
    return lambda: _inplace(p)


def _mezo_compiled(dtype: str, tensors: Tensors) -> Pass:
    p = tensors.weights(dtype, replaced=True)
    compiled = _compile(_published, p)
    return lambda: _assign(p, compiled(p))


def _mezo_inplace_compiled(dtype: str, tensors: Tensors) -> Pass:
    p = tensors.weights(dtype)
    compiled = _compile(_inplace, p)
    return lambda: compiled(p)


def _triton_randn(dtype: str, tensors: Tensors) -> Pass:
    try:
        from zokernels.lab.benchmarks.triton_randn import add_randn_
    except ImportError as error:
        raise Unavailable(f"triton is not here: {error}") from error
    p = tensors.weights(dtype)
    return lambda: add_randn_(p, EPS)


def _sign(dtype: str, tensors: Tensors) -> Pass:
    p = tensors.weights(dtype)
    return lambda: p.add_(torch.randn_like(p).mul_(EPS).sign_(), alpha=-LR)


def _optim(rule: str, dtype: str, tensors: Tensors) -> Pass:
    """The noise as ``.grad`` and torch's own fused optimizer, whose states have the weights' type.

    Of its own weights, since the optimizer counts steps and keeps states for them.
    """
    p = torch.nn.Parameter(tensors.weights(dtype).clone())
    opt: torch.optim.Optimizer
    try:
        if rule == "momentum":
            opt = torch.optim.SGD([p], lr=LR, momentum=0.9, fused=True)
        else:
            opt = torch.optim.Adam([p], lr=LR, amsgrad=rule == "amsgrad", fused=True)
    except RuntimeError as error:
        raise Unavailable(f"torch.optim has no fused step here: {error}") from error

    def run() -> None:
        p.grad = torch.randn_like(p).mul_(EPS)
        opt.step()
        p.grad = None

    return run


def _compile(function: Callable[..., Any], p: torch.Tensor) -> Callable[..., Any]:
    """The function compiled for this tensor's shape and type, so that no timing compiles."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") != "0":
        raise Unavailable("TORCHDYNAMO_DISABLE is set")
    # The full graph, so that a part left to eager mode is an error and not a slow peer.
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    try:
        compiled(p)
    except Exception as error:  # whatever stops the compiler is the reason to leave it out
        lines = str(error).strip().splitlines() or [""]
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {lines[0]}") from error
    return compiled


def _assign(p: torch.Tensor, value: torch.Tensor) -> None:
    p.data = value

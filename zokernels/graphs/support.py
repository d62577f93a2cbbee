"""What a captured step can do, and for what it can't, why not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from zokernels import noise
from zokernels.backends import layouts, select, shards
from zokernels.optim import (
    ZOSGD,
    ForwardGrad,
    HybridZO,
    ZOAdam,
    ZOSGDConservative,
    ZOSGDMomentum,
    ZOSGDSign,
)
from zokernels.optim.base import ZOOptimizer

# By class and no further: a class derived from one of these may decide on the host.
RULES = (ZOSGD, ZOSGDSign, ZOSGDMomentum, ZOAdam)

_WHY_NOT = {
    ZOSGDConservative: "it compares losses on the host before it decides which way to go",
    ForwardGrad: "it takes derivatives, not differences of losses",
    HybridZO: "a part of its step is backpropagation, by another optimizer",
}

# What of a param group a captured step reads anew each time.
_DYNAMIC = {
    "params", "lr", "initial_lr", "eps", "initial_eps", "weight_decay", "maximize", "seed", "step",
    "history", "moments",
}  # fmt: skip


def check(optimizer: ZOOptimizer, capture: bool) -> None:
    """Raise unless a step of this optimizer can be captured.

    Raises:
        TypeError: If its rule can't.
        ValueError: If its settings, parameters or device can't.
    """
    kind = type(optimizer)
    if kind not in RULES:
        why = _WHY_NOT.get(kind, "its rule isn't known here")
        raise TypeError(
            f"A step of {kind.__name__} can't be captured: {why}. Captured are steps of "
            f"{', '.join(rule.__name__ for rule in RULES)}; use opt.step(closure)."
        )
    for group in optimizer.param_groups:
        for setting, why in _refused(group).items():
            raise ValueError(
                f"A step with {setting} can't be captured: {why}; use opt.step(closure), or leave "
                "it out."
            )
    params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    if optimizer.parallel.ranks > 1 or shards.among(params):
        raise ValueError(
            "A step that several processes share can't be captured, since the host agrees with the "
            "others on each loss; use opt.step(closure), or parallel=None."
        )
    if any(p.dtype is torch.float64 for p in params):
        raise ValueError(
            "A step with float64 parameters can't be captured, since its numbers are kept in "
            "binary32; use opt.step(closure)."
        )
    _check_layout(params)
    _check_device(optimizer, params, capture)


def settings(optimizer: ZOOptimizer) -> list[tuple]:
    """What a captured step has fixed: settings, and where weights and states are."""
    found: list[tuple] = []
    for group in optimizer.param_groups:
        found += [(k, *map(_known, tree_leaves(v))) for k, v in group.items() if k not in _DYNAMIC]
        for p in group["params"]:
            states = optimizer.state.get(p, {}).values()
            found.append(("params", p.requires_grad, *map(_known, (p, *states))))
    return found


def _known(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.dtype
    return value


def _refused(group: dict) -> dict[str, str]:
    found = {}
    if group["blocks"] is not None:
        found["blocks"] = "the host decides after each block whether the next one is run"
    if group["resample_every"]:
        found["resample_every"] = "the mask is fixed in it"
    if group.get("window"):
        found["window"] = "its pass grows with the steps before"
    if group.get("bias_correction"):
        found["bias_correction"] = (
            "it counts the steps whose loss was finite, which only the host knows"
        )
    return found


def _check_layout(params: list[torch.Tensor]) -> None:
    devices = layouts.by_device(params)
    if len(devices) > 1:
        raise ValueError(
            f"The weights are on {', '.join(map(str, devices))}, but a graph is captured on one "
            "device; use opt.step(closure), which takes them where they are, or move the model."
        )
    for p in params:
        if not layouts.is_row_major(p):
            raise ValueError(
                f"A weight of shape {tuple(p.shape)} with strides {p.stride()} is not contiguous, "
                "and its passes go through a copy, which a graph would read as it was captured; "
                "use opt.step(closure), or p.data = p.data.contiguous()."
            )


def _check_device(optimizer: ZOOptimizer, params: list[torch.Tensor], capture: bool) -> None:
    if not capture:
        return
    if params[0].device.type != "cuda":
        raise ValueError(
            f"The weights are on {params[0].device}, but a graph is captured on CUDA; move the "
            "model there, or use capture=False, which runs the same step without a graph."
        )
    kind = noise.KINDS[optimizer.param_groups[0]["dist"]]
    backend = select(params, optimizer.backend, kind).__name__.rpartition(".")[2]
    if backend != "triton":
        raise ValueError(
            f"The passes are run by {backend!r}, but only those of 'triton' can be captured; see "
            "zokernels.backends(), or use capture=False."
        )


@contextlib.contextmanager
def as_if_capturing() -> Iterator[None]:
    """Whoever asks whether a stream is being captured is told that it is.

    A model of transformers then takes the way that it takes in a capture, where it builds attention
    masks that it leaves out elsewhere: so that the kernels for them are chosen and loaded before.
    """
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An operation that has the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

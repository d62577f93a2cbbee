"""The forwards of a step: the closure, run again and again, each time as the first time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

Closure = Callable[[], torch.Tensor | float]


@dataclass
class StepTiming:
    """Seconds of the last step: forwards without the noise made in them, noise, update, all.

    With ``reuse_forward`` of `HybridZO` the backward counts among the forwards.
    """

    forwards: float = 0.0
    backward: float = 0.0
    noise: float = 0.0
    update: float = 0.0
    total: float = 0.0


def check_closure(closure: Closure | None) -> Closure:
    """The closure of a step, if a step can be made with it here.

    Raises:
        ValueError: If there is none.
        RuntimeError: If weights can't be updated here.
    """
    if closure is None:
        raise ValueError(
            "step() got no closure, but the loss is evaluated at several points; pass a function "
            "that runs the forward and returns the loss: opt.step(lambda: model(**batch).loss)."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step() runs inside torch.inference_mode, where weights can't be updated; use "
            "torch.no_grad instead, or nothing."
        )
    return closure


class Forward:
    """The closure as a forward to be repeated: same random numbers, and a scalar for a loss.

    Attributes:
        kind: A tensor of the last loss's type and device.
    """

    def __init__(self, closure: Closure, replay_random: Callable[[], None]):
        self.closure = closure
        self.replay_random = replay_random
        self.kind = torch.zeros((), dtype=torch.float32)

    def __call__(self) -> torch.Tensor | float:
        """The loss at the weights as they are."""
        self.replay_random()
        loss = self.closure()
        if isinstance(loss, torch.Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"The closure returned a tensor of shape {tuple(loss.shape)}, but the loss "
                    "must be a scalar; take its mean."
                )
            wide = loss.dtype if loss.dtype is torch.float64 else torch.float32
            self.kind = loss.detach().to(wide)
        return loss


@contextlib.contextmanager
def same_randomness(
    model: nn.Module | None, params: list[nn.Parameter]
) -> Iterator[Callable[[], None]]:
    """Dropout off, buffers kept; yields a function that makes the next forward draw as the first.

    The root keeps its training flag, since trainers read it to tell training from evaluation;
    what it draws itself is replayed.
    """
    device = params[0].device if params else torch.device("cpu")
    cpu_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def replay() -> None:
        torch.set_rng_state(cpu_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)

    switched: list[nn.Module] = []
    buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    if model is not None:
        leaf = not any(True for _ in model.children())
        switched = [m for m in model.modules() if m.training and (leaf or m is not model)]
        buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]
    for m in switched:
        m.training = False
    try:
        yield replay
    finally:
        for m in switched:
            m.training = True
        for buffer, copy, version in buffers:
            if buffer._version != version:
                buffer.copy_(copy)

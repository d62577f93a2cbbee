"""The steps that a step is compared with, each as a function that makes one.

MeZO's is written from its paper (Malladi et al., 2023, Algorithm 1): noise is drawn anew from the
same generator state for +ε, −2ε, +ε and the update, in the weights' type, with the arithmetic that
the published procedure uses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

TITLES = {
    "mezo": "MeZO, as published",
    "torchzero": "torchzero's MeZO",
    "fo-sgd": "SGD, by backpropagation",
    "fo-adamw": "AdamW, by backpropagation",
}
Closure = Callable[[], torch.Tensor]
Step = Callable[[], Any]


class MeZO:
    """θ + εz, θ − εz, back to θ, and the step along z, each a pass that draws z again."""

    def __init__(self, model: nn.Module, lr: float = 1e-7, eps: float = 1e-3):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps, self.steps = lr, eps, 0

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """One step; returns the loss at θ + εz."""
        self.steps += 1
        self._add(self.eps)
        plus = float(closure())
        self._add(-2 * self.eps)
        minus = float(closure())
        self._add(self.eps)
        slope = (plus - minus) / (2 * self.eps)
        self._add(-self.lr * slope)
        return plus

    def _add(self, scale: float) -> None:
        torch.manual_seed(self.steps)
        for p in self.params:
            z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
            p.data = p.data + scale * z


def build(name: str, model: nn.Module, closure: Closure) -> Step:
    """One step of a peer, on the model and the batch of the closure.

    Args:
        name: One of `available`.
        model: The model, whose weights it changes.
        closure: The loss, with a graph.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "mezo":
        mezo = MeZO(model)
        return lambda: mezo.step(closure)
    if name == "torchzero":
        import torchzero  # type: ignore[import-not-found]

        modules = torchzero.m
        opt = torchzero.Optimizer(
            params, modules.MeZO(h=1e-3, distribution="gaussian"), modules.LR(1e-7)
        )

        @torch.no_grad()
        def loss(backward: bool = True) -> torch.Tensor:
            return closure()

        return lambda: opt.step(loss)
    first_order: torch.optim.Optimizer = (
        torch.optim.SGD(params, lr=1e-7) if name == "fo-sgd" else torch.optim.AdamW(params, lr=1e-7)
    )

    def step() -> None:
        closure().backward()
        first_order.step()
        # Here, so that no gradient is held while others are timed.
        first_order.zero_grad()

    return step


def beside(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of a step that the peers were timed beside; the first, where there were none."""
    return next((row for row in rows if row.get("mezo")), rows[0])


def available() -> list[str]:
    """The peers that are installed."""
    names = ["mezo", "fo-sgd", "fo-adamw"]
    return [*names, "torchzero"] if importlib.util.find_spec("torchzero") else names

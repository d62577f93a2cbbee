"""MeZO's step as its paper describes it (Malladi et al., 2023, Algorithm 1), for comparison.

Noise is drawn anew from the same generator state for +ε, −2ε, +ε and the update, in the weights'
type, with the arithmetic that the published procedure uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class MeZO:
    """θ + εz, θ − εz, back to θ, and the step along z, each a pass that draws z again."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-7, eps: float = 1e-3):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps, self.steps = lr, eps, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> float:
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

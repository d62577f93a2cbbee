"""The first-order baselines: torch's own optimizers by backpropagation, stepped like the others.

A step takes the closure of a zeroth-order step and keeps its promise: a loss or a gradient that is
not finite changes no weight. Dropout is off, since the models here are in evaluation mode, but for
that before an adapter where it has one.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from zokernels.lab.runs.history import PARTS


class Backprop(torch.optim.Optimizer):
    """A step by backpropagation; a mixin before one of torch's optimizers.

    Args:
        model: The module; its trainable parameters are trained.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        max_bad_steps: Raise after this many steps in a row that were not finite.
        seed: Fixes what an adapter's dropout leaves out.

    Attributes:
        timing: Where the last step's time went.
        bad_steps: Steps in a row whose loss or gradient was not finite.
        projected_gradients: None of them here.
    """

    trajectory = None
    replayable = False

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        max_bad_steps: int = 10,
        seed: int = 0,
    ):
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        self.timing = _timing()
        self.projected_gradients: list[float] = []
        self.seed = seed
        self._dropouts = [
            module
            for name, module in model.named_modules()
            if "lora_dropout" in name and isinstance(module, nn.Dropout)
        ]
        params: Iterable[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, lr=lr, weight_decay=weight_decay)  # type: ignore[call-arg]

    def step(self, closure: Any = None) -> torch.Tensor:  # type: ignore[override]
        """One forward, one backward, one update.

        Args:
            closure: Runs a forward and returns the loss, a scalar with its graph.

        Returns:
            The loss, detached.

        Raises:
            ValueError: If the loss has no gradient.
            FloatingPointError: After ``max_bad_steps`` bad steps in a row; the weights are those
                of the last good step.
        """
        started = time.perf_counter()
        self.timing = _timing()
        # What a backward left that ran out of memory.
        self.zero_grad()
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad(), self._dropping():
            graph = closure()
            self.timing.forwards = time.perf_counter() - started
            self._backward(graph)
        loss = graph.detach()
        began = time.perf_counter()
        if math.isfinite(float(loss)) and _finite(params):
            self.bad_steps = 0
            super().step()
        else:
            self.bad_steps += 1
        self.zero_grad()
        now = time.perf_counter()
        self.timing.update, self.timing.total = now - began, now - started
        if self.bad_steps >= self.max_bad_steps:
            raise FloatingPointError(
                f"The loss or its gradient was not finite in {self.bad_steps} steps in a row (the "
                f"last loss: {float(loss)}), so no weight was changed in them; lower lr, or look "
                "at the data."
            )
        return loss

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """An adapter's dropout, by seed and step, so that a resumed run has the same."""
        if not self._dropouts:
            yield
            return
        # In the state that a checkpoint holds.
        group = self.param_groups[0]
        group["dropped"] = group.get("dropped", 0) + 1
        device = group["params"][0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((self.seed << 32) + group["dropped"])
            for module in self._dropouts:
                module.train()
            try:
                yield
            finally:
                for module in self._dropouts:
                    module.eval()

    def _backward(self, loss: torch.Tensor) -> None:
        if not loss.requires_grad:
            raise ValueError(
                "The loss has no gradient, but this optimizer goes by backpropagation; use the "
                "objective candidates or tokens, or a zeroth-order optimizer."
            )
        began = time.perf_counter()
        if math.isfinite(float(loss.detach())):
            loss.backward()
        self.timing.backward = time.perf_counter() - began


def _timing() -> SimpleNamespace:
    return SimpleNamespace(total=0.0, **dict.fromkeys(PARTS, 0.0))


def _finite(params: Iterable[nn.Parameter]) -> bool:
    # The largest: no temporary of a tensor's size is made.
    found = [p.grad for p in params if p.grad is not None and p.grad.numel()]
    return math.isfinite(float(nn.utils.get_total_norm(found, math.inf)))


class FOSGD(Backprop, torch.optim.SGD):
    """Plain SGD. Its decay is coupled in torch, which without momentum is the same thing."""


class FOAdam(Backprop, torch.optim.AdamW):
    """Adam with decoupled weight decay."""


FIRST_ORDER: dict[str, Any] = {"fosgd": FOSGD, "foadam": FOAdam}

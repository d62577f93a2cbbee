"""Forward gradient: d = ∇L·z by one forward-mode pass, ĝ = (1/q) Σ dₖ zₖ, θ ← (1 − η·wd)·θ − η ĝ.

Unbiased and without a difference, hence without ε. Source: Baydin et al., "Gradients without
backpropagation", 2022; the benchmark of Zhang et al., ICML 2024.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zokernels.backends import shards, tracer
from zokernels.estimators import Estimate, mean
from zokernels.optim.forward import Forward
from zokernels.optim.groups import Chosen, join_masks
from zokernels.optim.sgd import ZOSGD
from zokernels.perturb import CarryingTangents, Direction, Misused, Move, directions


class ForwardGrad(ZOSGD):
    """SGD along forward gradients: one forward-mode pass a query, and no state.

    Given a module, a weight's tangent is made as an operation asks for it and dropped with it;
    given parameters only, all tangents are set before the pass (1 × the trainable weights). In
    16-bit weights the tangent is z rounded to their type. The first step runs one forward more,
    which looks for what the model writes.

    Args:
        params: As in `ZOOptimizer`, and so are ``lr`` and the common keywords.
        lr: Learning rate η.
        eps: Without effect, as is ``estimator``: there is no difference. Both are taken so that
            all optimizers can be made alike.
        estimator: See ``eps``.
        perturb: ``"on_entry"`` (default for a module) or ``"in_place"`` (all tangents at once).
        **common: The keywords of `ZOOptimizer`.

    Raises:
        ValueError: If an argument is out of range.
    """

    accumulates = False
    _layers: CarryingTangents | None = None
    _has_looked = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1.0,
        *,
        estimator: str = "one_sided",
        perturb: str | None = None,
        **common: Any,
    ):
        if perturb == "paired":
            raise ValueError(
                "perturb='paired' was asked for, but ForwardGrad has one forward a direction and "
                "nothing to pair; use None, 'on_entry' or 'in_place'."
            )
        # With ε = 1 a difference over ε is the derivative itself.
        super().__init__(params, lr, 1.0, estimator="one_sided", perturb=perturb, **common)
        self._refuse_shards()
        self._layers: CarryingTangents | None = None

    def _refuse_shards(self) -> None:
        if any(shards.is_sharded(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "The weights are cut over processes (DTensors), through whose gathering no "
                "forward-mode derivative goes; use ZOSGD, or whole weights in each process."
            )

    def _goes_on_from(self, rule: str) -> bool:
        # An eps of 1 and one side mean something else to it than to a rule of differences.
        return rule != "ZOSGD" and super()._goes_on_from(rule)

    def _look(self) -> None:
        super()._look()
        self._refuse_shards()

    def _forget(self) -> None:
        super()._forget()
        self._layers = None
        self._has_looked = False

    def _sweep(self, forward: Forward) -> list[Estimate]:
        # All forwards of a step go the same way, those without a tangent too; what is compiled has
        # no forward-mode derivative.
        with _differentiable_attention(), tracer.eager():
            if forward.buffers.is_new or not self._has_looked:
                # Of its own: while it is looked at, torch takes other formulas for derivatives.
                forward()
                self._has_looked = True
            forward.looks = False
            return super()._sweep(forward)

    def _estimate(self, forward: Forward, block: int | None) -> Estimate:
        groups = self._chosen(block)

        def along(seeds: list[int]) -> list[float]:
            pairs = [self._differentiate(forward, block, groups, seed) for seed in seeds]
            return [x for pair in pairs for x in pair]

        seeds = self._seeds(block)
        every = [x for part in self.parallel.join(along, seeds, self) for x in part]
        losses, slopes = every[::2], every[1::2]
        found = Estimate(seeds, losses, slopes, mean(losses))
        self._scale(found, groups, block)
        return found

    def _differentiate(
        self, forward: Forward, block: int | None, groups: Chosen, seed: int
    ) -> tuple[float, float]:
        """L(θ) and ∇L·z."""
        started = time.perf_counter()
        params = [g["params"][i] for g, chosen in groups for i in chosen]
        direction = Direction(
            params,
            [g["streams"][i] for g, chosen in groups for i in chosen],
            [Move((1.0,))] * len(params),
            [seed],
            self.param_groups[0]["dist"],
            join_masks(groups),
            self.backend,
        )
        slope: float | None = None

        def value() -> float:
            nonlocal slope
            found, slope = self._pass(forward, block, params)
            return found

        with forward_ad.dual_level():
            if self.perturb == "in_place":
                noise = _carry_everywhere(direction)
                loss = value()
            else:
                layers = self._layers_of(params)
                before = layers.seconds
                loss = layers.run(direction, value)
                noise = layers.seconds - before
        if slope is None:
            # A closure may give up on a loss that is not finite before it has run the model.
            if math.isfinite(loss):
                raise RuntimeError(
                    "The loss has no tangent: the closure ran none of the trainable parameters, or "
                    "ran them under torch.inference_mode, or detached the loss; return the model's "
                    "own loss."
                )
            slope = math.nan
        self.timing.noise += noise
        self.timing.forwards += time.perf_counter() - started - noise
        return loss, slope

    def _pass(
        self, forward: Forward, block: int | None, params: list[nn.Parameter]
    ) -> tuple[float, float | None]:
        """L(θ), and ∇L·z if the loss has a tangent."""
        try:
            loss: Any = forward() if block is None else self._perturbers.prefix.run(forward, params)
        except (RuntimeError, NotImplementedError) as error:
            raise _explained(error) from error
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"The closure returned a {type(loss).__name__}, but ForwardGrad takes the "
                "derivative of the loss itself; return the tensor."
            )
        value, slope = forward_ad.unpack_dual(loss)
        return float(value), None if slope is None else float(slope)

    def _layers_of(self, params: list[nn.Parameter]) -> CarryingTangents:
        assert self.model is not None
        if self._layers is None or list(map(id, self._layers.params)) != list(map(id, params)):
            self._layers = CarryingTangents(self.model, params)
        return self._layers


def _carry_everywhere(direction: Direction) -> float:
    """Let the parameters themselves carry their tangents; the seconds that making them took."""
    started = time.perf_counter()
    sources = [p.detach() for p in direction.params]
    made = directions(direction, sources, range(len(sources)))
    for p, w, z in zip(direction.params, sources, made, strict=True):
        # A copy of the weights' own values leaves every bit, and brings the tangent.
        p.copy_(forward_ad.make_dual(w.clone(), z))
    return time.perf_counter() - started


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by plain products: the fused kinds have no forward-mode rule on CPU."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _explained(error: Exception) -> Exception:
    text = str(error).splitlines()[0]
    if not any(words in str(error) for words in ("forward AD", "forward mode AD", "forward-mode")):
        return error
    if "mkldnn" in text or "cudnn" in text:
        library = "mkldnn" if "mkldnn" in text else "cudnn"
        way = f"Run the steps inside torch.backends.{library}.flags(enabled=False)"
    elif "autograd.Function" in text:
        way = "Load the model without fused kernels (attn_implementation='eager'), or write a jvp"
    elif "attention" in text or "attn" in text:
        way = "Load the model with attn_implementation='eager'"
    else:
        way = "Write it with operations that have one"
    return Misused(
        f"An operation of the model has no forward-mode derivative: {text} {way}, or use ZOSGD, "
        "which needs none."
    )

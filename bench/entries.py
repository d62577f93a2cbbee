"""The optimizers that docs/optimizers.md compares: rule, theory, and how ZO-Bench's code differs.

To add an optimizer, add an `Entry` to `ENTRIES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import zokernels as zk
from bench import costs

WINDOW, HYBRID = 32, 4

# Peak memory holds some small tensors too: losses, buffers of seeds, a layer's activations.
SLACK = 0.02


@dataclass(frozen=True)
class Linear:
    """a·q + b, to be computed and to be read."""

    a: int
    b: int = 0

    def __call__(self, q: int) -> int:
        """The number for q queries."""
        return self.a * q + self.b

    def __str__(self) -> str:
        first = f"{self.a if self.a > 1 else ''}q" if self.a else ""
        return " + ".join(x for x in (first, str(self.b) if self.b or not first else "") if x)


TWICE, ONCE, ONE_MORE = Linear(2), Linear(1), Linear(1, 1)


@dataclass(frozen=True)
class Entry:
    """A line of the tables: an optimizer, what theory says of it, and how ZO-Bench's code differs.

    Pairs are (two-sided, one-sided). ``temporary`` and ``state`` are in units of the weights;
    ``numbers`` is how many numbers a weight the state keeps, of ``state_bytes`` each.
    """

    name: str
    rule: str
    make: Callable[..., torch.optim.Optimizer]
    zo_bench: str
    forwards: tuple[Linear, Linear] = (TWICE, ONE_MORE)
    perturbing: tuple[Linear, Linear] = (TWICE, ONCE)
    updating: int = 1
    directions: Linear = ONCE
    numbers: int = 0
    state_bytes: int = 4
    temporary: float = 1 / costs.LAYERS
    temporary_is: str = "largest layer"
    warmup: int = 2
    # Of the weights that go by zeroth order, and so of the passes over them.
    share: float = 1.0
    slack: float = SLACK

    def theory(self, dtype: torch.dtype, q: int, two_sided: bool) -> costs.Cost:
        """What a step of q queries costs by the rule."""
        side = 0 if two_sided else 1
        return costs.Cost(
            forwards=self.forwards[side](q),
            perturbing=self.perturbing[side](q) * self.share,
            updating=self.updating * self.share,
            directions=self.directions(q) * self.share,
            state=self.numbers * self.state_bytes / dtype.itemsize,
            temporary=self.temporary,
        )

    def measured(self, dtype: torch.dtype, q: int, two_sided: bool) -> costs.Cost:
        """What a step of q queries is counted to cost."""

        def build(net: nn.Module) -> torch.optim.Optimizer:
            estimator = "two_sided" if two_sided else "one_sided"
            return self.make(net, lr=1e-7, num_queries=q, estimator=estimator)

        return costs.measure(build, dtype, self.warmup)


def _with(optimizer: Callable, **keywords: object) -> Callable[..., torch.optim.Optimizer]:
    return functools.partial(optimizer, **keywords)


def _forward_grad(net: nn.Module, lr: float, num_queries: int, estimator: str) -> zk.ForwardGrad:
    # A derivative has no sides.
    return zk.ForwardGrad(net, lr=lr, num_queries=num_queries)


def _hybrid(net: nn.Module, **options: Any) -> zk.HybridZO:
    return zk.HybridZO(net, HYBRID, functools.partial(torch.optim.SGD, lr=1e-7), **options)


NOT_THERE = "not there"
MOMENTUM = "m ← βm + ĝ; θ ← θ − ηm"
MOMENTS = "m ← β₁m + (1−β₁)ĝ; v ← β₂v + (1−β₂)ĝ²; "
HALF = dict(state_dtype=torch.bfloat16)
IN_PLACE = "adds +ε, −2ε, +ε to the weights, which does not restore 16-bit ones; "
ADAMW = "runs on AdamW as shipped, with two more copies of the model"
ENTRIES = [
    Entry(
        "ZOSGD", "θ ← θ − ηĝ", zk.ZOSGD,
        IN_PLACE + "with q > 1 it stores whole gradients, 1 × the weights",
    ),
    Entry(
        'ZOSGD(perturb="in_place")', "the same", _with(zk.ZOSGD, perturb="in_place"),
        "restores by the opposite perturbation, not from a copy",
        temporary=1.0, temporary_is="1",
    ),
    Entry(
        "ZOSGD(sparsity=0.2)", "the same where a random mask is 1", _with(zk.ZOSGD, sparsity=0.2),
        "keeps where N(0, 1) < ratio: “20 %” prunes 58 %; the update ignores the mask for q > 1",
    ),
    Entry(
        "ZOSGDSign", "θ ← θ − η sign(ĝ)", zk.ZOSGDSign,
        f"takes sign(d)·z, whose elements are no signs; {ADAMW}",
    ),
    Entry(
        "ZOSGDConservative", "of θ, θ − ηĝ, θ + ηĝ the one of lowest loss", zk.ZOSGDConservative,
        ADAMW,
        forwards=(Linear(2, 3), Linear(1, 3)), perturbing=(Linear(2, 2), Linear(1, 2)),
    ),
    Entry("ZOSGDMomentum", MOMENTUM, zk.ZOSGDMomentum, "as for `ZOSGD`", numbers=1),
    Entry(
        "ZOSGDMomentum(state_dtype=torch.bfloat16)", "the same", _with(zk.ZOSGDMomentum, **HALF),
        NOT_THERE, numbers=1, state_bytes=2,
    ),
    Entry(
        "ZOSGDMomentum(window=True)", "θ ← θ − η Σ βʲĝ_{t−j} over j < 32",
        _with(zk.ZOSGDMomentum, window=True), NOT_THERE,
        directions=Linear(WINDOW), warmup=WINDOW,
    ),
    Entry(
        "ZOAdam", MOMENTS + "v̂ ← max(v̂, v); θ ← θ − ηm/(√v̂ + ϵ)", zk.ZOAdam, "as for `ZOSGD`",
        numbers=3,
    ),
    Entry(
        "ZOAdam(amsgrad=False, bias_correction=True)",
        MOMENTS + "m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ); θ ← θ − ηm̂/(√v̂ + ϵ)",
        _with(zk.ZOAdam, amsgrad=False, bias_correction=True), "as for `ZOSGD`", numbers=2,
    ),
    Entry(
        "ZOAdam(state_dtype=torch.bfloat16)", "as `ZOAdam`", _with(zk.ZOAdam, **HALF), NOT_THERE,
        numbers=3, state_bytes=2,
    ),
    Entry(
        "ForwardGrad", "d = ∇L·z by forward-mode differentiation; θ ← θ − ηĝ", _forward_grad,
        "not compared",
        forwards=(ONCE, ONCE), perturbing=(ONCE, ONCE),
    ),
    Entry(
        "HybridZO(split=4)", "as `ZOSGD` for 4 of 12 layers, backpropagation for the rest", _hybrid,
        NOT_THERE,
        forwards=(Linear(2, 1), Linear(1, 2)), share=HYBRID / costs.LAYERS,
        # In bfloat16 a backward's products take up to a third of a layer more.
        temporary=1 - HYBRID / costs.LAYERS, temporary_is="deep gradients", slack=0.04,
    ),
]  # fmt: skip

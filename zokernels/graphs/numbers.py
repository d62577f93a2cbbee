"""The numbers of a captured step: written by the host before it runs, and read after it has run.

    dₖ = (L₊ − L₋) / 2ε,  (L₊ − L) / ε  or  (Lₖ − L̄) q / ((q − 1) ε)        cₖ = f · dₖ / q

with f = ∓lr where the rule's pass takes the rate in its coefficients, and ±1 where it takes it
apart; dₖ is scaled before as `normalize` and `clip` ask for. On the device as on the host this is
binary64, in the order of `zokernels.estimators`, and rounded once to binary32.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from zokernels import ops
from zokernels.backends import checks, deferred
from zokernels.backends.plan import AddNoise, Pass, bits32, signed
from zokernels.estimators import points_of
from zokernels.graphs.scale import Scaled, Scaler, mean
from zokernels.optim import ZOSGD
from zokernels.optim.base import ZOOptimizer
from zokernels.optim.groups import Chosen, moment_of
from zokernels.perturb.deferred import words as words_of_move

_ONE = bits32(1.0)


class Update(NamedTuple):
    """A pass of the update: the number of its group, who runs it, and its plan."""

    group: int
    backend: ModuleType
    plan: Pass


def updates_of(optimizer: ZOOptimizer, groups: Chosen) -> list[Update]:
    """The passes that the optimizer's rule makes; none is run, but states are made."""
    found: list[Update] = []
    seeds = list(range(optimizer.param_groups[0]["num_queries"]))
    for g, (group, chosen) in enumerate(groups):

        def take(backend: ModuleType, plan: Pass, g: int = g) -> None:
            found.append(Update(g, backend, plan))

        # Of a group whose lr is 0 now the pass would be left out.
        moving = {**group, "lr": 1.0}
        with ops.taking(take):
            optimizer._update(moving, chosen, seeds, [1.0] * len(seeds))
    return found


class StepNumbers:
    """Seeds, scales, rates and coefficients of a step, and the passes that they are for.

    Args:
        optimizer: Whose step it is.
        groups: Its groups with the positions of trainable parameters.

    Attributes:
        points: Where the step evaluates the loss, in order: (query, side), or None for θ itself.
        outcome: float64: the losses, and whether all was finite and the step was to be made.
        loss: The mean of the losses, or one-sided the base loss.
    """

    def __init__(self, optimizer: ZOOptimizer, groups: Chosen):
        first = optimizer.param_groups[0]
        device = groups[0][0]["params"][groups[0][1][0]].device
        self.optimizer, self.groups = optimizer, groups
        self.estimator, self.queries = str(first["estimator"]), int(first["num_queries"])
        points = points_of(self.estimator, range(self.queries))
        self.points = [(k, side) if side else None for k, side in points]
        moved = [at for at in self.points if at is not None]
        self._updates = updates_of(optimizer, groups)
        # Of a direction: seed, coefficient, decay, rounding seed, and that it is written.
        sizes: dict[tuple, int] = {("move", *at, g): 5 for at in moved for g in range(len(groups))}
        sizes |= {("enabled",): 1, ("seeds",): self.queries}
        sizes |= {("eps",): len(groups), ("factors",): len(groups)}
        sizes |= {("moments",): 2 * len(groups), ("told",): 1}
        tails = [deferred.tail(u.plan, 1.0, 0) for u in self._updates]
        sizes |= {("tail", j): len(tail) for j, tail in enumerate(tails)}
        self._given = deferred.Given(sizes, device)
        self._numbers = [
            torch.zeros(deferred.size(u.plan), dtype=torch.int64, device=device)
            for u in self._updates
        ]
        self._passes = [
            deferred.Deferred(u.backend, u.plan, numbers)
            for u, numbers in zip(self._updates, self._numbers, strict=True)
        ]

        # Tensors: by a Python number CUDA divides as it multiplies by its inverse: rounded twice.
        def number(x: float) -> torch.Tensor:
            return torch.tensor(float(x), dtype=torch.float64, device=device)

        self._count, self._losses = number(self.queries), number(len(self.points))
        self._scaler = Scaler(first["normalize"], first["clip"], self.queries, number)
        # Of each group the running mean of d², which the steps of the graph hand on.
        self._moments = torch.zeros(len(groups), 2, dtype=torch.float64, device=device)
        self.outcome = torch.zeros(len(self.points) + 1, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def move(self, query: int, side: float) -> list[torch.Tensor]:
        """What the passes of a perturbed forward read, for each group."""
        return [self._given.section("move", query, side, g) for g in range(len(self.groups))]

    def write(self, enabled: bool = True, told: bool = True) -> None:
        """Send the numbers of the optimizer's present step.

        Args:
            enabled: Whether the step may write weights.
            told: Whether the optimizer knows the outcome of every step before, and so the running
                mean of d²; else the device has it.

        Raises:
            ValueError: If one is not finite.
        """
        optimizer = self.optimizer
        seeds, rounding_seed = optimizer._seeds(None), optimizer._rounding_seed()
        words: dict[tuple, Sequence[int]] = {
            ("enabled",): [int(enabled)],
            ("seeds",): [signed(s) for s in seeds],
            ("eps",): [_bits64(float(g["eps"])) for g, _ in self.groups],
            ("factors",): [_bits64(self._factor(g)) for g, _ in self.groups],
            ("moments",): [_bits64(x) for g, _ in self.groups for x in moment_of(g, None)],
            ("told",): [int(told)],
        }
        for at in filter(None, self.points):
            for g, (group, _) in enumerate(self.groups):
                eps = checks.finite(group["eps"], "eps")
                words[("move", *at, g)] = words_of_move([seeds[at[0]]], [at[1] * eps])
        for j, update in enumerate(self._updates):
            group = self.groups[update.group][0]
            lr = checks.finite(group["lr"], "lr")
            decay = 1.0 - lr * group["weight_decay"]
            _word(lr, "lr"), _word(decay, "decay")
            words["tail", j] = deferred.tail(update.plan, decay, rounding_seed, -lr)
        self._given.write(words)

    def apply(self, losses: Sequence[torch.Tensor]) -> None:
        """The projected gradients of these losses, and the update; nothing of it on the host."""
        wide = torch.stack([loss.detach().reshape(()).to(torch.float64) for loss in losses])
        if self.estimator == "two_sided":
            # A half is exact, so that here a product is a quotient.
            differences = (wide[0::2] - wide[1::2]) * 0.5
        elif self.estimator == "one_sided":
            differences = wide[1:] - wide[0]
        else:
            differences = (wide - mean(wide, self._losses)) * self._count / (self._count - 1)
        given = self._given.section("moments").view(torch.float64).reshape(-1, 2)
        moments = torch.where(self._given.section("told") != 0, given, self._moments)
        scaled = [self._scaled(g, differences, moments[g]) for g in range(len(self.groups))]
        coefficients = [self._coefficients(g, one.gradients) for g, one in enumerate(scaled)]
        # A loss that is not finite leaves no difference that is. A divisor of 0 makes no bad step.
        pairs = zip(coefficients, scaled, strict=True)
        finite = torch.stack([c.isfinite().all() | one.is_flat for c, one in pairs]).all()
        finite = finite & wide.isfinite().all()
        finite = finite & (self._given.section("enabled")[0] != 0)
        for j, update in enumerate(self._updates):
            g = update.group
            self._set(j, coefficients[g], finite & ~scaled[g].is_flat)
            self._passes[j].run()
        after = torch.stack([one.moment for one in scaled])
        self._moments.copy_(torch.where(finite, after, moments))
        self.outcome.copy_(torch.cat([wide, finite.to(torch.float64).reshape(1)]))
        one_sided = self.estimator == "one_sided"
        self.loss.copy_(wide[0] if one_sided else mean(wide, self._losses))

    def _scaled(self, g: int, differences: torch.Tensor, moment: torch.Tensor) -> Scaled:
        eps = self._given.section("eps").view(torch.float64)[g]
        return self._scaler(differences / eps, moment)

    def _coefficients(self, g: int, gradients: torch.Tensor) -> torch.Tensor:
        factor = self._given.section("factors").view(torch.float64)[g]
        return (factor * gradients / self._count).to(torch.float32)

    def _set(self, j: int, coefficients: torch.Tensor, written: torch.Tensor) -> None:
        """The numbers of an update's pass."""
        tail = self._given.section("tail", j)
        if isinstance(self._updates[j].plan, AddNoise):
            # A pass with decay 1 and all coefficients 0 writes nothing, not even of −0.
            written = written & ((coefficients != 0).any() | (tail[0] != _ONE))
        bits = coefficients.view(torch.int32).to(torch.int64)
        parts = [self._given.section("seeds"), bits, tail, written.to(torch.int64).reshape(1)]
        self._numbers[j].copy_(torch.cat(parts))

    def _factor(self, group: dict) -> float:
        factor = -float(group["lr"]) if type(self.optimizer) is ZOSGD else 1.0
        return -factor if group["maximize"] else factor


def _word(x: float, name: str) -> int:
    return bits32(checks.binary32(checks.finite(x, name), name))


def _bits64(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]

"""Losses around the weights of an optimizer, which stays as it is, and so do its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from zokernels.optim.base import ZOOptimizer
from zokernels.optim.forward import Forward, Keeper, Losses, StepTiming, same_randomness
from zokernels.optim.groups import Chosen
from zokernels.optim.written import Kept
from zokernels.perturb import InPlace, Move, OnEntry, RandomState

# A seed and a scale; scale 0 is θ itself.
Point = tuple[int, float]


class Site:
    """The forwards of an optimizer's steps, at any point, without a step.

    Args:
        opt: The optimizer. Its modes of perturbing are used, by perturbers of the site's own.
        loss_fn: Runs a forward on a batch and returns the loss.
        told: Called after each batch with the number of forwards so far.

    Attributes:
        forwards: How many there were: one a point, also where points share one.
        groups: The param groups, each with the positions of what is trained.
    """

    def __init__(
        self,
        opt: ZOOptimizer,
        loss_fn: Callable[[Any], torch.Tensor | float],
        told: Callable[[int], None],
    ):
        self.opt, self.loss_fn, self.told = opt, loss_fn, told
        self.forwards = 0
        self.groups: Chosen = []
        self._buffers: Kept
        self._keep: Keeper
        self._devices: set[torch.device] = set()

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Around all forwards: what they or the drawing of batches change is put back at the end.

        Raises:
            RuntimeError: If a step of the optimizer is under way.
        """
        opt = self.opt
        if opt._is_stepping:
            raise RuntimeError(
                "probe() was called inside of a closure of the optimizer's step; call it between "
                "two steps."
            )
        opt._is_stepping = True
        try:
            opt._look()
            self.groups = opt._chosen(None)
            trained = [g["params"][i] for g, chosen in self.groups for i in chosen]
            self._keep = opt._weights.keeper(trained)
            model = () if opt.model is None else opt.model.parameters()
            held = (p for g in opt.param_groups for p in g["params"])
            self._devices = {p.device for p in (*model, *held)}
            before = RandomState(self._devices)
            try:
                with opt._buffers.kept() as self._buffers, opt._perturbers.forwards():
                    yield
            finally:
                before.restore()
        finally:
            opt._is_stepping = False

    def part(self, wanted: set[int]) -> Chosen:
        """The param groups with the positions of those trained parameters that have these ids."""
        found = [(g, [i for i in c if id(g["params"][i]) in wanted]) for g, c in self.groups]
        return [(g, chosen) for g, chosen in found if chosen]

    def perturber(self, groups: Chosen) -> InPlace | OnEntry:
        """What perturbs these parameters: nobody else's."""
        params = [g["params"][i] for g, chosen in groups for i in chosen]
        return self.opt._perturbers.make(params, self.opt.lazy_logits)

    @contextlib.contextmanager
    def round(
        self, groups: Chosen, perturber: InPlace | OnEntry
    ) -> Iterator[Callable[[Any, Sequence[Point]], list[float]]]:
        """Yields the losses of a batch at some points; every forward of the block draws alike."""
        # What draws the next batches goes on after the block where it was.
        drawn = RandomState(self._devices)
        try:
            with same_randomness(self.opt.model, perturber.params) as replay, perturber.session():
                yield partial(self._losses, groups, perturber, replay)
        finally:
            drawn.restore()

    def _losses(
        self,
        groups: Chosen,
        perturber: InPlace | OnEntry,
        replay: Callable[[], None],
        batch: Any,
        points: Sequence[Point],
    ) -> list[float]:
        forward = Forward(lambda: self.loss_fn(batch), replay, self._buffers, self._keep)
        directions = self.opt._directions(groups)
        together = self.opt._together
        losses = Losses(forward, directions, perturber, StepTiming(), None, together)
        places = [
            ([Move((scale,))] * len(perturber.params) if scale else None, [seed], 0)
            for seed, scale in points
        ]
        # Both sides of a direction are one question.
        size, found = max(2, together), list[float]()
        for i in range(0, len(places), size):
            found += losses.of(places[i : i + size])
        self.forwards += len(points)
        self.told(self.forwards)
        return found

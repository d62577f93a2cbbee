"""Ask and tell: a step whose losses, or rewards, somebody else finds out.

A step of `ZOOptimizer` runs a closure at each of its points. Here the points are handed out as the
members of a population, and what was found of each is told. Sources: evolution strategies as an
alternative to reinforcement learning (Salimans et al., 2017); for language models EGGROLL (Sarkar
et al., 2025) and evolution strategies at scale (Qiu et al., 2025).
"""

from __future__ import annotations

from typing import Any

import torch

from zokernels.estimators import Estimate, points_of
from zokernels.optim.fitness import Fitness, numbers_of, shaped
from zokernels.optim.population import Population


class Asking:
    """What an optimizer has for a step without a closure."""

    _population: Population | None = None

    def ask(self: Any) -> Population:
        """The points at which the next step wants to know the loss.

        Of several processes each is given its part. Until `tell`, nothing has happened: asked
        again, it gives the same points.

        Returns:
            The members, to be entered one at a time, or all at once.

        Raises:
            TypeError: If the rule asks for more than losses at points that are known before.
            ValueError: If the parameters go block by block.
        """
        if not self.accumulates:
            raise TypeError(
                f"{type(self).__name__} can't ask and be told: its step looks at more than the "
                "losses of points that are known before; use opt.step(closure), or ZOSGD."
            )
        if self.param_groups[0]["blocks"] is not None:
            raise ValueError(
                "ask() was called with blocks, whose points depend on the update of the block "
                "before; use opt.step(closure), or leave blocks out."
            )
        self._refuse_inside()
        with torch.no_grad():
            self._start()
        seeds = self.parallel.share(self._seeds(None))
        points = points_of(self.param_groups[0]["estimator"], seeds)
        self._population = Population(self, points)
        return self._population

    def tell(self: Any, losses: Any, *, fitness: Fitness = None) -> torch.Tensor:
        """Make the step that ``step(closure)`` would have made from these numbers.

        Args:
            losses: One number a member, in the order of `ask`: a list or a tensor. Rewards, with
                ``maximize=True``.
            fitness: What stands for them: ``"centered_rank"``, their rank among all members from −½
                to ½; or a function from the list of all members' numbers to as many. A step in
                which one is not finite is none, as in `step`.

        Returns:
            What `step` returns, of the numbers that were told.

        Raises:
            RuntimeError: If nothing was asked for, or ``eps`` or another setting of the points is
                not what it was then.
            ValueError: If there is not one number a member.
            FloatingPointError: As in `step`.
        """
        population = self._population
        if population is None:
            raise RuntimeError(
                "tell() was called with nothing asked for; call opt.ask(), look at its members, "
                "and tell what was found."
            )
        own = numbers_of(losses, len(population))
        self._refuse_inside()
        population.check_asked()
        estimator, seeds = self.param_groups[0]["estimator"], self._seeds(None)
        with torch.no_grad():
            parts = self.parallel.join(lambda _: own, seeds, self)
            told = Estimate.of(estimator, seeds, parts)
            found = Estimate.of(estimator, seeds, shaped(fitness, parts)) if fitness else told
            self._scale(found, self._chosen(None), None)
            if found.is_finite:
                self._apply(found, None)
            found.loss = told.loss
            self._population = None
            # What torch's schedulers look at, to warn of a rate that was never used.
            self._opt_called = True
            loss = self._finish([found])
        device = losses.device if isinstance(losses, torch.Tensor) else "cpu"
        return torch.tensor(loss, dtype=torch.float32, device=device)

    def _refuse_inside(self: Any) -> None:
        """Raise RuntimeError inside of a closure, or inside of a member's block."""
        open_ones = self._population is not None and any(
            one._open is not None for one in (self._population, *self._population.members)
        )
        if self._is_stepping or open_ones:
            raise RuntimeError(
                "Steps, ask(), tell() and members take turns: this was called inside of a member's "
                "block, or of a step's closure; leave it first."
            )

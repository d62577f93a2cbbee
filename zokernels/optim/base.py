"""What every zeroth-order optimizer shares: groups, seeds, forwards, and refusing bad losses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from zokernels import masks
from zokernels.backends import shards
from zokernels.backends.tracer import untraced
from zokernels.estimators import (
    ROUNDING,
    Estimate,
    Point,
    derive_seed,
    losses_along,
    mean,
    scale,
)
from zokernels.optim import signal, sparse
from zokernels.optim.accumulation import Batches
from zokernels.optim.asking import Asking
from zokernels.optim.construction import Constructed
from zokernels.optim.forward import (
    Closure,
    Forward,
    Losses,
    StepTiming,
    check_closure,
    same_randomness,
)
from zokernels.optim.groups import Chosen, check_group, join_masks, moment_of
from zokernels.optim.world import World, check_states, take_over
from zokernels.perturb import Direction, Move

LossOf = Callable[[Sequence[Move] | None, Sequence[int], int], float]


class ZOOptimizer(Asking, Constructed):
    """Base of the zeroth-order optimizers: forward passes only, no ``.grad``.

    Args:
        params: A module (its trainable parameters), ``module.parameters()`` (all of them, of which
            a step moves those that are trainable), other parameters, or param groups.
        lr: Learning rate η ≥ 0.
        eps: Scale ε > 0 of the perturbation.
        num_queries: Directions a step, q ≥ 1.
        estimator: ``"two_sided"``: central differences, 2q forwards; ``"one_sided"``: forward
            differences, q + 1; ``"population"``: q ≥ 2 members around their own mean, q forwards.
        normalize: ``"std"``: divide a step's dₖ by their standard deviation, q ≥ 2; ``"ema"``: by
            the root of the running mean of d². Either way ε and the loss's scale cancel, and a
            step whose divisor is exactly 0 is none.
        clip: Cut each |dₖ| at so many roots of the running mean of d², this step's included.
        dist: Directions, ``"gaussian"``, ``"rademacher"``, or ``"rank1"``, of which a forward needs
            two vectors a matrix and no weights of its own.
        mask: What may be perturbed and updated, one of `zokernels.masks`.
        sparsity: Share s of the weights to leave out, by the rule of `zokernels.optim.sparse`: more
            of a tensor the smaller its weights are now. Instead of ``mask``.
        resample_every: Draw the mask of ``sparsity`` again every so many steps.
        blocks: Perturb one block of parameters after the other, each with its own noise, and update
            each from its own losses: ``"layer"`` (embeddings, each layer, head), ``"module"``, a
            list of lists of parameters, or a function from a parameter's name to its block's label.
        block_order: ``"sequential"``: a block is updated before the next one is perturbed;
            ``"simultaneous"``: all are estimated at the same weights, and then updated.
        rounding: Of the update of 16-bit weights, ``"nearest"`` or ``"stochastic"``.
        weight_decay: Decoupled: the weights shrink by the factor 1 − η · weight_decay.
        maximize: Step up instead of down.
        seed: Seed of the run. Step t's directions follow from (seed, t, query).
        perturb: ``"on_entry"`` (default for a module: memory of the largest layer), ``"paired"``
            (several points in one forward: faster, so many times the activations) or
            ``"in_place"`` (default for parameters: a copy of the trainable weights).
        points: Of ``"paired"``: how many points share a forward, at least 2, or ``"all"`` of the
            step: both sides of every query, or a whole population.
        lazy_logits: Make a language model's logits only where the loss looks at them; not in place.
        backend: As for `zokernels.ops.add_noise_`.
        max_bad_steps: Raise after this many steps in a row with a loss that was not finite.
        parallel: What several processes divide: ``"auto"`` or ``"data"`` (the batch), ``"query"``
            (the directions), or both, by a `zokernels.Distributed`; None: nothing.
        model: The module, where ``params`` are groups of its parameters.
        rule_defaults: For authors of rules: the rule's own defaults of a param group.

    Attributes:
        projected_gradients: The dₖ of the last step, before ``normalize`` and ``clip``, as Python
            floats, block after block.
        timing: Where the last step's time went.
        signal: How much of the last step's slopes is the gradient and how much is by chance, where
            the closure gives a loss an example; else None.
        bad_steps: Steps in a row whose loss was not finite; they change no weight.
        flat_steps: Steps so far whose differences were all exactly 0, or with ``normalize`` all
            alike; five in a row are told of.

    Raises:
        TypeError: If a trainable parameter has a type that no pass takes.
        ValueError: If an argument is out of range, or a trainable parameter can't be written.
    """

    @untraced
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> torch.Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: Runs a forward and returns the loss: a scalar, or one number an example, of
                which the mean is the loss and `signal` is read. It is called 2q times
                (two-sided), q + 1 times (one-sided) or q times (population), each time on the same
                batch, or this process's share.

        Returns:
            The mean of the losses, or one-sided the base loss: a detached scalar. In accelerate's
            ``accumulate`` that of the batches so far, of which the last one's call moves weights.

        Raises:
            ValueError: If there is no closure, or it returns no loss, or one of another shape; or
                nothing that the optimizer holds is trainable.
            TypeError: If it is no function.
            RuntimeError: If it calls backward, or a parameter that is trained has left the model.
            TrajectoryError: If the trajectory cannot take the record. The step is done, and the
                record is written by the next one.
            FloatingPointError: After ``max_bad_steps`` steps in a row with a loss that is not
                finite. The weights are those of the last good step.
        """
        closure = check_closure(closure)
        if self._is_stepping:
            raise RuntimeError(
                "step() was called inside of its own closure, or by two threads at a time; take "
                "one step after the other, or make another optimizer."
            )
        self._refuse_inside()
        self._is_stepping = True
        try:
            return self._step(closure)
        finally:
            self._is_stepping = False

    def _step(self, closure: Closure) -> torch.Tensor:
        params = self._start()
        in_blocks = self.param_groups[0]["blocks"] is not None
        forwards = self._perturbers.forwards(in_blocks)
        alike = same_randomness(self.model, params)
        with self._buffers.kept() as buffers, alike as replay_random, forwards:
            forward = Forward(closure, replay_random, buffers, self._weights.keeper(params))
            self._batches.has_more = self._is_partial(in_blocks)
            if self._batches.has_more:
                return forward.tensor(self._estimate(forward, None).loss)
            found = self._sweep(forward)
        group = self.param_groups[0]
        if forward.rows:
            eps = float(group["eps"])
            self.signal = signal.read(found, group["estimator"], eps, forward.rows)
        return forward.tensor(self._finish(found))

    def _start(self) -> list[nn.Parameter]:
        """A step begins, with the world as it is now; gives the parameters that it trains."""
        self._started = time.perf_counter()
        self.timing = StepTiming()
        self.projected_gradients = []
        self._base_loss = self._population = self.signal = None
        self._look()
        sparse.redraw(self.param_groups)
        self.parallel.check(self)
        params = [g["params"][i] for g, chosen in self._chosen(None) for i in chosen]
        self._begin(params)
        if self.trajectory:
            self.trajectory.begin(self.param_groups[0]["step"])
        return params

    def _finish(self, found: list[Estimate]) -> float:
        """A step is done: count it, record it, and give its loss."""
        group = self.param_groups[0]
        self._batches = Batches()
        self._count_flat(found)
        if all(one.is_finite for one in found):
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            self.projected_gradients = [math.nan] * group["num_queries"] * len(self._blocks())
        number = group["step"]
        for g in self.param_groups:
            g["step"] = number + 1
        if self.trajectory:
            self.trajectory.write(number, self.bad_steps > 0, self._moments())
        self.timing.total = time.perf_counter() - self._started
        if self.bad_steps >= self.max_bad_steps:
            raise FloatingPointError(
                f"The loss was not finite in {self.bad_steps} steps in a row (the last losses: "
                f"{found[-1].losses}), so no weight was changed in them; lower lr or eps, or look "
                "at the data, or at what makes the numbers that tell() gets."
            )
        return mean([one.loss for one in found])

    def _look(self) -> None:
        """Read the model and the param groups as they are: what the whole step goes by.

        Raises:
            RuntimeError: If what is trained has left the model, or outgrown its state.
            TrajectoryError: If weights were replaced that the trajectory can't know.
            ValueError: If nothing is trainable, or the mode asked for can't work any more.
        """
        # What is gathered for a forward stands in the place of the parameters.
        shards.settle(self.model)
        optimizers, before = self._optimizers(), self._world
        world = World.read(optimizers, self.model)
        swaps = world.swaps_since(before)
        check_states(optimizers, swaps, before, world)
        if self.trajectory:
            self.trajectory.check([(swap.name, swap.new) for swap in swaps])
        if swaps:
            take_over(optimizers, swaps)
            world = World.read(optimizers, self.model)
        world.check_anything_is_trained()
        for group in self.param_groups:
            check_group(group)
        world.tell_of_thawed(before)
        if not world.is_as(before):
            self._forget()
        self._world = world
        self.perturb = self._perturbers.choose(self._wanted)

    def _forget(self) -> None:
        """Drop what was made for the model as it was."""
        self._perturbers.clear()
        self._weights.forget()

    def _sweep(self, forward: Forward) -> list[Estimate]:
        """Every block's estimate, and its update: at once, or when all of them are known."""
        blocks, found = self._blocks(), []
        at_once = self.param_groups[0]["block_order"] == "sequential"
        whole = contextlib.nullcontext()
        with whole if blocks == [None] else self._perturbers.prefix.step(forward):
            for block in blocks:
                found.append(self._estimate(forward, block))
                # What is not finite ends the step: this block and those after it stay.
                if not found[-1].is_finite:
                    return found
                if at_once:
                    self._apply(found[-1], block)
        if not at_once:
            for one, block in zip(found, blocks, strict=True):
                self._apply(one, block)
        return found

    def _estimate(self, forward: Forward, block: int | None) -> Estimate:
        groups = self._chosen(block)
        eps = [float(g["eps"]) for g, chosen in groups for _ in chosen]
        with self._losses(forward, block, groups) as losses:

            def losses_at(points: Sequence[Point]) -> list[float]:
                sides = [
                    ([Move((side * e,)) for e in eps] if side else None, [seed], 0)
                    for seed, side in points
                ]
                return self._batches.mean(points, losses.of(sides))

            estimator = self.param_groups[0]["estimator"]

            def along(seeds: list[int]) -> list[float]:
                to_the_end = self.parallel.ranks > 1
                return losses_along(losses_at, estimator, seeds, losses.together, to_the_end)

            seeds = self._seeds(block)
            found = Estimate.of(estimator, seeds, self.parallel.join(along, seeds, self))
            self._scale(found, groups, block)
            if found.is_finite:
                loss_of = self.parallel.agreed(lambda *point: losses.of([point])[0], self)
                self._judge(found, loss_of, groups)
        return found

    def _scale(
        self,
        found: Estimate,
        groups: Chosen,
        block: int | None,
        scales: Sequence[float] | None = None,
    ) -> None:
        """What enters the update of each group, by its ε; nothing of losses that are not finite."""
        scales = scales or [float(group["eps"]) for group, _ in groups]
        for (group, _), eps in zip(groups, scales, strict=True) if found.is_finite else ():
            slopes = [d / eps for d in found.differences]
            before = moment_of(group, block)
            gradients, moment = scale(slopes, group["normalize"], group["clip"], before)
            found.gradients.append(gradients)
            found.moments.append(moment)

    def _keep_moments(self, found: Estimate, groups: Chosen, block: int | None) -> None:
        """The step is made: the running means go on from here."""
        for (group, _), moment in zip(groups, found.moments, strict=True):
            if moment.weight:
                # Anew each time: a state_dict taken before holds the old one.
                group["moments"] = {**group["moments"], block or 0: list(moment)}

    def _seeds(self, block: int | None) -> list[int]:
        group = self.param_groups[0]
        return [
            derive_seed(group["seed"], group["step"], k, block=block or 0)
            for k in range(group["num_queries"])
        ]

    def _directions(self, groups: Chosen) -> Callable[..., Direction]:
        """Makes a direction of moves and seeds: all of it that is the same for a step's points."""
        return partial(
            Direction,
            [g["params"][i] for g, chosen in groups for i in chosen],
            [g["streams"][i] for g, chosen in groups for i in chosen],
            dist=self.param_groups[0]["dist"],
            mask=join_masks(groups),
            backend=self.backend,
        )

    @contextlib.contextmanager
    def _losses(
        self, forward: Callable[..., Any], block: int | None, groups: Chosen
    ) -> Iterator[Losses]:
        params = [g["params"][i] for g, chosen in groups for i in chosen]
        directions = self._directions(groups)

        def run(perturbed: list[nn.Parameter]) -> torch.Tensor | float:
            at = partial(forward, perturbed)
            return at() if block is None else self._perturbers.prefix.run(at, perturbed)

        perturber = self._perturbers.of(params)
        with perturber.session():
            together = self._together if block is None else 1
            losses = Losses(run, directions, perturber, self.timing, self._base_loss, together)
            yield losses
            self._base_loss = losses.base

    def _judge(self, found: Estimate, loss_of: LossOf, groups: Chosen) -> None:
        """Look at further points of the same batch before the update; most rules need none.

        Args:
            found: The estimate, whose ``side`` may be set; a loss that is not finite, added to its
                losses, makes a bad step.
            loss_of: ``loss_of(moves, seeds, rounding_seed)``: the loss with each parameter of
                ``groups`` moved; ``moves=None`` is θ itself.
            groups: The groups, each with the positions of what the estimate is for.
        """

    def _apply(self, found: Estimate, block: int | None) -> None:
        before = time.perf_counter()
        groups = self._chosen(block)
        first = float(groups[0][0]["eps"])
        self.projected_gradients += [d / first for d in found.differences]
        self._keep_moments(found, groups, block)
        for (group, chosen), gradients in zip(groups, found.gradients, strict=True):
            if gradients is None or not found.side:
                continue
            with self._listening():
                self._update(group, chosen, found.seeds, [found.side * d for d in gradients])
            self._base_loss = None
            if block is not None:
                self._perturbers.prefix.forget([group["params"][i] for i in chosen])
        self.timing.update += time.perf_counter() - before

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        """Apply the rule to the chosen parameters of a group."""
        raise NotImplementedError

    def _pass_options(self, group: dict, chosen: list[int]) -> dict[str, Any]:
        """Keywords of the pass that updates the chosen parameters: the same for every rule."""
        return dict(
            streams=[group["streams"][i] for i in chosen],
            dist=group["dist"],
            mask=masks.take(masks.from_plain(group["mask"]), chosen),
            decay=1.0 - float(group["lr"]) * group["weight_decay"],
            rounding=group["rounding"],
            rounding_seed=self._rounding_seed(),
            backend=self.backend,
        )

    def _rounding_seed(self) -> int:
        first = self.param_groups[0]
        return derive_seed(first["seed"], first["step"], 0, ROUNDING)

    def _blocks(self) -> list[int] | list[None]:
        """The numbers of the blocks with trainable parameters; [None] if there are no blocks."""
        if self.param_groups[0]["blocks"] is None:
            return [None]
        return sorted({g["blocks"][i] for g, chosen in self._chosen(None) for i in chosen})

    def _chosen(self, block: int | None) -> Chosen:
        """The groups with parameters that the step trains in a block, and their positions."""
        found = [
            (g, [i for i in trained if block is None or g["blocks"][i] == block])
            for g, trained in zip(self.param_groups, self._world.trainable, strict=False)
        ]
        return [(g, chosen) for g, chosen in found if chosen]

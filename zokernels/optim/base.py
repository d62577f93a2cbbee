"""What every zeroth-order optimizer shares: groups, seeds, forwards, and refusing bad losses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zokernels import blocks as partitions
from zokernels import masks as mask_types
from zokernels import noise
from zokernels.estimators import ROUNDING, Estimate, derive_seed, estimate
from zokernels.optim.forward import Closure, Forward, same_randomness
from zokernels.perturb import Direction, InPlace, OnEntry, choose_mode
from zokernels.prefix import Prefix

LossAt = Callable[[int, float], float]


@dataclass
class StepTiming:
    """Seconds of the last step: forwards without the noise made in them, noise, update, all."""

    forwards: float = 0.0
    noise: float = 0.0
    update: float = 0.0
    total: float = 0.0


class ZOOptimizer(torch.optim.Optimizer):
    """Base of the zeroth-order optimizers: forward passes only, no ``.grad``.

    Args:
        params: A module (its trainable parameters), parameters, or param groups.
        lr: Learning rate η ≥ 0.
        eps: Scale ε > 0 of the perturbation.
        num_queries: Directions a step, q ≥ 1.
        two_sided: Central difference, 2q forwards; otherwise forward difference, q + 1.
        dist: Directions, ``"gaussian"`` or ``"rademacher"``.
        mask: What may be perturbed and updated, one of `zokernels.masks`.
        blocks: Perturb one block of parameters after the other, each with its own noise, and update
            each from its own losses: ``"layer"`` (embeddings, each layer, head), ``"module"``, a
            list of lists of parameters, or a function from a parameter's name to its block's label.
        block_order: ``"sequential"``: a block is updated before the next one is perturbed;
            ``"simultaneous"``: all are estimated at the same weights, and then updated.
        rounding: Of the update of 16-bit weights, ``"nearest"`` or ``"stochastic"``.
        weight_decay: Decoupled: the weights shrink by the factor 1 − η · weight_decay.
        maximize: Step up instead of down.
        seed: Seed of the run. Step t's directions follow from (seed, t, query).
        perturb: ``"on_entry"`` (default for a module: memory of the largest layer) or
            ``"in_place"`` (default for parameters: a copy of the trainable weights).
        backend: As for `zokernels.ops.add_noise_`.
        max_bad_steps: Raise after this many steps in a row with a loss that was not finite.
        model: The module, where ``params`` are groups of its parameters.

    Attributes:
        projected_gradients: The dₖ of the last step, as Python floats, block after block.
        timing: Where the last step's time went.
        bad_steps: Steps in a row whose loss was not finite; they change no weight.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        num_queries: int = 1,
        two_sided: bool = True,
        dist: str = "gaussian",
        mask: mask_types.Mask | None = None,
        blocks: partitions.Blocks = None,
        block_order: str = "sequential",
        rounding: str = "nearest",
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
        perturb: str | None = None,
        backend: str | None = None,
        max_bad_steps: int = 10,
        model: nn.Module | None = None,
    ):
        self.model = params if isinstance(params, nn.Module) else model
        self.perturb = choose_mode(self.model, perturb)
        self.backend = backend
        self.max_bad_steps = max_bad_steps
        self.projected_gradients: list[float] = []
        self.timing = StepTiming()
        self.bad_steps = 0
        self._last_stream = -1
        self._numbers: dict[int, int] = {}
        self._perturbers: dict[tuple[int, ...], InPlace | OnEntry] = {}
        self._prefix: Prefix | None = None
        # L(θ) on the step's batch, until a weight changes.
        self._base_loss: float | None = None
        if self.model is not None:
            self._numbers = {id(p): i for i, p in enumerate(self.model.parameters())}
        if isinstance(params, nn.Module):
            params = [p for p in params.parameters() if p.requires_grad]
            if not params:
                raise ValueError(
                    "The module has no trainable parameter: every one has requires_grad=False; "
                    "unfreeze some."
                )
        defaults = dict(
            lr=lr,
            eps=eps,
            num_queries=num_queries,
            two_sided=two_sided,
            dist=dist,
            mask=mask,
            blocks=blocks,
            block_order=block_order,
            rounding=rounding,
            weight_decay=weight_decay,
            maximize=maximize,
            seed=seed,
            step=0,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters; their streams continue the count, or are their places in the module."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            if not isinstance(group["mask"], dict):
                mask_types.resolve(group["mask"], group["params"])
                group["mask"] = mask_types.to_plain(group["mask"])
            if group["blocks"] is not None:
                group["blocks"] = partitions.number(group["blocks"], self.model, group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        streams = []
        for p in group["params"]:
            self._last_stream = self._numbers.get(id(p), self._last_stream + 1)
            streams.append(self._last_stream)
        if self._numbers:
            self._last_stream = max(self._last_stream, len(self._numbers) - 1)
        group["streams"] = streams
        # A group that joins a run goes on where the others are.
        first = self.param_groups[0]
        for name in ("seed", "step", "num_queries", "two_sided", "block_order"):
            group[name] = first[name]
        self._perturbers.clear()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> torch.Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: Runs a forward and returns the loss, a scalar. It is called 2q times
                (two-sided) or q + 1 times, on the same batch each time.

        Returns:
            The mean of L₊ and L₋, or one-sided the base loss: a detached scalar.

        Raises:
            ValueError: If there is no closure, or its loss is not a scalar.
            FloatingPointError: After ``max_bad_steps`` steps in a row with a loss that is not
                finite. The weights are those of the last good step.
        """
        if closure is None:
            raise ValueError(
                "step() got no closure, but the loss is evaluated at several points; pass a "
                "function that runs the forward and returns the loss: "
                "opt.step(lambda: model(**batch).loss)."
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step() runs inside torch.inference_mode, where weights can't be updated; use "
                "torch.no_grad instead, or nothing."
            )
        started = time.perf_counter()
        self.timing = StepTiming()
        self.projected_gradients = []
        self._base_loss = None
        group = self.param_groups[0]
        params = [g["params"][i] for g in self.param_groups for i in _trainable(g)]
        with same_randomness(self.model, params) as replay_random:
            forward = Forward(closure, replay_random)
            found = self._sweep(forward)
        if all(one.is_finite for one in found):
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            self.projected_gradients = [math.nan] * group["num_queries"] * len(self._blocks())
        for g in self.param_groups:
            g["step"] = group["step"] + (1 if g is group else 0)
        self.timing.total = time.perf_counter() - started
        if self.bad_steps >= self.max_bad_steps:
            raise FloatingPointError(
                f"The loss was not finite in {self.bad_steps} steps in a row (the last losses: "
                f"{found[-1].losses}), so no weight was changed in them; lower lr or eps, or look "
                "at the data."
            )
        loss = sum(one.loss for one in found) / len(found)
        return torch.tensor(loss, dtype=forward.kind.dtype, device=forward.kind.device)

    def _sweep(self, forward: Forward) -> list[Estimate]:
        """Every block's estimate, and its update: at once, or when all of them are known."""
        blocks, found = self._blocks(), []
        at_once = self.param_groups[0]["block_order"] == "sequential"
        with self._get_prefix().step(forward) if blocks != [None] else contextlib.nullcontext():
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
        with self._evaluator(forward, block) as loss_at:
            return estimate(loss_at, self._seeds(block), self.param_groups[0]["two_sided"])

    def _seeds(self, block: int | None) -> list[int]:
        group = self.param_groups[0]
        return [
            derive_seed(group["seed"], group["step"], k, block=block or 0)
            for k in range(group["num_queries"])
        ]

    @contextlib.contextmanager
    def _evaluator(self, forward: Callable[[], Any], block: int | None) -> Iterator[LossAt]:
        """Yields the loss as a function of (seed, side): at θ + side · εz of a block, or of all."""
        groups = [(g, _trainable(g, block)) for g in self.param_groups]
        params = [g["params"][i] for g, chosen in groups for i in chosen]
        streams = [g["streams"][i] for g, chosen in groups for i in chosen]
        eps = [float(g["eps"]) for g, chosen in groups for _ in chosen]
        perturber = self._get_perturber(params)
        mask = _join_masks([(g, chosen) for g, chosen in groups if chosen])
        dist = self.param_groups[0]["dist"]

        def run(perturbed: list[nn.Parameter]) -> float:
            if block is None:
                return float(forward())
            return float(self._get_prefix().run(forward, perturbed))

        def loss_at(seed: int, side: float) -> float:
            before, noise_before = time.perf_counter(), perturber.seconds
            if side == 0:
                if self._base_loss is None:
                    self._base_loss = run([])
                loss = self._base_loss
            else:
                scales = [side * e for e in eps]
                at = Direction(params, streams, scales, seed, dist, mask, self.backend)
                if isinstance(perturber, OnEntry):
                    loss = perturber.run(at, lambda: run(params))
                else:
                    with perturber.at(at):
                        loss = run(params)
            noise_time = perturber.seconds - noise_before
            self.timing.noise += noise_time
            self.timing.forwards += time.perf_counter() - before - noise_time
            return loss

        with perturber.session():
            yield loss_at

    def _apply(self, found: Estimate, block: int | None) -> None:
        before = time.perf_counter()
        groups = [(g, _trainable(g, block)) for g in self.param_groups]
        eps = [float(g["eps"]) for g, chosen in groups if chosen]
        self.projected_gradients += [d / eps[0] for d in found.differences]
        for group, chosen in groups:
            if chosen:
                gradients = [d / float(group["eps"]) for d in found.differences]
                self._update(group, chosen, found.seeds, gradients)
                if block is not None:
                    self._get_prefix().forget([group["params"][i] for i in chosen])
        self._base_loss = None
        self.timing.update += time.perf_counter() - before

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        """Apply the rule to the chosen parameters of a group."""
        raise NotImplementedError

    def _rounding_seed(self) -> int:
        first = self.param_groups[0]
        return derive_seed(first["seed"], first["step"], 0, ROUNDING)

    def _blocks(self) -> list[int] | list[None]:
        """The numbers of the blocks with trainable parameters; [None] if there are no blocks."""
        if self.param_groups[0]["blocks"] is None:
            return [None]
        return sorted({g["blocks"][i] for g in self.param_groups for i in _trainable(g)})

    def _get_prefix(self) -> Prefix:
        if self._prefix is None:
            self._prefix = Prefix(self.model)
        return self._prefix

    def _get_perturber(self, params: list[nn.Parameter]) -> InPlace | OnEntry:
        key = tuple(map(id, params))
        if key not in self._perturbers:
            self._perturbers[key] = self._make_perturber(params)
        return self._perturbers[key]

    def _make_perturber(self, params: list[nn.Parameter]) -> InPlace | OnEntry:
        if self.perturb == "on_entry":
            assert self.model is not None
            return OnEntry(self.model, params)
        return InPlace(params)


def _trainable(group: dict, block: int | None = None) -> list[int]:
    """The positions of a group's trainable parameters, of one block or of all."""
    return [
        i
        for i, p in enumerate(group["params"])
        if p.requires_grad and (block is None or group["blocks"][i] == block)
    ]


def _join_masks(groups: list[tuple[dict, list[int]]]) -> mask_types.Mask | None:
    """One mask over the trainable parameters of all groups."""
    if len({str(g["mask"] and g["mask"]["kind"]) for g, _ in groups}) > 1:
        raise ValueError(
            "The param groups have masks of different kinds, but a step perturbs all of them "
            "together; give all groups the same kind of mask."
        )
    taken = [(mask_types.take(mask_types.from_plain(g["mask"]), c), len(c)) for g, c in groups]
    return mask_types.concatenate(taken)


def _check_group(group: dict) -> None:
    for name in ("lr", "weight_decay"):
        value = float(group[name])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, but it must be a finite number of at least 0.")
    if not (math.isfinite(float(group["eps"])) and float(group["eps"]) > 0):
        raise ValueError(f"eps is {group['eps']}, but it must be a finite number above 0.")
    if not isinstance(group["num_queries"], int) or group["num_queries"] < 1:
        raise ValueError(f"num_queries is {group['num_queries']!r}, but it must be at least 1.")
    if group["dist"] not in noise.KINDS:
        raise ValueError(
            f"dist is {group['dist']!r}, but it must be one of {', '.join(noise.KINDS)}."
        )
    if group["rounding"] not in ("nearest", "stochastic"):
        raise ValueError(
            f"rounding is {group['rounding']!r}, but it must be 'nearest' or 'stochastic'."
        )
    if group["block_order"] not in partitions.ORDERS:
        raise ValueError(
            f"block_order is {group['block_order']!r}, but it must be one of "
            f"{', '.join(partitions.ORDERS)}."
        )
    noise.check_address(0, group["seed"], 0, 0)

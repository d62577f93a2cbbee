"""What every zeroth-order optimizer shares: groups, seeds, forwards, and refusing bad losses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from zokernels import masks as mask_types
from zokernels import noise
from zokernels.estimators import ROUNDING, Estimate, derive_seed, estimate
from zokernels.optim.recording import Recorded
from zokernels.perturb import Direction, InPlace, OnEntry, choose_mode

Closure = Callable[[], torch.Tensor | float]


@dataclass
class StepTiming:
    """Seconds of the last step: forwards without the noise made in them, noise, update, all."""

    forwards: float = 0.0
    noise: float = 0.0
    update: float = 0.0
    total: float = 0.0


class ZOOptimizer(Recorded, torch.optim.Optimizer):
    """Base of the zeroth-order optimizers: forward passes only, no ``.grad``.

    Args:
        params: A module (its trainable parameters), parameters, or param groups.
        lr: Learning rate η ≥ 0.
        eps: Scale ε > 0 of the perturbation.
        num_queries: Directions a step, q ≥ 1.
        two_sided: Central difference, 2q forwards; otherwise forward difference, q + 1.
        dist: Directions, ``"gaussian"`` or ``"rademacher"``.
        mask: What may be perturbed and updated, one of `zokernels.masks`.
        rounding: Of the update of 16-bit weights, ``"nearest"`` or ``"stochastic"``.
        weight_decay: Decoupled: the weights shrink by the factor 1 − η · weight_decay.
        maximize: Step up instead of down.
        seed: Seed of the run. Step t's directions follow from (seed, t, query).
        perturb: ``"on_entry"`` (default for a module: memory of the largest layer) or
            ``"in_place"`` (default for parameters: a copy of the trainable weights).
        backend: As for `zokernels.ops.add_noise_`.
        max_bad_steps: Raise after this many steps in a row with a loss that was not finite.

    Attributes:
        projected_gradients: The dₖ of the last step, as Python floats.
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
        rounding: str = "nearest",
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
        perturb: str | None = None,
        backend: str | None = None,
        max_bad_steps: int = 10,
    ):
        self.model = params if isinstance(params, nn.Module) else None
        self.perturb = choose_mode(self.model, perturb)
        self.backend = backend
        self.max_bad_steps = max_bad_steps
        self.projected_gradients: list[float] = []
        self.timing = StepTiming()
        self.bad_steps = 0
        self._last_stream = -1
        self._numbers: dict[int, int] = {}
        self._perturber: InPlace | OnEntry | None = None
        if self.model is not None:
            named = list(self.model.parameters())
            self._numbers = {id(p): i for i, p in enumerate(named)}
            params = [p for p in named if p.requires_grad]
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
            rounding=rounding,
            weight_decay=weight_decay,
            maximize=maximize,
            seed=seed,
            step=0,
        )
        super().__init__(params, defaults)  # type: ignore[arg-type]

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters; their streams continue the count, or are their places in the module."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            if not isinstance(group["mask"], dict):
                mask_types.resolve(group["mask"], group["params"])
                group["mask"] = mask_types.to_plain(group["mask"])
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
        for name in ("seed", "step", "num_queries", "two_sided"):
            group[name] = first[name]
        self._perturber = None

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
            TrajectoryError: If the trajectory cannot take the record. The step is done, and the
                record is written by the next one.
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
        group = self.param_groups[0]
        seeds = [derive_seed(group["seed"], group["step"], k) for k in range(group["num_queries"])]
        found, kind = self._forwards(closure, seeds, group["two_sided"])
        if found.is_finite:
            self.bad_steps = 0
            before = time.perf_counter()
            with self._listening():
                self._apply(found)
            self.timing.update = time.perf_counter() - before
        else:
            self.bad_steps += 1
            self.projected_gradients = [math.nan] * len(seeds)
        number = group["step"]
        for g in self.param_groups:
            g["step"] = number + 1
        if self.trajectory:
            self.trajectory.write(number, skipped=not found.is_finite)
        self.timing.total = time.perf_counter() - started
        if self.bad_steps >= self.max_bad_steps:
            raise FloatingPointError(
                f"The loss was not finite in {self.bad_steps} steps in a row (the last losses: "
                f"{found.losses}), so no weight was changed in them; lower lr or eps, or look at "
                "the data."
            )
        return torch.tensor(found.loss, dtype=kind.dtype, device=kind.device)

    def _forwards(
        self, closure: Closure, seeds: list[int], two_sided: bool
    ) -> tuple[Estimate, torch.Tensor]:
        groups = [(g, _trainable(g)) for g in self.param_groups]
        params = [g["params"][i] for g, chosen in groups for i in chosen]
        streams = [g["streams"][i] for g, chosen in groups for i in chosen]
        eps = [float(g["eps"]) for g, chosen in groups for _ in chosen]
        perturber = self._get_perturber(params)
        mask = _join_masks(groups)
        dist = self.param_groups[0]["dist"]
        kind = torch.zeros((), dtype=torch.float32)

        def forward() -> float:
            nonlocal kind
            replay_random()
            loss = closure()
            if isinstance(loss, torch.Tensor):
                if loss.numel() != 1:
                    raise ValueError(
                        f"The closure returned a tensor of shape {tuple(loss.shape)}, but the "
                        "loss must be a scalar; take its mean."
                    )
                wide = loss.dtype if loss.dtype is torch.float64 else torch.float32
                kind = loss.detach().to(wide)
            return float(loss)

        def loss_at(seed: int, side: float) -> float:
            before, noise_before = time.perf_counter(), perturber.seconds
            if side == 0:
                loss = forward()
            else:
                scales = [side * e for e in eps]
                at = Direction(params, streams, scales, seed, dist, mask, self.backend)
                if isinstance(perturber, OnEntry):
                    loss = perturber.run(at, forward)
                else:
                    with perturber.at(at):
                        loss = forward()
            noise_time = perturber.seconds - noise_before
            self.timing.noise += noise_time
            self.timing.forwards += time.perf_counter() - before - noise_time
            return loss

        with perturber.session(), _same_randomness(self.model, params) as replay_random:
            return estimate(loss_at, seeds, two_sided), kind

    def _apply(self, found: Estimate) -> None:
        for group in self.param_groups:
            gradients = [d / float(group["eps"]) for d in found.differences]
            if group is self.param_groups[0]:
                self.projected_gradients = gradients
            chosen = _trainable(group)
            if chosen:
                self._update(group, chosen, found.seeds, gradients)

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        """Apply the rule to the chosen parameters of a group."""
        raise NotImplementedError

    def _rounding_seed(self) -> int:
        first = self.param_groups[0]
        return derive_seed(first["seed"], first["step"], 0, ROUNDING)

    def _get_perturber(self, params: list[nn.Parameter]) -> InPlace | OnEntry:
        known = self._perturber
        if known is None or [id(p) for p in known.params] != [id(p) for p in params]:
            if self.perturb == "on_entry":
                assert self.model is not None
                known = OnEntry(self.model, params)
            else:
                known = InPlace(params)
            self._perturber = known
        return known


def _trainable(group: dict) -> list[int]:
    return [i for i, p in enumerate(group["params"]) if p.requires_grad]


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
    noise.check_address(0, group["seed"], 0, 0)


@contextlib.contextmanager
def _same_randomness(
    model: nn.Module | None, params: list[nn.Parameter]
) -> Iterator[Callable[[], None]]:
    """Dropout off, buffers kept; yields a function that makes the next forward draw as the first.

    The root keeps its training flag, since trainers read it to tell training from evaluation;
    what it draws itself is replayed.
    """
    device = params[0].device if params else torch.device("cpu")
    cpu_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def replay() -> None:
        torch.set_rng_state(cpu_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)

    switched: list[nn.Module] = []
    buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    if model is not None:
        leaf = not any(True for _ in model.children())
        switched = [m for m in model.modules() if m.training and (leaf or m is not model)]
        buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]
    for m in switched:
        m.training = False
    try:
        yield replay
    finally:
        for m in switched:
            m.training = True
        for buffer, copy, version in buffers:
            if buffer._version != version:
                buffer.copy_(copy)

"""What every zeroth-order optimizer shares: groups, seeds, forwards, and refusing bad losses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zokernels import masks as mask_types
from zokernels.estimators import ROUNDING, Estimate, derive_seed, estimate
from zokernels.optim import sparse
from zokernels.optim.groups import Chosen, check_group, join_masks, trainable
from zokernels.optim.state import own_states, restore_states
from zokernels.perturb import Direction, InPlace, Move, OnEntry, choose_mode

Closure = Callable[[], torch.Tensor | float]
LossOf = Callable[[Sequence[Move] | None, Sequence[int], int], float]


# What a param group cannot have of its own, since a step perturbs all groups together.
_OF_THE_RUN = (
    "seed", "step", "num_queries", "two_sided", "sparsity", "resample_every", "threshold",
)  # fmt: skip


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
        sparsity: Share s of the weights to leave out, by the rule of `zokernels.optim.sparse`: more
            of a tensor the smaller its weights are now. Instead of ``mask``.
        resample_every: Draw the mask of ``sparsity`` again every so many steps.
        rounding: Of the update of 16-bit weights, ``"nearest"`` or ``"stochastic"``.
        weight_decay: Decoupled: the weights shrink by the factor 1 − η · weight_decay.
        maximize: Step up instead of down.
        seed: Seed of the run. Step t's directions follow from (seed, t, query).
        perturb: ``"on_entry"`` (default for a module: memory of the largest layer) or
            ``"in_place"`` (default for parameters: a copy of the trainable weights).
        backend: As for `zokernels.ops.add_noise_`.
        max_bad_steps: Raise after this many steps in a row with a loss that was not finite.
        rule_defaults: For authors of rules: the rule's own defaults of a param group.

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
        sparsity: float | None = None,
        resample_every: int | None = None,
        rounding: str = "nearest",
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
        perturb: str | None = None,
        backend: str | None = None,
        max_bad_steps: int = 10,
        rule_defaults: dict[str, Any] | None = None,
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
            sparsity=sparsity,
            resample_every=resample_every,
            threshold=None,
            rounding=rounding,
            weight_decay=weight_decay,
            maximize=maximize,
            seed=seed,
            step=0,
            **(rule_defaults or {}),
        )
        super().__init__(params, defaults)  # type: ignore[arg-type]
        if sparsity is not None:
            sparse.install(self.param_groups)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters; their streams continue the count, or are their places in the module."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            self._check_rule(group)
            if self.param_groups[0]["threshold"] is not None:
                sparse.refuse_masks([group])
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
        for name in _OF_THE_RUN:
            group[name] = first[name]
        if group["threshold"] is not None:
            sparse.mask_group(group)
        self._perturber = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; a state keeps the type it was saved in."""
        own = own_states(self)
        super().load_state_dict(state_dict)
        restore_states(self, state_dict, own)
        # What another rule or an older version did not save.
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def sparsity_report(self) -> sparse.SparsityReport:
        """What ``sparsity`` came to: the shares asked for, expected, and pruned by this mask.

        Raises:
            ValueError: If the optimizer has no ``sparsity``.
        """
        return sparse.report(self.param_groups, self.backend)

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
        group = self.param_groups[0]
        sparse.redraw(self.param_groups)
        seeds = [derive_seed(group["seed"], group["step"], k) for k in range(group["num_queries"])]
        found, kind = self._forwards(closure, seeds, group["two_sided"])
        if found.is_finite:
            self.bad_steps = 0
            before = time.perf_counter()
            self._apply(found)
            self.timing.update = time.perf_counter() - before
        else:
            self.bad_steps += 1
            self.projected_gradients = [math.nan] * len(seeds)
        for g in self.param_groups:
            g["step"] = group["step"] + (1 if g is group else 0)
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
        groups = [(g, trainable(g)) for g in self.param_groups]
        params = [g["params"][i] for g, chosen in groups for i in chosen]
        streams = [g["streams"][i] for g, chosen in groups for i in chosen]
        eps = [float(g["eps"]) for g, chosen in groups for _ in chosen]
        perturber = self._get_perturber(params)
        mask = join_masks(groups)
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

        def loss_of(
            moves: Sequence[Move] | None, seeds: Sequence[int], rounding_seed: int
        ) -> float:
            before, noise_before = time.perf_counter(), perturber.seconds
            if moves is None:
                loss = forward()
            else:
                at = Direction(
                    params, streams, moves, seeds, dist, mask, self.backend, rounding_seed
                )
                if isinstance(perturber, OnEntry):
                    loss = perturber.run(at, forward)
                else:
                    with perturber.at(at):
                        loss = forward()
            noise_time = perturber.seconds - noise_before
            self.timing.noise += noise_time
            self.timing.forwards += time.perf_counter() - before - noise_time
            return loss

        def loss_at(seed: int, side: float) -> float:
            return loss_of([Move((side * e,)) for e in eps] if side else None, [seed], 0)

        with perturber.session(), _same_randomness(self.model, params) as replay_random:
            found = estimate(loss_at, seeds, two_sided)
            if found.is_finite:
                self._judge(found, loss_of, groups)
            return found, kind

    def _judge(self, found: Estimate, loss_of: LossOf, groups: Chosen) -> None:
        """Look at further points of the same batch before the update; most rules need none.

        Args:
            found: The estimate, whose ``side`` may be set; a loss that is not finite, added to its
                losses, makes a bad step.
            loss_of: ``loss_of(moves, seeds, rounding_seed)``: the loss with each parameter of
                ``groups`` moved; ``moves=None`` is θ itself.
            groups: The groups, each with the positions of what the estimate is for.
        """

    def _apply(self, found: Estimate) -> None:
        for group in self.param_groups:
            gradients = [d / float(group["eps"]) for d in found.differences]
            if group is self.param_groups[0]:
                self.projected_gradients = gradients
            chosen = trainable(group)
            if chosen and found.side:
                self._update(group, chosen, found.seeds, [found.side * d for d in gradients])

    def _update(
        self, group: dict, chosen: list[int], seeds: list[int], gradients: list[float]
    ) -> None:
        """Apply the rule to the chosen parameters of a group."""
        raise NotImplementedError

    def _check_rule(self, group: dict) -> None:
        """Raise unless the rule's own numbers of a group are in range."""

    def _pass_options(self, group: dict, chosen: list[int]) -> dict[str, Any]:
        """Keywords of the pass that updates the chosen parameters: the same for every rule."""
        return dict(
            streams=[group["streams"][i] for i in chosen],
            dist=group["dist"],
            mask=mask_types.take(mask_types.from_plain(group["mask"]), chosen),
            decay=1.0 - float(group["lr"]) * group["weight_decay"],
            rounding=group["rounding"],
            rounding_seed=self._rounding_seed(),
            backend=self.backend,
        )

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

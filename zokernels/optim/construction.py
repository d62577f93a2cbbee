"""How an optimizer is made: its settings, groups and streams, and what it loads."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from zokernels import masks
from zokernels.backends import layouts, shards
from zokernels.distributed import Distributed, connect
from zokernels.estimators import Estimate
from zokernels.optim import blocks as partitions
from zokernels.optim import notices, sparse
from zokernels.optim.accumulation import Accumulating, Batches
from zokernels.optim.arguments import check_points, check_trainable, module_of
from zokernels.optim.buffers import Buffers
from zokernels.optim.forward import StepTiming
from zokernels.optim.groups import check_group, describe, join_run, rename
from zokernels.optim.perturbers import Perturbers
from zokernels.optim.recording import Recorded
from zokernels.optim.signal import Signal
from zokernels.optim.state import check_loadable, own_states, restore_states
from zokernels.optim.weights import Weights
from zokernels.optim.world import World
from zokernels.perturb import choose_mode

# What a copy does not take over: the log, which goes on with the original; caches, which are of its
# own parameters; and the method that a scheduler has wrapped, which steps the original.
_NOT_COPIED = {
    "trajectory", "_perturbers", "_layers", "_buffers", "_weights", "_world", "_population", "step",
}  # fmt: skip


class Constructed(Accumulating, Recorded, torch.optim.Optimizer):
    """An optimizer's settings and param groups; `zokernels.optim.base.ZOOptimizer` says which."""

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        num_queries: int = 1,
        estimator: str = "two_sided",
        normalize: str | None = None,
        clip: float | None = None,
        dist: str = "gaussian",
        mask: masks.Mask | None = None,
        sparsity: float | None = None,
        resample_every: int | None = None,
        blocks: partitions.Blocks = None,
        block_order: str = "sequential",
        rounding: str = "nearest",
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
        perturb: str | None = None,
        points: int | str = 2,
        lazy_logits: bool = True,
        backend: str | None = None,
        max_bad_steps: int = 10,
        parallel: str | Distributed | None = "auto",
        model: nn.Module | None = None,
        rule_defaults: dict[str, Any] | None = None,
    ):
        # A module may have a length, and so be false.
        found = module_of(params)
        self.model = model if found is None else found
        self.parallel = connect(parallel)
        shards.settle(self.model)
        if self.model is None and perturb is None:
            notices.of_a_list(type(self).__name__)
        self.perturb = choose_mode(self.model, perturb)
        self._wanted = perturb
        check_points(points, perturb)
        self.points = points
        self.lazy_logits = lazy_logits
        self.backend = backend
        self.max_bad_steps = max_bad_steps
        self.projected_gradients: list[float] = []
        self.timing = StepTiming()
        self.bad_steps = self.flat_steps = 0
        self._flat_in_a_row = 0
        self._has_begun = self._is_stepping = False
        self._has_told_of_flat_steps = self._has_told_of_no_step = False
        self._last_stream = -1
        self._batches = Batches()
        self.signal: Signal | None = None
        self._numbers: dict[str, int] = {}
        # L(θ) on the step's batch, until a weight changes.
        self._base_loss: float | None = None
        if self.model is not None:
            self._numbers = {n: i for i, (n, _) in enumerate(self.model.named_parameters())}
        if isinstance(params, nn.Module):
            params = [p for p in params.parameters() if p.requires_grad]
            if not params:
                raise ValueError(
                    "The module has no trainable parameter: every one has requires_grad=False; "
                    "unfreeze some."
                )
        self._own = tuple(rule_defaults or ())
        defaults = dict(
            lr=lr,
            eps=eps,
            num_queries=num_queries,
            estimator=estimator,
            normalize=normalize,
            clip=clip,
            moments={},
            dist=dist,
            mask=mask,
            sparsity=sparsity,
            resample_every=resample_every,
            threshold=None,
            blocks=blocks,
            block_order=block_order,
            rounding=rounding,
            weight_decay=weight_decay,
            maximize=maximize,
            seed=seed,
            step=0,
            **(rule_defaults or {}),
        )
        super().__init__(params, defaults)
        if sparsity is not None:
            sparse.install(self.param_groups)
        # What the first step compares the model with.
        self._world = World.read(self._optimizers(), self.model)

    @property
    def _together(self) -> int:
        """How many points share a forward."""
        if self.perturb != "paired":
            return 1
        return sys.maxsize if self.points == "all" else int(self.points)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """This one, and what else trains parts of the model in its steps."""
        return [self]

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters; their streams continue the count, or are their places in the module."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_trainable(self.model, group["params"])
            check_group(group)
            self._check_rule(group)
            params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
            trained = self._named(params)
            layouts.check_apart(trained)
            if self.model is not None and self.perturb != "in_place":
                layouts.check_known(trained, _others(self.model, params))
            if self.param_groups[0]["threshold"] is not None:
                sparse.refuse_masks([group])
            if not isinstance(group["mask"], dict):
                masks.resolve(group["mask"], group["params"])
                group["mask"] = masks.to_plain(group["mask"])
            if group["blocks"] is not None:
                group["blocks"] = partitions.number(group["blocks"], self.model, group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        named = self.model.named_parameters() if self.model is not None else ()
        names = {id(p): n for n, p in named}
        streams = []
        for p in group["params"]:
            self._last_stream = self._numbers.get(names.get(id(p), ""), self._last_stream + 1)
            streams.append(self._last_stream)
        if self._numbers:
            self._last_stream = max(self._last_stream, len(self._numbers) - 1)
        group["streams"] = streams
        join_run(group, self.param_groups[0])
        if group["threshold"] is not None:
            sparse.mask_group(group)
        self._perturbers.clear()

    @functools.cached_property
    def _perturbers(self) -> Perturbers:
        return Perturbers(self.model, self.perturb, self.lazy_logits)

    @functools.cached_property
    def _buffers(self) -> Buffers:
        return Buffers(self.model)

    @functools.cached_property
    def _weights(self) -> Weights:
        return Weights(self.model)

    @functools.cached_property
    def _world(self) -> World:
        return World.read(self._optimizers(), self.model)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, in memory or in a file, takes of it: the model and all that a step needs.

        Hooks stay behind, as those of torch's optimizers do.
        """
        if self.trajectory:
            notices.of_a_copy(type(self).__name__, self.trajectory.path)
        kept = {
            name: value
            for name, value in vars(self).items()
            if name not in _NOT_COPIED and not name.endswith("_hooks")
        }
        if callable(self.defaults["blocks"]):
            # A function that was written in place can't be pickled; what it said can.
            kept["defaults"] = {**self.defaults, "blocks": partitions.lists(self.param_groups)}
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` gave, or what a load has read."""
        super().__setstate__(state)
        # torch adds it for its own rules; to those here, and to their logs, it says nothing.
        self.defaults.pop("differentiable", None)

    def __repr__(self) -> str:
        groups = [f"Parameter Group {i}\n{describe(g)}" for i, g in enumerate(self.param_groups)]
        return "\n".join([f"{type(self).__name__} (", *groups, ")"])

    def state_dict(self) -> dict[str, Any]:
        """States, param groups, and the rule that they are of, in plain values and tensors."""
        return {**super().state_dict(), "rule": type(self).__name__}

    def _named(self, params: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters by what a message calls them."""
        named = self.model.named_parameters() if self.model is not None else ()
        names = {id(p): f"Parameter {name!r}" for name, p in named}
        return {names.get(id(p), f"params[{i}]"): p for i, p in enumerate(params)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; a state keeps the type it was saved in.

        What `ZOSGD` saved goes into the other rules too, since it has nothing of its own.

        Raises:
            ValueError: If it is another rule's, another kind of optimizer's, or of other groups.
        """
        check_loadable(self, state_dict, self._own, type(self).__name__)
        own = own_states(self)
        super().load_state_dict(state_dict)
        restore_states(self, state_dict, own)
        # What ZOSGD or an older version did not save, or saved by another name.
        for group in self.param_groups:
            rename(group)
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _begin(self, params: Sequence[torch.Tensor]) -> None:
        """A step begins: before the first one, say what there is to say of its parameters.

        Raises:
            ValueError: If some have been offloaded since.
        """
        if any(p.is_meta for p in params):
            check_trainable(self.model, list(params))
        if not self._has_begun:
            self._has_begun = True
            notices.of_first_step(self, params)

    def _count_flat(self, found: Sequence[Estimate]) -> None:
        """Count a step from which nothing was learned, and say so once where that is no chance."""
        flat = notices.is_flat(found)
        self.flat_steps += flat
        group = self.param_groups[0]
        if flat and group["normalize"] and not self._has_told_of_no_step:
            self._has_told_of_no_step = True
            notices.of_no_step(group["normalize"], float(group["eps"]))
        self._flat_in_a_row = self._flat_in_a_row + 1 if flat else 0
        if self._flat_in_a_row == notices.FLAT and not self._has_told_of_flat_steps:
            self._has_told_of_flat_steps = True
            notices.of_flat_steps(float(self.param_groups[0]["eps"]))

    def sparsity_report(self) -> sparse.SparsityReport:
        """What ``sparsity`` came to: the shares asked for, expected, and pruned by this mask.

        Raises:
            ValueError: If the optimizer has no ``sparsity``.
        """
        return sparse.report(self.param_groups, self.backend)

    def _goes_on_from(self, rule: str) -> bool:
        """Whether a run of the rule, by its name, can be gone on with."""
        return rule == "ZOSGD" or rule in [kind.__name__ for kind in type(self).__mro__]

    def _check_rule(self, group: dict) -> None:
        """Raise unless the rule's own numbers of a group are in range."""


def _others(model: nn.Module, params: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's frozen parameters and buffers, by what a message calls them."""
    trained = set(map(id, params))
    frozen = {f"parameter {n!r}": p for n, p in model.named_parameters() if id(p) not in trained}
    every = {**frozen, **{f"buffer {n!r}": b for n, b in model.named_buffers()}}
    return {
        name: t
        for name, t in every.items()
        if type(t) in (torch.Tensor, nn.Parameter) and not t.is_nested and not t.requires_grad
    }

"""How an optimizer is made: its settings, groups and streams, and what it loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zokernels import masks
from zokernels.backends import shards
from zokernels.distributed import Distributed, connect
from zokernels.optim import blocks as partitions
from zokernels.optim import sparse
from zokernels.optim.buffers import Buffers
from zokernels.optim.forward import StepTiming
from zokernels.optim.groups import check_group, join_run
from zokernels.optim.perturbers import Perturbers
from zokernels.optim.recording import Recorded
from zokernels.optim.state import own_states, restore_states
from zokernels.optim.world import World
from zokernels.perturb import choose_mode


class Constructed(Recorded, torch.optim.Optimizer):
    """An optimizer's settings and param groups; `zokernels.optim.base.ZOOptimizer` says which."""

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        num_queries: int = 1,
        two_sided: bool = True,
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
        lazy_logits: bool = True,
        backend: str | None = None,
        max_bad_steps: int = 10,
        parallel: str | Distributed | None = "auto",
        model: nn.Module | None = None,
        rule_defaults: dict[str, Any] | None = None,
    ):
        self.model = params if isinstance(params, nn.Module) else model
        self.parallel = connect(parallel)
        shards.settle(self.model)
        self.perturb = choose_mode(self.model, perturb)
        self._wanted = perturb
        self.lazy_logits = lazy_logits
        self.backend = backend
        self.max_bad_steps = max_bad_steps
        self.projected_gradients: list[float] = []
        self.timing = StepTiming()
        self.bad_steps = 0
        self._last_stream = -1
        self._numbers: dict[str, int] = {}
        self._buffers = Buffers(self.model)
        self._perturbers = Perturbers(self.model, self.perturb, lazy_logits)
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
        self._world = World.read(self._optimizers(), self.model)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """This one, and what else trains parts of the model in its steps."""
        return [self]

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

    def _check_rule(self, group: dict) -> None:
        """Raise unless the rule's own numbers of a group are in range."""

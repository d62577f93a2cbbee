"""``transformers.Trainer`` by forward passes.

The Trainer keeps its loop: schedules, callbacks, logging, evaluation, saving, resuming. The mixin
replaces what belongs to backpropagation. A training step runs as the Trainer has it, but with a
constant in place of the loss: what the loss would be of is collected, and the constant's backward
tells by which factor it counts. After a step's last micro-batch the optimizer takes its whole step
on the weighted sum: one direction for all of them, so that accumulation is exact, for every
optimizer and also for those that look at the loss again after an update. The Trainer's own call of
``optimizer.step()`` then finds nothing left to do.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer

from zokernels.estimators import forwards_of
from zokernels.hf import arguments
from zokernels.optim import ZOSGD
from zokernels.optim.base import Closure, ZOOptimizer
from zokernels.optim.groups import part


class _StepsAhead:
    """Lets an optimizer take its step before the Trainer calls ``step()``."""

    # The Trainer collects the batches of a step itself, and looks for accelerate's wrapper.
    _is_accelerate_prepared = False
    _loss: torch.Tensor | None = None

    def step_ahead(self, closure: Closure) -> torch.Tensor:
        """Take the step now; the next ``step()`` without a closure is its echo."""
        self._loss = super().step(closure)  # type: ignore[misc]
        return self._loss

    def step(self, closure: Closure | None = None) -> torch.Tensor:
        """The echo of `step_ahead`, or a step of its own where a closure is given."""
        if closure is None and self._loss is not None:
            loss, self._loss = self._loss, None
            return loss
        return super().step(closure)  # type: ignore[misc]


class ZOTrainerMixin:
    """Makes a Trainer train by forward passes; stands first among the bases.

    The optimizer and its options come by ``optimizer_cls_and_kwargs=(ZOSGD, {"eps": 1e-3})``; the
    default is `ZOSGD`. Learning rate, weight decay, seed, and `ZOAdam`'s ``betas`` and ``adam_eps``
    are those of the arguments unless given there; what of the arguments has no effect is said
    once. The logged gradient norm is the projected gradient's absolute value (for several queries
    the root of their mean square). Of several processes (torchrun, ``accelerate launch``) each
    takes its share of the batch, or with ``{"parallel": "query"}`` its share of the directions.

    Another Trainer's ``training_step`` runs for each batch, and its ``compute_loss`` is what a step
    evaluates.

    Example:
        >>> class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer): ...

    Raises:
        TypeError: If a subclass names a Trainer before the mixin, or the optimizer is none of
            this project's, or the Trainer's own training step has a loss besides ``compute_loss``.
        ValueError: If the arguments ask for loss scaling (``fp16=True``), a sharded engine, or
            several GPUs in one process.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses an order of bases in which the Trainer's own step would win."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if base is ZOTrainerMixin:
                return
            if "training_step" in vars(base) and not issubclass(base, ZOTrainerMixin):
                raise TypeError(
                    f"class {cls.__name__}: {base.__name__} comes before ZOTrainerMixin, so it "
                    "would train by backpropagation; put the mixin first: "
                    f"class {cls.__name__}(ZOTrainerMixin, {base.__name__})."
                )

    def __init__(
        self,
        *args: Any,
        optimizer_cls_and_kwargs: tuple[type[ZOOptimizer], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        # The constructors of most other Trainers have no such argument to hand on.
        if optimizer_cls_and_kwargs is not None:
            trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        arguments.refuse(trainer.args, trainer.accelerator)
        if trainer.accelerator.num_processes > 1:
            # DDP would keep memory for gradients as large as the weights.
            prepare = trainer.accelerator.prepare_model
            trainer.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)
        if trainer.optimizer is not None:
            raise TypeError(
                "optimizers got an optimizer, but this Trainer makes its own from the model, so "
                "that it can perturb layer by layer; pass "
                "optimizer_cls_and_kwargs=(ZOSGD, {'eps': 1e-3}) instead."
            )
        self._collected: list[tuple[Callable[[], torch.Tensor], float]] = []
        self._bad_steps = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer over the whole model, with no weight decay of norms and biases."""
        trainer: Any = self
        # A run that ended between two micro-batches leaves the first.
        self._collected = []
        if trainer.optimizer is None:
            target = trainer.model if model is None else model
            cls, given = _pair(trainer.optimizer_cls_and_kwargs)
            if not (isinstance(cls, type) and issubclass(cls, ZOOptimizer)):
                raise TypeError(
                    f"optimizer_cls_and_kwargs names {cls!r}, but it must be one of zokernels' "
                    "optimizers, such as ZOSGD; for others use transformers.Trainer itself."
                )
            if trainer.is_world_process_zero():
                arguments.warn(trainer.args, trainer.accelerator, cls, given)
            options = arguments.options(trainer.args, trainer.accelerator, cls, given)
            made = type(cls.__name__, (_StepsAhead, cls), {})(target, **options)
            if options["weight_decay"]:
                _decay_some(made, target, trainer.get_decay_parameter_names(target))
            trainer.optimizer = made
        return trainer.optimizer

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Collects a micro-batch; at a step's last one, takes the step.

        Returns:
            The step's loss, the mean over its two sides; zero before the last micro-batch, so
            that the sum that the Trainer keeps is the step's loss.

        Raises:
            TypeError: If the Trainer's own training step takes a loss of another function than
                ``compute_loss``.
        """
        trainer: Any = self
        with self._collecting(), torch.inference_mode(False), torch.enable_grad():
            super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if any(p.grad is not None for p in model.parameters()):
            raise self._no_way_to_the_loss()
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        collected, self._collected = self._collected, []

        def closure() -> torch.Tensor:
            return sum(factor * loss() for loss, factor in collected)  # type: ignore[return-value]

        optimizer = _inner(trainer.optimizer)
        if not isinstance(optimizer, _StepsAhead):
            raise TypeError(
                f"create_optimizer made a {type(optimizer).__name__}, but this Trainer makes its "
                "own, which takes a step on all micro-batches; leave create_optimizer as it is, "
                "and give optimizer_cls_and_kwargs=(ZOSGD, {'eps': 1e-3})."
            )
        loss = optimizer.step_ahead(closure)
        self._bad_steps += not math.isfinite(float(loss))
        return loss.to(trainer.args.device)

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        """Lets a training step compute no loss: what it would be of is collected."""
        trainer: Any = self
        own, compute_loss = vars(self).get("compute_loss"), trainer.compute_loss
        found: list[tuple[Callable[[], torch.Tensor], torch.Tensor]] = []

        def collect(
            model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
        ) -> torch.Tensor:
            if return_outputs:
                raise self._no_way_to_the_loss()

            def loss() -> torch.Tensor:
                with trainer.compute_loss_context_manager():
                    # Models may take labels out of the inputs; the next forward needs them too.
                    return compute_loss(model, copy.copy(inputs), **kwargs)

            constant = torch.zeros((), dtype=torch.float64, requires_grad=True)
            found.append((loss, constant))
            return constant.clone()

        trainer.compute_loss = collect
        try:
            yield
        finally:
            del trainer.compute_loss
            if own is not None:
                trainer.compute_loss = own
        for loss, constant in found:
            if constant.grad is None:
                raise self._no_way_to_the_loss()
            self._collected.append((loss, float(constant.grad)))
        if not found:
            raise self._no_way_to_the_loss()

    def _no_way_to_the_loss(self) -> TypeError:
        behind = type(self).__mro__[type(self).__mro__.index(ZOTrainerMixin) + 1 :]
        name = next(c.__name__ for c in behind if "training_step" in vars(c))
        return TypeError(
            f"{name}.training_step has a loss that is not compute_loss's alone, but a step by "
            "forward passes evaluates compute_loss, at several points; compute the whole loss in "
            "compute_loss(model, inputs), and leave the rest to training_step."
        )

    def _clip_grad_norm(self, model: Any) -> float:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """|projected gradient|, the root of the mean square for several queries."""
        slopes = _inner(self.optimizer).projected_gradients  # type: ignore[attr-defined]
        return math.sqrt(sum(d * d for d in slopes) / len(slopes)) if slopes else 0.0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds how many steps since the last log had a loss that was not finite, if any had."""
        if self._bad_steps and "loss" in logs:
            # The Trainer replaces such a loss by the mean of the others.
            logs = {**logs, "non_finite_steps": self._bad_steps}
            self._bad_steps = 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of the forwards: the Trainer's count is for one and a backward of two."""
        group = _inner(self.optimizer).param_groups[0]  # type: ignore[attr-defined]
        forwards = forwards_of(group["estimator"], group["num_queries"])
        return super().floating_point_ops(inputs) // 3 * forwards  # type: ignore[misc]


class ZOTrainer(ZOTrainerMixin, Trainer):
    """``transformers.Trainer`` by forward passes; see `ZOTrainerMixin`.

    Example:
        >>> trainer = ZOTrainer(model, args, train_dataset=data,
        ...                     optimizer_cls_and_kwargs=(ZOSGD, {"eps": 1e-3}))
        >>> trainer.train()
    """


def _pair(given: Any) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and its options."""
    if given is None:
        return ZOSGD, {}
    pair = given if isinstance(given, tuple | list) else (given,)
    cls, options = (*pair, {})[:2] if pair else (None, {})
    if len(pair) > 2 or not (options is None or isinstance(options, dict)):
        raise TypeError(
            f"optimizer_cls_and_kwargs is {given!r}, but it must be a class and its options: "
            "(ZOSGD, {'eps': 1e-3})."
        )
    return cls, options or {}


def _inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _decay_some(optimizer: ZOOptimizer, model: torch.nn.Module, names: list[str]) -> None:
    """Split the group in two, of which the named parameters keep its weight decay."""
    wanted = set(names)
    chosen = {id(p) for name, p in model.named_parameters() if name in wanted}
    (group,) = optimizer.param_groups
    decayed = [i for i, p in enumerate(group["params"]) if id(p) in chosen]
    spared = [i for i, p in enumerate(group["params"]) if id(p) not in chosen]
    parts = [part(group, decayed), {**part(group, spared), "weight_decay": 0.0}]
    optimizer.param_groups[:] = [one for one in parts if one["params"]]

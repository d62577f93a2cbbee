"""Zeroth-order optimizers inside ``transformers.Trainer``. Importing this imports transformers.

The Trainer keeps its loop: schedules, callbacks, logging, evaluation, saving, resuming. The mixin
replaces what belongs to backpropagation. Micro-batches are collected, and at the last one of a
step the optimizer takes its whole step on their summed loss: one direction for all of them, so
that accumulation is exact, for every optimizer and also for those that look at the loss again
after an update. The Trainer's own call of ``optimizer.step()`` then finds nothing left to do.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from transformers import Trainer

from zokernels import masks
from zokernels.optim import ZOSGD
from zokernels.optim.base import Closure, ZOOptimizer

__all__ = ["ZOTrainer", "ZOTrainerMixin"]


class _StepsAhead:
    """Lets an optimizer take its step before the Trainer calls ``step()``."""

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
    default is `ZOSGD`. Learning rate, weight decay and seed are those of the arguments unless
    given there. The logged gradient norm is the projected gradient's absolute value (for several
    queries the root of their mean square). ``max_grad_norm`` has no effect. Of several processes
    (torchrun, ``accelerate launch``) each takes its share of the batch, or with
    ``{"parallel": "query"}`` its share of the directions.

    Example:
        >>> class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer): ...

    Raises:
        TypeError: If a subclass names a Trainer before the mixin, or the optimizer is none of
            this project's.
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _check(trainer.args, trainer.accelerator)
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
        self._collected: list[tuple[Any, Any]] = []
        self._bad_steps = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer over the whole model, with no weight decay of norms and biases."""
        trainer: Any = self
        if trainer.optimizer is None:
            target = trainer.model if model is None else model
            cls, options = trainer.optimizer_cls_and_kwargs or (ZOSGD, {})
            if not (isinstance(cls, type) and issubclass(cls, ZOOptimizer)):
                raise TypeError(
                    f"optimizer_cls_and_kwargs names {cls!r}, but it must be one of zokernels' "
                    "optimizers, such as ZOSGD; for others use transformers.Trainer itself."
                )
            args = trainer.args
            given = {"lr": args.learning_rate, "seed": args.seed, **options}
            decay = given.pop("weight_decay", args.weight_decay)
            made = type(cls.__name__, (_StepsAhead, cls), {})(target, **given)
            trainer.optimizer = made
            if decay:
                _decay_some(made, target, trainer.get_decay_parameter_names(target), decay)
        return trainer.optimizer

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Collects a micro-batch; at a step's last one, takes the step.

        Returns:
            The step's loss, the mean over its two sides; zero before the last micro-batch, so
            that the sum that the Trainer keeps is the step's loss.
        """
        trainer: Any = self
        model.train()
        self._collected.append((trainer._prepare_inputs(inputs), num_items_in_batch))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        collected, self._collected = self._collected, []
        optimizer = _inner(trainer.optimizer)

        def closure() -> torch.Tensor:
            return sum(  # type: ignore[return-value]
                self._part(model, inputs, count) for inputs, count in collected
            )

        loss = optimizer.step_ahead(closure)
        self._bad_steps += not math.isfinite(float(loss))
        return loss.to(trainer.args.device)

    def _part(self, model: Any, inputs: dict[str, Any], count: Any) -> torch.Tensor:
        """A micro-batch's part of the loss, scaled as the Trainer scales it."""
        trainer: Any = self
        # Models may take labels out of the inputs; the next forward needs them too.
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=count)
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = trainer.model_accepts_loss_kwargs and count is not None
            scaled = by_items or trainer.compute_loss_func is not None
        return loss if scaled else loss / trainer.current_gradient_accumulation_steps

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
        forwards = group["num_queries"] * 2 if group["two_sided"] else group["num_queries"] + 1
        return super().floating_point_ops(inputs) // 3 * forwards  # type: ignore[misc]


class ZOTrainer(ZOTrainerMixin, Trainer):
    """``transformers.Trainer`` by forward passes; see `ZOTrainerMixin`.

    Example:
        >>> trainer = ZOTrainer(model, args, train_dataset=data,
        ...                     optimizer_cls_and_kwargs=(ZOSGD, {"eps": 1e-3}))
        >>> trainer.train()
    """


def _inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _check(args: Any, accelerator: Any) -> None:
    if args.fp16:
        raise ValueError(
            "fp16=True scales the loss for the sake of gradients, of which there are none here; "
            "leave it off and load the model with dtype=torch.float16, or use bf16=True."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"There are {args.n_gpu} GPUs in one process, over which the Trainer would scatter "
            "each forward; start a process for each by torchrun, or set CUDA_VISIBLE_DEVICES=0."
        )
    if getattr(accelerator.state, "deepspeed_plugin", None) or accelerator.distributed_type in (
        "FSDP",
        "DEEPSPEED",
    ):
        raise ValueError(
            "DeepSpeed and FSDP shard gradients and optimizer state, of which there are none "
            "here; run without them."
        )


def _decay_some(
    optimizer: ZOOptimizer, model: torch.nn.Module, names: list[str], decay: float
) -> None:
    """Split the one group in two, the named parameters with weight decay; streams stay."""
    chosen = {id(p) for name, p in model.named_parameters() if name in set(names)}
    whole = optimizer.param_groups.pop()
    params = whole.pop("params")
    mask = masks.from_plain(whole["mask"])
    for decayed in (True, False):
        places = [i for i, p in enumerate(params) if (id(p) in chosen) is decayed]
        if places:
            optimizer.add_param_group(
                {
                    **whole,
                    "params": [params[i] for i in places],
                    "mask": masks.to_plain(masks.take(mask, places)),
                    "weight_decay": decay if decayed else 0.0,
                }
            )

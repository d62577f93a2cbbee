"""``TrainingArguments``: what an optimizer by forward passes takes from them, and what it can't."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

from zokernels.optim import ZOAdam
from zokernels.optim.base import ZOOptimizer

_ELSEWHERE = (
    "the optimizer and its options come by optimizer_cls_and_kwargs=(zk.ZOSGD, {'eps': 1e-3})"
)
_NOT_ADAM = (
    "only ZOAdam has such a number; take optimizer_cls_and_kwargs=(zk.ZOAdam, {'eps': 1e-3})"
)
_CHECKPOINTING = (
    "the layers run in evaluation mode, in which none is checkpointed, and a forward that no "
    "backward follows keeps no activations anyway"
)
# Arguments that belong to backpropagation or to the Trainer's own optimizers, and why a step does
# not ask for them. Of two names for one thing the first that is set is told.
_WITHOUT_EFFECT = {
    ("optim",): _ELSEWHERE,
    ("optim_args",): _ELSEWHERE,
    ("optim_target_modules",): "what is trained is what requires a gradient; freeze the rest",
    ("adam_beta1",): _NOT_ADAM,
    ("adam_beta2",): _NOT_ADAM,
    ("adam_epsilon",): _NOT_ADAM,
    ("max_grad_norm",): "there is no gradient to clip",
    ("neftune_noise_alpha",): "noise in the embeddings is off in a step, as dropout is",
    ("activation_checkpointing", "gradient_checkpointing"): _CHECKPOINTING,
}


def refuse(args: Any, accelerator: Any) -> None:
    """Raise ValueError for what can't work by forward passes."""
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


def options(
    args: Any, accelerator: Any, cls: type[ZOOptimizer], given: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's options: those of the arguments, unless given with the optimizer.

    Raises:
        ValueError: If a mode was asked for in which a compiled model can't be perturbed.
    """
    told = dict(lr=args.learning_rate, weight_decay=args.weight_decay, seed=args.seed)
    if issubclass(cls, ZOAdam):
        told |= dict(betas=(args.adam_beta1, args.adam_beta2), adam_eps=args.adam_epsilon)
    found = {**told, **given}
    if _compiles(accelerator):
        if given.get("perturb") in ("on_entry", "paired"):
            raise ValueError(
                f"perturb={given['perturb']!r} was asked for, but the model will be compiled "
                "(torch_compile) and would go on with the weights it was compiled with; use "
                "perturb='in_place', or leave torch_compile off."
            )
        found["perturb"] = "in_place"
    return found


def warn(args: Any, accelerator: Any, cls: type[ZOOptimizer], given: dict[str, Any]) -> None:
    """Say of each argument that was set and does nothing here why, and of a rate that was not."""
    for names, why in _WITHOUT_EFFECT.items():
        if why is _NOT_ADAM and issubclass(cls, ZOAdam):
            continue
        for name in [name for name in names if _is_set(args, name)][:1]:
            _say(f"{name}={_plain(getattr(args, name))!r} has no effect on {cls.__name__}: {why}.")
    advised = _own_rate(cls)
    if "lr" not in given and args.learning_rate == _defaults(args)["learning_rate"] != advised:
        _say(
            f"learning_rate is {args.learning_rate:g}, which {type(args).__name__} has where none "
            f"is given, and the steps are as large as that. By forward passes begin with "
            f"{advised:g} for all the weights of a language model, or 1e-4 for LoRA: "
            f"{type(args).__name__}(learning_rate={advised:g})."
        )
    if _compiles(accelerator) and not given.get("perturb"):
        _say(
            "The model will be compiled (torch_compile) and would not see perturbed layers: "
            "perturbing in place, which keeps a copy of the trainable weights."
        )


def _say(sentence: str) -> None:
    # Seen from where the Trainer asks for its optimizer.
    warnings.warn(sentence, stacklevel=4)


def _compiles(accelerator: Any) -> bool:
    """Whether accelerate compiles the model as it prepares it."""
    return accelerator.state.dynamo_plugin.backend != "NO"


def _defaults(args: Any) -> dict[str, Any]:
    """The defaults of the arguments' own class: those of TRL's are others than transformers'."""
    return {field.name: field.default for field in dataclasses.fields(args)}


def _is_set(args: Any, name: str) -> bool:
    value, default = getattr(args, name, None), _defaults(args).get(name)
    # None becomes False as the arguments are made, and a norm of 0 asks for no clipping.
    return value != default and bool(value or (default and name != "max_grad_norm"))


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _own_rate(cls: type[ZOOptimizer]) -> float:
    """The rate that the optimizer, or the one it is made from, has by itself."""
    found = (inspect.signature(c).parameters.get("lr") for c in cls.__mro__)
    return next(lr.default for lr in found if lr is not None and lr.default is not lr.empty)

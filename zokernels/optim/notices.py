"""What an optimizer says once, where a step would go on in silence and not as its user thinks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from zokernels.backends import why_missing
from zokernels.estimators import Estimate

# So many flat steps in a row are told of. One or two happen to any loss of few values, such as a
# share of wrong answers.
FLAT = 5

_NOT_THE_USERS = ("zokernels", "torch")


class Noticed(Protocol):
    """What is asked of an optimizer that is looked at."""

    param_groups: list[dict[str, Any]]
    model: nn.Module | None
    backend: str | None


def warn(message: str) -> None:
    """A warning at the user's own line, the nearest outside of this package and of torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def of_a_list(optimizer: str) -> None:
    """Parameters came without their module, and nobody asked to perturb them in place."""
    warn(
        f"{optimizer} got parameters without their module, so it perturbs in place: it keeps a "
        f"copy of them and takes longer. Pass the module, {optimizer}(model), or with groups "
        f"{optimizer}(groups, model=model); perturb='in_place' says that this is wanted."
    )


def of_a_copy(optimizer: str, path: Any) -> None:
    """A copy is made of an optimizer that records."""
    warn(
        f"The copy of this {optimizer} does not record: the trajectory {path} goes on with the "
        "original; copy.record(path) begins another one."
    )


def of_first_step(optimizer: Noticed, params: Sequence[torch.Tensor]) -> None:
    """What there is to say of the parameters that a first step is going to move."""
    hooked = [p for p in params if _has_gradient_hook(p)]
    if hooked:
        warn(
            f"{_named(optimizer, hooked)} a gradient hook, which is never called, since a step "
            "has no gradients: it moves every weight of the parameter, those too that the hook "
            "would hold still. Give the optimizer mask=zk.masks.Bits([...]), a bool tensor for "
            "each of its parameters that is True where weights may move; or for the embeddings "
            "of new tokens use peft's trainable_token_indices; or freeze the parameter."
        )
    missing = why_missing(params[0].device) if params and optimizer.backend is None else None
    # Of float64 only the reference makes noise, wherever it is.
    if missing and any(p.dtype is not torch.float64 for p in params):
        warn(
            f"The weights are on {params[0].device}, but {missing} Until then passes run in plain "
            "PyTorch, which has the same bits and takes many times as long; backend='reference' "
            "says that this is wanted."
        )


def of_flat_steps(eps: float) -> None:
    """The loss has not changed for `FLAT` steps."""
    warn(
        f"The loss was the same at every point of {FLAT} steps in a row (all differences were "
        "exactly 0), so nothing was learned from them. Its value must depend on the trained "
        "weights: return one that the model's forward has made, and not a surrogate that has a "
        "gradient only, as exp(logp - logp.detach()), which is always 1 (use logp without detach, "
        f"or the rewards themselves). If it does depend on them, eps={eps:g} changes too little: "
        "make it larger, or take the loss in float32."
    )


def of_no_step(normalize: str, eps: float) -> None:
    """A step's differences were to be divided by what is 0."""
    what = "their deviation" if normalize == "std" else "the running mean of their squares"
    warn(
        f"The loss was the same at every point of a step, so that {what}, which "
        f"normalize={normalize!r} divides by, is 0 and no step was made (opt.flat_steps counts "
        f"such steps). A reward of few values needs more members (num_queries); else eps={eps:g} "
        "changes too little."
    )


def is_flat(found: Iterable[Estimate]) -> bool:
    """Whether a step's directions made no difference: none of the loss, or none among them."""
    estimates = list(found)
    return bool(estimates) and all(
        one.is_finite and (not any(one.differences) or (one.gradients and not any(one.gradients)))
        for one in estimates
    )


def _named(optimizer: Noticed, hooked: Sequence[torch.Tensor]) -> str:
    """The first of some parameters, by name, and how many more there are."""
    if optimizer.model is not None:
        named: Iterable = optimizer.model.named_parameters()
    else:
        named = enumerate(p for g in optimizer.param_groups for p in g["params"])
    name = next(repr(n) for n, p in named if p is hooked[0])
    return (
        f"Parameter {name} has"
        if len(hooked) == 1
        else (f"Parameter {name} and {len(hooked) - 1} more have")
    )


def _has_gradient_hook(p: torch.Tensor) -> bool:
    # Where `register_hook` and `register_post_accumulate_grad_hook` keep them.
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))

"""What an optimizer is given: a module, parameters or groups of them, and what it can't move."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from zokernels.backends.checks import DTYPES, names

_OF_MODULES = (nn.Module.parameters.__code__, nn.Module.named_parameters.__code__)


def module_of(params: Any) -> nn.Module | None:
    """The module itself, or the one that ``module.parameters()`` was called of.

    What that call gives is a generator, which holds its module until it has begun. A list or a
    filter of parameters tells of none.
    """
    if isinstance(params, nn.Module):
        return params
    if not inspect.isgenerator(params) or params.gi_code not in _OF_MODULES:
        return None
    if inspect.getgeneratorstate(params) != inspect.GEN_CREATED:
        return None
    return inspect.getgeneratorlocals(params)["self"]


def check_points(points: Any, perturb: str | None) -> None:
    """Raise ValueError unless so many points can share a forward."""
    if points == "all" or (type(points) is int and points >= 2):
        if points == 2 or perturb == "paired":
            return
        raise ValueError(
            f"points is {points!r}, but only perturb='paired' runs points in one forward, and "
            f"perturb is {perturb!r}; give that, or leave points out."
        )
    raise ValueError(
        f"points is {points!r}, but it must be how many points share a forward, at least 2, or "
        "'all' of the step."
    )


def check_trainable(model: nn.Module | None, params: list[torch.Tensor]) -> None:
    """Raise unless a step can write every trainable parameter.

    Args:
        model: Where their names are, if it is known.
        params: The parameters of a group.

    Raises:
        TypeError: If one has a type that no pass takes.
        ValueError: If one has no values here, or can't be written.
    """
    named = () if model is None else model.named_parameters()
    known = {id(p): repr(name) for name, p in named}
    for i, p in enumerate(params):
        if not p.requires_grad:
            continue
        name = f"Parameter {known.get(id(p), i)}"
        if is_lazy(p):
            raise ValueError(
                f"{name} is trainable, but has no shape yet (of a lazy module), so that zokernels "
                "finds no values to move; run the model on one batch first."
            )
        if p.is_meta:
            raise ValueError(
                f"{name} is trainable, but on the meta device (where accelerate's offloading and "
                "empty weights leave it), so that zokernels finds no values to move; load the "
                "model whole, model.to(device), or freeze the parameter: requires_grad_(False)."
            )
        if p.is_inference():
            raise ValueError(
                f"{name} is trainable, but was made under torch.inference_mode, so that zokernels "
                "can't update it; make the model outside of that, or take a copy outside: "
                "model = copy.deepcopy(model)."
            )
        if p.dtype not in DTYPES:
            raise TypeError(
                f"{name} is trainable and has type {names([p.dtype])}, but zokernels adds noise to "
                f"{names(DTYPES)}; freeze it (requires_grad_(False)), or keep a complex one as "
                "nn.Parameter(torch.view_as_real(z)) and one of 8 bits as bfloat16."
            )

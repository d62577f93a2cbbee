"""Which way of perturbing works for a model."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from zokernels.backends import shards

MODES = ("on_entry", "paired", "in_place")


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has a hand in the model: hooks added later would be ignored."""
    return any(map(_is_compiled, model.modules()))


def _is_compiled(module: nn.Module) -> bool:
    # Asked of every module in every step: an attribute that is not there takes nn.Module long.
    own = vars(module)
    return "_orig_mod" in own.get("_modules", ()) or own.get("_compiled_call_impl") is not None


def _why_in_place(model: nn.Module) -> str | None:
    """What has fixed the weights that a forward reads, if anything has."""
    modules = list(model.modules())
    if any(map(_is_compiled, modules)):
        return "compiled"
    scripted = [m for m in modules if isinstance(m, torch.jit.ScriptModule)]
    trains = any(p.requires_grad for m in scripted for p in m.parameters())
    return "scripted" if trains else None


def choose_mode(model: nn.Module | None, wanted: str | None, ran_compiled: bool = False) -> str:
    """One of `MODES`: what was asked for, or the best that works.

    Args:
        model: The module; None where only parameters are known.
        wanted: A mode, or None for the best.
        ran_compiled: Whether forwards enter it by something compiled, though it is not itself.

    Raises:
        ValueError: If the mode is unknown or cannot work.
    """
    if wanted not in (None, *MODES):
        raise ValueError(
            f"perturb is {wanted!r}, but it must be None, 'on_entry', 'paired' or 'in_place'."
        )
    if model is None:
        if wanted in ("on_entry", "paired"):
            raise ValueError(
                f"perturb={wanted!r} needs the module, but only parameters were given; pass the "
                "module itself, or use perturb='in_place'."
            )
        return "in_place"
    if shards.of_model(model):
        if wanted in ("on_entry", "paired"):
            raise ValueError(
                f"perturb={wanted!r} was asked for, but the weights are cut over processes, which "
                "perturb their own parts before they are gathered; use perturb='in_place'."
            )
        return "in_place"
    why = _why_in_place(model)
    if wanted is None and (why or ran_compiled):
        warnings.warn(
            f"The model is {why or 'compiled'} and would not see perturbed layers: perturbing in "
            "place, which keeps a copy of the trainable weights.",
            stacklevel=4,
        )
        return "in_place"
    if why:
        if wanted in ("on_entry", "paired"):
            raise ValueError(
                f"perturb={wanted!r} was asked for, but the model is {why} and would go on with "
                f"the weights it was {why} with; use perturb='in_place', or pass the model as it "
                "was before."
            )
        return "in_place"
    return wanted or "on_entry"

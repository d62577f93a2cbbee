"""State of the rules that have one: made in its own type, and kept in it by a load.

torch casts every loaded state to its parameter's type, which would make bfloat16 of the float32
momentum of bfloat16 weights; so what was saved is put back after the load.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, Protocol

import torch

from zokernels.backends import shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Loading(Protocol):
    """What is asked of an optimizer that loads a state."""

    def _goes_on_from(self, rule: str) -> bool: ...


def plain_dtype(dtype: torch.dtype | str | None, params: Sequence[torch.Tensor]) -> str | None:
    """The name of the type of a group's states, as param groups store it; None for the default.

    Raises:
        ValueError: If a state can't have the type, or the parameters are float64.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"state_dtype is {dtype!r}, but it must be None, torch.float32 or torch.bfloat16."
        )
    if any(p.dtype is torch.float64 for p in params):
        raise ValueError(
            f"state_dtype is {dtype!r}, but states of float64 parameters are float64; leave it out."
        )
    return name


def states_of(
    optimizer: torch.optim.Optimizer,
    params: Sequence[torch.Tensor],
    names: Sequence[str],
    dtype: str | None,
) -> list[dict[str, Any]]:
    """The states of each parameter, made of zeros where it has none yet."""
    found = []
    for p in params:
        state = optimizer.state[p]
        if not state:
            wide = torch.float64 if p.dtype is torch.float64 else torch.float32
            kind = DTYPES[dtype] if dtype else wide
            for name in names:
                state[name] = torch.zeros_like(p, dtype=kind, memory_format=torch.contiguous_format)
        found.append(state)
    return found


def check_loadable(
    optimizer: Loading, state_dict: dict[str, Any], own: Collection[str], rule: str
) -> None:
    """Raise unless the run that a state is of can be gone on with.

    Args:
        optimizer: The one that is to load it.
        state_dict: The state. One of an older version does not name its rule, and may lack some of
            the rule's own numbers, but not all.
        own: The names of the numbers in a param group that only this rule has.
        rule: The rule's name.

    Raises:
        ValueError: If it is of no optimizer of this project, or of another rule.
    """
    groups = state_dict.get("param_groups")
    if not groups or not all("streams" in group for group in groups):
        raise ValueError(
            "The state was not saved by an optimizer of zokernels (it has no param groups with "
            f"'streams'), so {rule} can't go on with it; begin a run with the model's weights: "
            f"opt = {rule}(model, lr=...)."
        )
    saved = state_dict.get("rule")
    if saved is None and any(state_dict["state"].values()):
        fits = any(name in group for group in groups for name in own)
    else:
        fits = saved is None or optimizer._goes_on_from(saved)
    if not fits:
        raise ValueError(
            f"The state was saved by {saved or 'another rule'}, whose numbers and states mean "
            f"nothing to {rule}; load it into the optimizer it is of, or begin a run of {rule} "
            f"with the model's weights: opt = {rule}(model, lr=...)."
        )


def own_states(optimizer: torch.optim.Optimizer) -> set[int]:
    """The addresses of the state tensors that the optimizer holds."""
    tensors = (t for state in optimizer.state.values() for t in state.values())
    return {shards.local(t).data_ptr() for t in tensors if isinstance(t, torch.Tensor)}


def restore_states(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], own: set[int]
) -> None:
    """Give every state the type it was saved in, after torch's load.

    Args:
        optimizer: The one that has just loaded ``state_dict``.
        state_dict: What it loaded.
        own: What `own_states` gave before the load. A tensor of another optimizer is copied, so
            that the two do not write to one state.
    """
    saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = chain.from_iterable(g["params"] for g in optimizer.param_groups)
    for key, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, torch.Tensor):
                mine = shards.local(value).data_ptr() in own
                optimizer.state[p][name] = value.detach().to(p.device, copy=not mine)

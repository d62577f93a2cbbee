"""What a step goes by of the model and the param groups, read once, at its beginning.

An optimizer made of a module trains names: where another parameter has taken a name since the last
step (``load_state_dict(assign=True)``, a new head), it is taken over with its group and its state.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from zokernels.backends import shards
from zokernels.optim.groups import trainable


class Form(NamedTuple):
    """Where a parameter is, and what it looks like."""

    address: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Swap(NamedTuple):
    """A parameter that is no longer the model's, and the one that has its name now."""

    name: str
    old: nn.Parameter
    new: nn.Parameter


@dataclass(frozen=True)
class World:
    """The model and the param groups at the beginning of a step.

    Attributes:
        named: The model's parameters by name, a tied one by its first.
        modules: Its modules.
        trainable: For each param group the positions of what is trained in this step.
        forms: Of each parameter that a param group holds, by its id.
        unheld: The names of trainable parameters that no param group holds.
    """

    named: dict[str, nn.Parameter]
    modules: list[nn.Module]
    trainable: list[list[int]]
    forms: dict[int, Form | None]
    unheld: list[str]

    @classmethod
    def read(cls, optimizers: Sequence[torch.optim.Optimizer], model: nn.Module | None) -> World:
        """The world as it is.

        Args:
            optimizers: The one whose step begins, and what else trains parts of the model.
            model: The module, where there is one.
        """
        modules, named = _walk(model) if model is not None else ([], {})
        forms = {id(p): _form(p) for p in _held(optimizers)}
        return cls(
            named=named,
            modules=modules,
            trainable=[trainable(g) for g in optimizers[0].param_groups],
            forms=forms,
            unheld=[n for n, p in named.items() if p.requires_grad and id(p) not in forms],
        )

    def is_as(self, before: World) -> bool:
        """Whether what was made for the parameters and modules of before still fits."""
        return self.forms == before.forms and self.modules == before.modules

    def swaps_since(self, before: World) -> list[Swap]:
        """What has been replaced of what a param group holds.

        Raises:
            RuntimeError: If a parameter that is trained has left the model with its name.
        """
        here = set(map(id, self.named.values()))
        found = []
        for name, old in before.named.items():
            if id(old) in here or id(old) not in self.forms:
                continue
            new = self.named.get(name)
            if new is not None and id(new) not in self.forms:
                found.append(Swap(name, old, new))
            elif old.requires_grad:
                raise RuntimeError(
                    f"Parameter {name!r} of the optimizer is no longer in the model, so that it "
                    "can't be trained; make the optimizer again, of the model as it is: "
                    "opt = ZOSGD(model)."
                )
        return found

    def tell_of_thawed(self, before: World) -> None:
        """Say which parameters have become trainable that no param group holds."""
        fresh = [name for name in self.unheld if name not in before.unheld]
        forms = set(self.forms.values())
        aliases = [name for name in fresh if _form(self.named[name]) in forms]
        thawed = [name for name in fresh if name not in aliases]
        if thawed:
            warnings.warn(
                f"{_some(thawed)} became trainable after the optimizer was made, or joined the "
                "model, and no param group holds it, so that it is not trained; add it: "
                'opt.add_param_group({"params": [...]}).',
                stacklevel=2,
            )
        # So load_state_dict(assign=True) leaves what was tied.
        if aliases:
            warnings.warn(
                f"{_some(aliases)} lies in the memory of a parameter that is trained, but is "
                "another one, so that it moves with it and may be perturbed without it; tie them "
                "again: model.tie_weights(), or one.weight = other.weight.",
                stacklevel=2,
            )

    def check_anything_is_trained(self) -> None:
        """Raise ValueError if nothing is."""
        if any(self.trainable):
            return
        others = (
            f" {_some(self.unheld)} of the model is trainable, but in no param group."
            if self.unheld
            else ""
        )
        raise ValueError(
            f"No parameter that the optimizer holds is trainable.{others} Unfreeze some by "
            "requires_grad_(True), make the optimizer again of the model as it is, or add what is "
            'to be trained: opt.add_param_group({"params": [...]}).'
        )


def check_states(
    optimizers: Sequence[torch.optim.Optimizer],
    swaps: Sequence[Swap],
    before: World,
    now: World,
) -> None:
    """Raise if a parameter has another shape than its state, which had its shape before.

    Args:
        optimizers: Whose states.
        swaps: What is about to be taken over.
        before: The world of the last step.
        now: The world as it is.

    Raises:
        RuntimeError: Naming the parameter.
    """
    instead = {id(swap.old): swap.new for swap in swaps}
    for optimizer in optimizers:
        for p in _held([optimizer]):
            p_now = instead.get(id(p), p)
            was, form = before.forms.get(id(p)), _form(p_now)
            if was is None or form is None or was.shape == form.shape:
                continue
            state = optimizer.state.get(p, {}).values()
            if any(isinstance(t, torch.Tensor) and tuple(t.shape) == was.shape for t in state):
                name = next((f" {n!r}" for n, q in now.named.items() if q is p_now), "")
                raise RuntimeError(
                    f"Parameter{name} has the shape {form.shape} now, but it had {was.shape} in "
                    "the last step, and the optimizer's state of it still has; drop that state, "
                    "opt.state.clear(), or make the optimizer again."
                )


def take_over(optimizers: Sequence[torch.optim.Optimizer], swaps: Sequence[Swap]) -> None:
    """Let the param groups hold the new parameters, each with the state of the old one."""
    instead = {id(swap.old): swap.new for swap in swaps}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [instead.get(id(p), p) for p in group["params"]]
        for swap in swaps:
            if swap.old in optimizer.state:
                optimizer.state[swap.new] = optimizer.state.pop(swap.old)
    if swaps:
        warnings.warn(
            f"{_some([swap.name for swap in swaps])} was replaced in the model since the last "
            "step; the optimizer trains the new one, with the state that it has for this name.",
            stacklevel=2,
        )


def _walk(model: nn.Module) -> tuple[list[nn.Module], dict[str, nn.Parameter]]:
    """The modules and the named parameters of a model, in one walk: each takes a while."""
    modules, named, seen = [], {}, set()
    for prefix, module in model.named_modules():
        modules.append(module)
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                named[f"{prefix}.{name}" if prefix else name] = p
    return modules, named


def _held(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[nn.Parameter]:
    return (p for o in optimizers for g in o.param_groups for p in g["params"])


def _form(p: Any) -> Form | None:
    if is_lazy(p):
        return None
    own = shards.local(p)
    address = own.data_ptr() if own.layout is torch.strided else id(own)
    return Form(address, tuple(p.shape), p.dtype, p.device)


def _some(names: Sequence[str]) -> str:
    """The first of some parameters by name, and how many there are."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"Parameter {names[0]!r}{more}"

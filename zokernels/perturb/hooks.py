"""Filling a module's parameters as it is entered, for modules whose operations can't be watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from zokernels.perturb.filling import Filler
from zokernels.perturb.weight import Disguise

# The parameters that a module has filled while it runs.
_Filled = list[int]


class Hooks:
    """Shows parameters with perturbed values from a module's entry until it is left.

    Attributes:
        filled: The parameters filled so far.
        entered: The modules entered so far while all of them were watched.
        holders: The modules that are in charge of parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        filler: Filler,
        disguise: Disguise,
    ):
        self.model = model
        self.params = list(params)
        self.filler, self.disguise = filler, disguise
        self.filled: set[int] = set()
        self.entered: set[nn.Module] = set()
        self.holders: dict[nn.Module, list[int]] = {}

    def take(self, chosen: Sequence[int]) -> None:
        """Be in charge of these parameters from now on, each in the modules that hold it."""
        position = {id(self.params[i]): i for i in chosen}
        for module in self.model.modules():
            mine = [position[id(p)] for p in module._parameters.values() if id(p) in position]
            if mine:
                known = self.holders.setdefault(module, [])
                known += [i for i in dict.fromkeys(mine) if i not in known]

    def drop(self, chosen: Sequence[int]) -> None:
        """Be in charge of these parameters no longer."""
        self.holders = {
            m: left
            for m, own in self.holders.items()
            if (left := [i for i in own if i not in chosen])
        }

    def adopt(self) -> None:
        """Give what no entered module holds to the nearest entered one around it.

        Raises:
            RuntimeError: If there is none.
        """
        parents = {child: m for m in self.model.modules() for child in m.children()}
        held = {i for m, own in self.holders.items() if m in self.entered for i in own}
        for holder, own in list(self.holders.items()):
            if holder in self.entered:
                continue
            around = parents.get(holder)
            while around is not None and around not in self.entered:
                around = parents.get(around)
            for i in own:
                if i in held:
                    continue
                if around is None:
                    names = {id(p): name for name, p in self.model.named_parameters()}
                    raise RuntimeError(
                        f"Parameter {names[id(self.params[i])]!r} is trainable, but neither its "
                        "module nor one around it was entered by the closure's forward, so it "
                        "can't be perturbed on entry; call the model itself, freeze the "
                        "parameter, or use perturb='in_place'."
                    )
                self.holders.setdefault(around, []).append(i)
                held.add(i)
            del self.holders[holder]

    @contextlib.contextmanager
    def set(self, watch: bool) -> Iterator[None]:
        """The hooks are there inside the block; ``watch`` notes every module that is entered."""
        open_modules: dict[nn.Module, list[_Filled]] = {}
        handles = []

        def enter(module: nn.Module, _args: object) -> None:
            self.entered.add(module)
            if module not in self.holders:
                return
            inner = {i for stack in open_modules.values() for filled in stack for i in filled}
            own = [i for i in self.holders[module] if i not in inner]
            open_modules.setdefault(module, []).append(own)
            for i in own:
                self.disguise.show(i, self.filler.fresh(i)[0])
                self.filled.add(i)

        def leave(module: nn.Module, _args: object, _output: object) -> None:
            if open_modules.get(module):
                self._hide(open_modules[module].pop())

        try:
            for module in self.model.modules() if watch else list(self.holders):
                # It takes no hooks; a module around it is in charge.
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for stack in open_modules.values():
                for filled in stack:
                    self._hide(filled)

    def _hide(self, filled: _Filled) -> None:
        for i in filled:
            self.disguise.cover(i)

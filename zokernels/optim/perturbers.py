"""What perturbs a model for an optimizer, kept from step to step for each set of parameters."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from zokernels.backends import tracer
from zokernels.perturb import InPlace, OnEntry, Paired, choose_mode
from zokernels.perturb.prefix import Prefix


class Perturbers:
    """The perturbers of a model, and what of its forwards blocks share.

    Args:
        model: The module; None where only parameters are known, which are perturbed in place.
        mode: One of `zokernels.perturb.MODES`.
        lazy_logits: Make a language model's logits only where the loss looks at them.

    Attributes:
        ran_compiled: Whether a forward entered the model by way of something compiled, such as
            ``torch.compile(model)`` beside the model that is perturbed.
    """

    def __init__(self, model: nn.Module | None, mode: str, lazy_logits: bool):
        self.model, self.mode, self.lazy_logits = model, mode, lazy_logits
        self.ran_compiled = False
        self._known: dict[tuple[int, ...], InPlace | OnEntry] = {}
        self._prefix: Prefix | None = None
        self._has_looked = self._has_told = False

    def choose(self, wanted: str | None) -> str:
        """The mode that works for the model as it is, given what was asked for.

        Raises:
            ValueError: If that can't work any more.
        """
        before = self.mode
        if self.mode != "in_place":
            self.mode = choose_mode(self.model, wanted, self.ran_compiled)
        if self.mode != before:
            self.clear()
        if self.ran_compiled and not self._has_told:
            self._has_told = True
            self.clear()
            if self.mode != "in_place":
                warnings.warn(
                    "The closure enters the model by something compiled, which runs eagerly in the "
                    f"steps, since perturb={self.mode!r} was asked for; use perturb='in_place', "
                    "which keeps a copy of the trainable weights, to run it compiled.",
                    stacklevel=2,
                )
        return self.mode

    @property
    def prefix(self) -> Prefix:
        """The part of a forward that a block can't change."""
        if self._prefix is None:
            self._prefix = Prefix(self.model, self.mode == "in_place" and self.ran_compiled)
        return self._prefix

    def of(self, params: list[nn.Parameter], lazy_logits: bool | None = None) -> InPlace | OnEntry:
        """The perturber of these parameters, with logits that wait or without."""
        lazy = self.lazy_logits if lazy_logits is None else lazy_logits
        key = (lazy, *map(id, params))
        if key not in self._known:
            self._known[key] = self.make(params, lazy)
        return self._known[key]

    def make(
        self, params: list[nn.Parameter], lazy_logits: bool, keep: bool = False
    ) -> InPlace | OnEntry:
        """One that is nobody else's; with ``keep`` its memory keeps its addresses."""
        if self.mode == "in_place" or self.model is None:
            return InPlace(params, keep, self.model)
        kind = Paired if self.mode == "paired" else OnEntry
        return kind(self.model, params, lazy_logits, keep)

    @contextlib.contextmanager
    def forwards(self, in_blocks: bool = False) -> Iterator[None]:
        """Around a step's forwards: what is compiled runs eagerly where else it would go wrong.

        It would pass by the weights that are perturbed on entry, and by layers that are returned
        from memory. That it ran is noted in `ran_compiled`.

        Args:
            in_blocks: Whether the step goes block by block.
        """
        if self.mode == "in_place" and not (in_blocks and self.prefix.off is None):
            yield
            return
        with tracer.eager(), self._looking_for_compiled():
            yield

    @contextlib.contextmanager
    def _looking_for_compiled(self) -> Iterator[None]:
        """Look at the first module that is entered; in the first step at each."""
        if self.ran_compiled or self.model is None or not tracer.is_here():
            yield
            return
        modules = set(self.model.modules())

        def look(module: nn.Module, _args: object) -> None:
            if module in modules:
                self.ran_compiled = self.ran_compiled or tracer.is_inside()
                if self._has_looked or self.ran_compiled:
                    handle.remove()

        handle = register_module_forward_pre_hook(look)
        try:
            yield
            self._has_looked = True
        finally:
            handle.remove()

    def all(self) -> list[InPlace | OnEntry]:
        """Those there are by now."""
        return list(self._known.values())

    def clear(self) -> None:
        """Forget them: the model, or what is trained of it, is no longer what they are made for."""
        self._known.clear()
        self._prefix = None
        self._has_looked = False

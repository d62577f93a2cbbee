"""What perturbs a model for an optimizer, kept from step to step for each set of parameters."""

from __future__ import annotations

from torch import nn

from zokernels.perturb import InPlace, OnEntry, Paired
from zokernels.perturb.prefix import Prefix


class Perturbers:
    """The perturbers of a model, and what of its forwards blocks share.

    Args:
        model: The module; None where only parameters are known, which are perturbed in place.
        mode: One of `zokernels.perturb.MODES`.
        lazy_logits: Make a language model's logits only where the loss looks at them.
    """

    def __init__(self, model: nn.Module | None, mode: str, lazy_logits: bool):
        self.model, self.mode, self.lazy_logits = model, mode, lazy_logits
        self._known: dict[tuple[int, ...], InPlace | OnEntry] = {}
        self._prefix: Prefix | None = None

    @property
    def prefix(self) -> Prefix:
        """The part of a forward that a block can't change."""
        if self._prefix is None:
            self._prefix = Prefix(self.model)
        return self._prefix

    def of(self, params: list[nn.Parameter]) -> InPlace | OnEntry:
        """The perturber of these parameters."""
        key = tuple(map(id, params))
        if key not in self._known:
            self._known[key] = self.make(params, self.lazy_logits)
        return self._known[key]

    def make(
        self, params: list[nn.Parameter], lazy_logits: bool, keep: bool = False
    ) -> InPlace | OnEntry:
        """One that is nobody else's; with ``keep`` its memory keeps its addresses."""
        if self.mode == "in_place" or self.model is None:
            return InPlace(params, keep)
        kind = Paired if self.mode == "paired" else OnEntry
        return kind(self.model, params, lazy_logits, keep)

    def all(self) -> list[InPlace | OnEntry]:
        """Those there are by now."""
        return list(self._known.values())

    def clear(self) -> None:
        """Forget them: parameters have joined."""
        self._known.clear()

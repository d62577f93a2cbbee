"""Trainable weights that a forward sees as they are stored, and leaves so.

Those that are not perturbed: all of them where the loss at θ is asked for, and in a step that goes
block by block those of the other blocks. A forward may write them: `nn.Embedding` scales rows down
to its ``max_norm``. What it writes to perturbed weights is thrown away with these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from zokernels.backends import shards
from zokernels.optim.forward import Keeper
from zokernels.optim.written import Written


class Weights:
    """What is known of an optimizer's trainable parameters, from step to step.

    Args:
        model: The module, where there is one: what a parameter is called.
    """

    def __init__(self, model: nn.Module | None):
        self.model = model
        self._written = Written("trainable parameter")

    def keeper(self, params: Sequence[nn.Parameter]) -> Keeper:
        """What keeps these parameters around a forward at which some of them are perturbed."""
        # As they lie: inside of a forward a parameter may be a perturbed weight, or a dual number.
        stored = {
            id(p): p.detach() for p in params if not (p.is_inference() or shards.is_sharded(p))
        }
        return partial(self._kept, stored)

    def forget(self) -> None:
        """The parameters may be others from now on."""
        self._written.forget(all_but=set())

    @contextlib.contextmanager
    def _kept(
        self, stored: Mapping[int, torch.Tensor], perturbed: Sequence[nn.Parameter], looks: bool
    ) -> Iterator[None]:
        others = stored.keys() - set(map(id, perturbed))
        if not others:
            yield
            return
        with self._written.kept({i: stored[i] for i in others}, self._name) as kept:
            with kept.looking() if looks else contextlib.nullcontext():
                yield

    def _name(self, i: int) -> str:
        named = self.model.named_parameters() if self.model is not None else ()
        return next((name for name, p in named if id(p) == i), "of the list")

"""A model's buffers, as they were before the forwards of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from zokernels.optim.written import Kept, Written, bytes_of

# Bytes up to which a buffer is copied in each step, without a look: running means, positions.
SMALL = 4096


class Buffers:
    """What is known of a model's buffers, from step to step.

    Args:
        model: The module, where there is one.
    """

    def __init__(self, model: nn.Module | None):
        self.model = model
        self._written = Written("buffer")
        # By their ids; while they are held here no other tensor can have one of these.
        self._held: dict[int, tuple[str, torch.Tensor]] = {}

    def kept(self) -> AbstractContextManager[Kept]:
        """A block after which every buffer is as before it, by whatever forwards wrote to it."""
        places = [] if self.model is None else list(_places(self.model))
        named = self.model.named_buffers() if self.model is not None else ()
        # A tensor of inference mode can't be written here, nor has it a version.
        known = {id(b): (n, b) for n, b in named if not b.is_inference()}
        large = {i: b for i, (_, b) in known.items() if bytes_of(b) > SMALL}
        small = [b for _, b in known.values() if bytes_of(b) <= SMALL]
        self._written.forget(all_but=known.keys() & self._held.keys())
        self._held = known

        def reassign() -> None:
            for module, name, b in places:
                # A forward may give a name another tensor, made with perturbed weights.
                if module._buffers.get(name) is not b:
                    module._buffers[name] = b

        return self._written.kept(large, lambda i: known[i][0], small, reassign)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Each buffer, where it is."""
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is not None:
                yield module, name, b

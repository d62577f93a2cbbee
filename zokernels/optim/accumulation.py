"""accelerate's accumulation of gradients, under which most batches of a step never come here.

A prepared optimizer is accelerate's wrapper: its ``step(closure)`` in ``accelerator.accumulate``
does nothing up to the last batch of a step, whose closure sees that batch alone.
"""

from __future__ import annotations

import sys
import warnings
from weakref import WeakSet

import torch

_told: WeakSet[torch.optim.Optimizer] = WeakSet()


def notice(optimizer: torch.optim.Optimizer) -> None:
    """Say once for an optimizer that accelerate accumulates what it does not have."""
    state = sys.modules.get("accelerate.state")
    if state is None or optimizer in _told:
        return
    batches = state.GradientState().num_steps
    if batches > 1:
        _told.add(optimizer)
        warnings.warn(
            f"accelerate has gradient_accumulation_steps={batches}, but a step by forward passes "
            "has no gradient to accumulate: inside accelerator.accumulate a prepared "
            f"{type(optimizer).__name__} gets the closure of one batch in {batches}, and the "
            "others are never looked at. Leave it at 1, and take the parts of a batch into one "
            "closure: opt.step(lambda: sum(model(**part).loss for part in parts) / len(parts)).",
            stacklevel=6,
        )

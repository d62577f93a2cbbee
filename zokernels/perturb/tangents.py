"""Weights that carry a direction as their tangent, made when an operation asks for them.

A forward in forward mode sees θ itself, and with it z: its loss has the derivative ∇L·z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from zokernels import masks, passes
from zokernels.perturb.direction import Direction
from zokernels.perturb.drawing import Values
from zokernels.perturb.filling import Filler
from zokernels.perturb.on_entry import OnEntry
from zokernels.perturb.weight import Disguise


def directions(direction: Direction, sources: Sequence[torch.Tensor], chosen: Sequence[int]) -> Any:
    """The noise z of some parameters, 0 outside the mask.

    Args:
        direction: Its one seed.
        sources: The weights of all parameters.
        chosen: Whose z.
    """
    weights = [sources[i] for i in chosen]
    made = [torch.zeros(w.shape, dtype=w.dtype, device=w.device) for w in weights]
    mask = masks.take(direction.mask, list(chosen))
    magnitude = isinstance(mask, masks.Magnitude)
    passes.add_noise_(
        made,
        direction.seeds,
        [1.0],
        streams=[direction.streams[i] for i in chosen],
        dist=direction.dist,
        # By magnitude it is the weights that are judged, not what is being made.
        mask=None if magnitude else mask,
        backend=direction.backend,
    )
    if isinstance(mask, masks.Magnitude):
        for z, w, kept in zip(made, weights, masks.kept(mask, weights), strict=True):
            z.mul_(kept.view_as(w))
    return made


class _Tangents(Filler):
    """Makes weights with their tangents; nothing is kept beyond the operation that asked."""

    can_split = False
    has_factors = False

    def fresh(self, i: int) -> Values:
        """A parameter with its tangent, as it was written if it was."""
        if i in self._held:
            return self._held[i]
        (direction,) = self.lanes
        assert direction is not None
        with self._timed():
            (z,) = directions(direction, self.sources, [i])
            return [forward_ad.make_dual(self.sources[i], z)]

    def values(self, chosen: Sequence[int]) -> list[Values]:
        """Some parameters with their tangents."""
        return [self.fresh(i) for i in chosen]

    def hold(self, i: int) -> Values:
        """A parameter with its tangent, in memory that may be written."""
        if i not in self._held:
            self._held[i] = [w.clone() for w in self.fresh(i)]
        return self._held[i]

    def item(self, i: int, at: int) -> Values:
        """One of those that a parameter has in its first dimension."""
        return [w[at] for w in self.fresh(i)]

    def rows(self, i: int, numbers: Sequence[torch.Tensor]) -> Values:
        """Rows of a matrix, looked up."""
        return [F.embedding(n, w) for n, w in zip(numbers, self.fresh(i), strict=True)]


class _Dual(Disguise):
    def show(self, i: int, values: torch.Tensor) -> None:
        """Let a parameter be one with this tangent, which other data alone do not bring."""
        super().show(i, torch.empty_like(forward_ad.unpack_dual(values).primal))
        self.params[i].copy_(values)


class CarryingTangents(OnEntry):
    """Runs forwards whose weights carry the noise of a direction as their tangent.

    Args:
        model: The module.
        params: Its parameters that carry one.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]):
        super().__init__(model, params, lazy_logits=False, filler=_Tangents(params), disguise=_Dual)

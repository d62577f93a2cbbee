"""The points of a forward as a dimension of its own, which torch's batching rules carry along.

Of what a model computes, some belongs to a point and some is the same at all of them: hidden states
and a table of relative positions made of perturbed weights, and masks and position numbers made of
the batch. A level of `torch.vmap` tells them apart by data flow. What met a perturbed weight has
one more dimension under the hood; the model sees the shapes of a forward at one point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._functorch.vmap import vmap_increment_nesting
from torch.overrides import TorchFunctionMode

# torch.vmap wraps its inputs once; here a tensor may join at any operation. What wraps and unwraps
# a tensor has kept its names since functorch, and torch.vmap itself is written with it.
_functorch: Any = torch._C._functorch


class Points:
    """How many points a forward has, and the tensors that differ from point to point.

    Args:
        count: Number of points.
        level: The level of vmap that carries them.

    Attributes:
        failed: What an operation has raised, whether or not the model has caught it.
    """

    def __init__(self, count: int, level: int):
        self.count, self.level = count, level
        self.failed: Exception | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, count: int) -> Iterator[Points]:
        """Points that live as long as the block; random numbers are the same at each."""
        with vmap_increment_nesting(count, "same") as level, _Operations() as operations:
            # An operation without a batching rule runs once a point, which is no news to anybody.
            _functorch._set_vmap_fallback_warning_enabled(False)
            try:
                operations.points = points = cls(count, level)
                yield points
            finally:
                _functorch._set_vmap_fallback_warning_enabled(True)

    def join(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One value a point as a tensor that belongs to a point."""
        return self.wrap(torch.stack(list(values)))

    def wrap(self, whole: torch.Tensor) -> torch.Tensor:
        """A tensor whose first dimension is the points, as one that belongs to a point."""
        return _functorch._add_batch_dim(whole, 0, self.level)

    def whole(self, t: torch.Tensor) -> torch.Tensor | None:
        """All values of a tensor that belongs to a point, in its first dimension; else None."""
        if not _functorch.is_batchedtensor(t) or _functorch.maybe_get_level(t) != self.level:
            return None
        whole, at = _functorch.get_unwrapped(t), _functorch.maybe_get_bdim(t)
        return whole.movedim(at, 0) if at else whole

    def parts(self, t: torch.Tensor) -> list[torch.Tensor]:
        """The values of a tensor at each point; those of a common one are one and the same."""
        whole = self.whole(t)
        return [t] * self.count if whole is None else list(whole.unbind())

    def is_plain(self, t: torch.Tensor) -> bool:
        """Whether a tensor's values are in memory: it is in no vmap of the model's own."""
        if not _functorch.is_functorch_wrapped_tensor(t):
            return True
        own = _functorch.is_batchedtensor(t) and _functorch.maybe_get_level(t) == self.level
        return own and not _functorch.is_functorch_wrapped_tensor(_functorch.get_unwrapped(t))


def is_about_points(error: Exception) -> bool:
    """Whether an operation failed because its tensor belongs to a point: torch says so in words."""
    words = ("vmap", "functorch", "atching rule", "doesn't have storage")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class _Operations(TorchFunctionMode):
    """Runs attention at all points as attention over a larger batch: vmap would run it in turn.

    It answers what every point answers alike, which vmap refuses, and notes what any operation
    raises.
    """

    points: Points

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        try:
            if func is F.scaled_dot_product_attention:
                return self._attend(*args, **(kwargs or {}))
            if func is torch.Tensor.__contains__ and not kwargs:
                return self._contains(*args)
            return func(*args, **(kwargs or {}))
        except Exception as error:
            self.points.failed = error
            raise

    def _contains(self, t: torch.Tensor, element: Any) -> bool:
        """Whether a value is among the tensor's, where every point has the same answer."""
        answers = {element in part for part in self.points.parts(t)}
        # Else torch's own error.
        return answers.pop() if len(answers) == 1 else torch.Tensor.__contains__(t, element)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        device = query.device.type
        if torch.is_autocast_enabled(device):
            # Under vmap autocast passes attention by.
            wide = torch.get_autocast_dtype(device)
            query, key, value = query.to(wide), key.to(wide), value.to(wide)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(wide)
        points, given = self.points, (query, key, value)
        wholes = [points.whole(t) for t in given]
        simple = dropout_p == 0 and all(t.dim() == 4 and points.is_plain(t) for t in given)
        if attn_mask is not None:
            simple = simple and attn_mask.dim() in (2, 4) and points.is_plain(attn_mask)
        if not simple or wholes == [None] * 3:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, **kwargs
            )
        rows = max(t.shape[0] for t in given)
        q, k, v = (self._rows(t, w, rows) for t, w in zip(given, wholes, strict=True))
        mask = None if attn_mask is None else self._mask(attn_mask, rows)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **kwargs)
        return points.wrap(out.unflatten(0, (points.count, rows)))

    def _rows(self, t: torch.Tensor, whole: torch.Tensor | None, rows: int) -> torch.Tensor:
        """The rows of all points, one point after the other."""
        if whole is None:
            whole = t.expand(self.points.count, *t.shape)
        if whole.shape[1] != rows:
            whole = whole.expand(-1, rows, *whole.shape[2:])
        return whole.flatten(0, 1)

    def _mask(self, mask: torch.Tensor, rows: int) -> torch.Tensor:
        whole = self.points.whole(mask)
        if whole is None and (mask.dim() == 2 or mask.shape[0] == 1):
            return mask
        if mask.dim() == 2:
            mask, whole = mask[None, None], None if whole is None else whole[:, None, None]
        return self._rows(mask, whole, rows)

"""The operations that take weights, on weights that each lane of a forward has its own of.

The first dimension of what a layer gets is the batch of all lanes, one lane after the other. An
operation returns NotImplemented where it meets what it doesn't know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from zokernels.perturb.dispatch import OPERATIONS
from zokernels.perturb.logits import PerturbedLogits
from zokernels.perturb.weight import Entry, PerturbedWeight, resolve


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, PerturbedWeight) and PerturbedLogits.can_wait(x, weight):
        return PerturbedLogits.of(x, weight, bias)
    first = weight if isinstance(weight, PerturbedWeight) else bias
    if not isinstance(first, PerturbedWeight):
        return NotImplemented
    if first.entry.count > 1 and _can_write_apart(x):
        return _linear_apart(x, weight, bias, first.entry)
    return _each(x, (weight, bias), F.linear)


def _can_write_apart(x: Any) -> bool:
    plain = type(x) is torch.Tensor and x.dim() > 1 and x.is_contiguous() and x.shape[0] > 1
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def _linear_apart(x: torch.Tensor, weight: Any, bias: Any, entry: Entry) -> torch.Tensor:
    """`torch.nn.functional.linear`, each lane's product written where it belongs."""
    parts = entry.split(x)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    places = out.view(len(parts), -1, weight.shape[0])
    for k, (w, b) in enumerate(resolve(weight, bias)):
        rows = parts[k].view(-1, x.shape[-1])
        if b is None:
            torch.mm(rows, w.t(), out=places[k])  # type: ignore[union-attr]
        else:
            torch.addmm(b, rows, w.t(), out=places[k])  # type: ignore[union-attr]
    return out


def _addmm(bias: Any, x: Any, weight: Any, **kwargs: Any) -> Any:
    # Conv1D of transformers.
    if kwargs:
        return NotImplemented
    return _each(x, (bias, weight), lambda own, b, w: torch.addmm(b, own, w))


def _layer_norm(
    x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    return _each(
        x, (weight, bias), lambda own, w, b: F.layer_norm(own, normalized_shape, w, b, eps)
    )


def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    return _each(x, (weight,), lambda own, w: F.rms_norm(own, normalized_shape, w, eps))


def _elementwise(operation: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A product or sum of what a layer got and a weight that has fewer dimensions: a norm's."""

    def run(a: Any, b: Any, **kwargs: Any) -> Any:
        weight, x = (a, b) if isinstance(a, PerturbedWeight) else (b, a)
        if kwargs or isinstance(x, PerturbedWeight) or not isinstance(x, torch.Tensor):
            return NotImplemented
        if weight.dim() >= x.dim():
            return NotImplemented
        if weight is a:
            return _each(x, (weight,), lambda own, w: operation(w, own))
        return _each(x, (weight,), lambda own, w: operation(own, w))

    return run


def _embedding(
    numbers: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    if max_norm is not None or not isinstance(weight, PerturbedWeight):
        return NotImplemented
    entry = weight.entry
    entry.used.add(weight.place)
    parts = entry.filler.rows(weight.place, entry.split(numbers))
    return entry.join(parts, numbers)


def _each(x: Any, weights: tuple, operation: Callable[..., torch.Tensor]) -> Any:
    """The operation on each lane's part of x, with its own weights."""
    if isinstance(x, PerturbedWeight):
        return NotImplemented
    if isinstance(x, PerturbedLogits):
        x = x.computed()
    entry: Entry = next(w.entry for w in weights if isinstance(w, PerturbedWeight))
    values = resolve(*weights)
    if entry.count == 1:
        return operation(x, *values[0])
    parts = entry.split(x)
    results = [operation(own, *w) for own, w in zip(parts, values, strict=True)]
    return entry.join(results, x)


OPERATIONS.update(
    {
        F.linear: _linear,
        F.embedding: _embedding,
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
        torch.addmm: _addmm,
        torch.mul: _elementwise(torch.mul),
        torch.Tensor.mul: _elementwise(torch.mul),
        torch.add: _elementwise(torch.add),
        torch.Tensor.add: _elementwise(torch.add),
    }
)

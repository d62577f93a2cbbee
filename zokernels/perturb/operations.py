"""The operations that take weights, on weights that each lane of a forward has its own of.

They are here for speed: what is known of an operation is made in scratch memory, and without the
weights of all lanes in one tensor; or, along a direction of rank one, with the stored weights alone
(`zokernels.perturb.structured`). An operation returns NotImplemented where it meets what it
doesn't know; it is then done on weights with memory of their own. Operands have torch's own names,
by which a model may give them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from zokernels.perturb import structured
from zokernels.perturb.dispatch import OPERATIONS
from zokernels.perturb.logits import PerturbedLogits
from zokernels.perturb.weight import Entry, Unshareable, is_perturbed, resolve, together

# Of a norm that all points make at once: more points than these, and no more numbers at each.
_FEW_POINTS, _FEW_NUMBERS = 4, 1 << 16


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    entry = _entry(weight, bias)
    if entry is None or not _is_known(input, entry):
        return NotImplemented
    if is_perturbed(weight) and PerturbedLogits.can_wait(input, weight):
        return PerturbedLogits.waiting(input, weight, bias)
    vectors = structured.vectors_of(weight)
    if vectors is not None and vectors.pay_for(input.shape[:-1].numel()):
        return structured.linear(input, weight, bias, vectors)
    if entry.points is not None and _can_write_apart(input):
        return _linear_apart(input, weight, bias, entry)
    return _each(input, (weight, bias), F.linear)


def _can_write_apart(x: torch.Tensor) -> bool:
    return x.dim() > 1 and not torch.is_grad_enabled() and not _is_autocast(x)


def _is_autocast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _linear_apart(x: torch.Tensor, weight: Any, bias: Any, entry: Entry) -> torch.Tensor:
    """`torch.nn.functional.linear`, each lane's product written where it belongs."""
    points = entry.points
    assert points is not None
    values = resolve(weight, bias)
    lead, whole = x.shape[:-1], points.whole(x)
    # Said in numbers: of no rows at all, as an expert may get, torch would not know how many.
    rows = lead.numel()
    if whole is None:
        flat = [x.reshape(rows, x.shape[-1])] * points.count
    else:
        flat = list(whole.reshape(points.count, rows, x.shape[-1]).unbind())
    out = flat[0].new_empty((points.count, rows, weight.shape[0]))
    for own, place, (w, b) in zip(flat, out.unbind(), values, strict=True):
        assert w is not None
        if b is None:
            torch.mm(own, w.t(), out=place)
        else:
            torch.addmm(b, own, w.t(), out=place)
    return points.wrap(out.view(points.count, *lead, out.shape[-1]))


def _addmm(input: Any, mat1: Any, mat2: Any, **kwargs: Any) -> Any:
    # Conv1D of transformers.
    if kwargs:
        return NotImplemented
    found = _matmul(mat1, mat2, input)
    if found is not NotImplemented:
        return found
    return _each(mat1, (input, mat2), lambda own, b, w: torch.addmm(b, own, w))


def _matmul(input: Any, other: Any, bias: Any = None) -> Any:
    vectors = structured.vectors_of(other)
    if vectors is None or other.dim() != 2 or not _is_known(input, other.entry):
        return NotImplemented
    if not vectors.pay_for(input.shape[:-1].numel(), transposed=True):
        return NotImplemented
    return structured.matmul(input, other, bias, vectors)


def _convolution(operation: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        vectors = structured.vectors_of(weight)
        if vectors is None or not _is_known(input, weight.entry):
            return NotImplemented
        at = weight.dim() - 2  # of the input's last dimensions are positions
        positions = input.shape[: -at - 1].numel() * input.shape[-at:].numel()
        if not vectors.pay_for(positions):
            return NotImplemented
        place = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        return structured.convolution(operation, input, weight, bias, vectors, place)

    return run


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    if _is_of_many(input, weight, bias):
        return _scaled(F.layer_norm(input, normalized_shape, None, None, eps), weight, bias)
    return _each(
        input, (weight, bias), lambda own, w, b: F.layer_norm(own, normalized_shape, w, b, eps)
    )


def _rms_norm(
    input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    if _is_of_many(input, weight):
        return _scaled(F.rms_norm(input, normalized_shape, None, eps), weight)
    return _each(input, (weight,), lambda own, w: F.rms_norm(own, normalized_shape, w, eps))


def _is_of_many(x: Any, *weights: Any) -> bool:
    """Whether a norm of a few rows is asked for at many points, where a call a point takes longest.

    In 16 bits a product by itself would be rounded once more.
    """
    entry = _entry(*weights)
    return (
        entry is not None
        and entry.points is not None
        and entry.points.count > _FEW_POINTS
        and _is_known(x, entry)
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() <= _FEW_NUMBERS
    )


def _scaled(normal: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    """What a norm gave, times its weight, plus its bias: one operation at all points."""
    scaled = normal if weight is None else normal * _as_seen(weight)
    return scaled if bias is None else scaled + _as_seen(bias)


def _as_seen(weight: Any) -> torch.Tensor:
    if not is_perturbed(weight):
        return weight
    assert weight.entry.points is not None
    return weight.entry.points.wrap(together(weight))


def _elementwise(operation: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A product or sum of what a layer got and a weight: a norm's."""

    def run(input: Any, other: Any, **kwargs: Any) -> Any:
        weight, x = (input, other) if is_perturbed(input) else (other, input)
        if kwargs or is_perturbed(x):
            return NotImplemented
        # Outside of the model's own forward each closure sees its own lane's weights.
        is_apart = weight.entry.count > 1 and weight.entry.points is None
        if is_apart or not _is_known(x, weight.entry):
            return NotImplemented
        # One operation at all points.
        own = weight.entry.of([w for (w,) in resolve(weight)])
        return operation(own, x) if weight is input else operation(x, own)

    return run


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    if not is_perturbed(weight):
        return NotImplemented
    entry: Entry = weight.entry
    if max_norm is not None:
        # It scales the rows that it looks up, where they are.
        entry.warn_of_write(weight.place)
        return NotImplemented
    if not _is_known(input, entry):
        return NotImplemented
    entry.used.add(weight.place)
    if entry.points is None:
        return entry.filler.rows(weight.place, [input])[0]
    return entry.points.join(entry.filler.rows(weight.place, entry.points.parts(input)))


def _item(weight: Any, index: Any) -> Any:
    """One of the matrices that a weight of three dimensions is a stack of: an expert's."""
    if not is_perturbed(weight) or weight.dim() < 3:
        return NotImplemented
    if isinstance(index, torch.Tensor) and index.dim() == 0 and not index.is_floating_point():
        if index.dtype is torch.bool or not _is_known(index, weight.entry):
            return NotImplemented
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool):
        return NotImplemented
    size = weight.shape[0]
    if not -size <= index < size or not weight.entry.filler.can_split:
        return NotImplemented
    weight.entry.used.add(weight.place)
    return weight.entry.of(weight.entry.filler.item(weight.place, index % size))


def _entry(*weights: Any) -> Entry | None:
    return next((w.entry for w in weights if is_perturbed(w)), None)


def _is_known(x: Any, entry: Entry) -> bool:
    """Whether x is a tensor whose values at each lane can be had.

    Raises:
        Unshareable: If lanes that run together meet a layer outside of the model's own forward.
    """
    if type(x) is not torch.Tensor or x.layout is not torch.strided:
        return False
    if entry.points is not None:
        return entry.points.is_plain(x)
    if entry.count > 1:
        raise Unshareable("a layer was entered outside of the model's own forward")
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _each(x: Any, weights: tuple, operation: Callable[..., torch.Tensor]) -> Any:
    """The operation on each lane's part of x, with its own weights."""
    if isinstance(x, PerturbedLogits):
        x = x.computed()
    entry = _entry(*weights)
    if entry is None or not _is_known(x, entry):
        return NotImplemented
    values = resolve(*weights)
    if entry.points is None:
        return operation(x, *values[0])
    parts = entry.points.parts(x)
    return entry.points.join([operation(p, *w) for p, w in zip(parts, values, strict=True)])


OPERATIONS.update(
    {
        F.linear: _linear,
        F.embedding: _embedding,
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
        torch.addmm: _addmm,
        torch.matmul: _matmul,
        torch.Tensor.matmul: _matmul,
        torch.Tensor.__matmul__: _matmul,
        F.conv1d: _convolution(F.conv1d),
        F.conv2d: _convolution(F.conv2d),
        F.conv3d: _convolution(F.conv3d),
        torch.mul: _elementwise(torch.mul),
        torch.Tensor.mul: _elementwise(torch.mul),
        torch.add: _elementwise(torch.add),
        torch.Tensor.add: _elementwise(torch.add),
        torch.Tensor.__getitem__: _item,
    }
)

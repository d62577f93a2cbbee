"""Operations at θ + σ·left·rightᵀ by the stored weights: a product more of two vectors.

Where points share a forward, so do they share each weight's read, and one product over the rows of
all of them. What comes in belongs to a point or is common to all (`zokernels.perturb.points`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from zokernels.perturb.factors import Vectors
from zokernels.perturb.weight import Entry, PerturbedWeight, is_perturbed, resolve, together


def vectors_of(weight: Any) -> Vectors | None:
    """The vectors by which a perturbed matrix is known; None where it has none."""
    return weight.entry.filler.factors.of(weight.place) if is_perturbed(weight) else None


def linear(x: torch.Tensor, weight: PerturbedWeight, bias: Any, vectors: Vectors) -> torch.Tensor:
    """`torch.nn.functional.linear`."""
    return _product(x, weight, weight.stored.t(), bias, vectors.right, vectors.left, vectors)


def matmul(x: torch.Tensor, weight: PerturbedWeight, bias: Any, vectors: Vectors) -> torch.Tensor:
    """``x @ weight + bias``, of a weight of shape (in, out)."""
    return _product(x, weight, weight.stored, bias, vectors.left, vectors.right, vectors)


def _product(
    x: torch.Tensor,
    weight: PerturbedWeight,
    matrix: torch.Tensor,
    bias: Any,
    taken: torch.Tensor,
    given: torch.Tensor,
    vectors: Vectors,
) -> torch.Tensor:
    """``x @ matrix + bias``, and with it scale · (x · taken) · given; signs as in `Vectors`."""
    entry, points = weight.entry, weight.entry.points
    entry.used.add(weight.place)
    whole, lanes = x, 1
    if points is not None:
        known, lanes = points.whole(x), points.count
        whole = x.expand(lanes, *x.shape) if known is None else known
    # Said in numbers: of no rows at all, as an expert may get, torch would not know how many.
    rows = whole.reshape(lanes, x.shape[:-1].numel(), whole.shape[-1])
    # What is added lies there before the product is, and so the sum is rounded once: a product that
    # has been rounded to 16 bits would lose what is less than half of its last place.
    y = vectors.shift(rows, taken, given, _bias(entry, bias))
    if torch.is_autocast_enabled(rows.device.type):
        # It knows of no product into what is there.
        product = rows @ matrix
        y = product + y.to(product.dtype)
    else:
        y.flatten(0, 1).addmm_(rows.flatten(0, 1), matrix)
    y = y.view(*whole.shape[:-1], y.shape[-1])
    return y if points is None else points.wrap(y)


def parts(
    stored: torch.Tensor,
    vectors: Vectors,
    flat: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    step: int,
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """Products with ``step`` rows of a matrix after the other, begin … end − 1: one a lane.

    Args:
        stored: The matrix, of shape (out, in).
        vectors: Its own.
        flat: What each lane multiplies it with, of shape (rows, in).
        biases: Each lane's, of shape (out,), or None.
        step: How many rows of the matrix at a time.
    """
    together = torch.cat(list(flat))
    lanes = [vectors.of(k) for k in range(len(flat))]
    for begin in range(0, len(stored), step):
        end = min(begin + step, len(stored))
        found = []
        for own, x, bias in zip(lanes, flat, biases, strict=True):
            beside = None if bias is None else bias[begin:end]
            found.append(own.shift(x.unsqueeze(0), own.right, own.left[:, begin:end], beside)[0])
        y = torch.cat(found) if len(found) > 1 else found[0]
        y = y.addmm_(together, stored[begin:end].t())
        yield begin, end, list(y.split([len(x) for x in flat]))


def convolution(
    operation: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: PerturbedWeight,
    bias: Any,
    vectors: Vectors,
    place: dict[str, Any],
) -> torch.Tensor:
    """`torch.nn.functional.conv1d` and its like, in any number of dimensions.

    Args:
        operation: Which.
        x: Its input, with a batch or without.
        weight: Of shape (out, in / groups, *size).
        bias: Of shape (out,), perturbed or not, or None.
        vectors: The weight's.
        place: The operation's stride, padding, dilation and groups.
    """
    entry, stored, points = weight.entry, weight.stored, weight.entry.points
    entry.used.add(weight.place)
    beside = _bias(entry, bias)
    if points is None:
        y = operation(x, stored, beside, **place)
        _add_convolution(operation, y, x, stored.shape, vectors, place)
        return y
    whole, has_own = points.whole(x), beside is not None and beside.dim() == 3
    common_bias = None if has_own else beside
    if whole is None:
        y = operation(x, stored, common_bias, **place)
        y = y.expand(points.count, *y.shape).clone()
    elif whole.dim() > stored.dim():
        y = operation(whole.flatten(0, 1), stored, common_bias, **place)
        y = y.unflatten(0, whole.shape[:2])
    else:
        y = operation(whole, stored, common_bias, **place)
    for k, part in enumerate(points.parts(x)):
        _add_convolution(operation, y[k], part, stored.shape, vectors.of(k), place)
    if beside is not None and has_own:
        y += beside.view(
            points.count, *[1] * (x.dim() + 1 - stored.dim()), -1, *[1] * (stored.dim() - 2)
        )
    return points.wrap(y)


def _add_convolution(
    operation: Callable[..., torch.Tensor],
    y: torch.Tensor,
    x: torch.Tensor,
    shape: torch.Size,
    vectors: Vectors,
    place: dict[str, Any],
) -> None:
    """Add to an output, in place, what its input gives with scale · left · rightᵀ."""
    left, right, groups = vectors.left[0], vectors.right[0], place["groups"]
    channels = 1 - len(shape)
    if len(shape) == 3:
        # A row is one of an output's inputs: each input is filtered alike, and then they are mixed.
        inputs = x.shape[channels]
        filters = right.expand(inputs, 1, -1)
        filtered = operation(x, filters, None, **{**place, "groups": inputs})
        mixed = operation(filtered, left.view(*shape[:2], 1), None, groups=groups)
        vectors.add(y, mixed, y.new_ones(()))
        return
    # A row is an output: all outputs of a group are one filter's, times their signs.
    filters = right.view(1, *shape[1:]).expand(groups, *shape[1:])
    filtered = operation(x, filters, None, **place).unsqueeze(channels)
    signs = left.view(groups, -1, *[1] * (len(shape) - 2))
    by_group = y.unflatten(channels, signs.shape[:2])
    vectors.add(by_group, filtered, signs)


def _bias(entry: Entry, bias: Any) -> torch.Tensor | None:
    """What all lanes have in common as it is, or each lane's, with three dimensions."""
    if is_perturbed(bias):
        if entry.count == 1:
            return resolve(bias)[0][0]
        each = together(bias)
    else:
        known = None if bias is None or entry.points is None else entry.points.whole(bias)
        if known is None:
            return bias
        each = known
    return each.reshape(len(each), *[1] * (3 - each.dim()), *each.shape[1:])

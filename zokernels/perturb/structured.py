"""Operations at θ + σ·left·rightᵀ by the stored weights: a product more of two vectors.

Where points share a forward, so do they share each weight's read, and one product over the rows of
all of them. What comes in belongs to a point or is common to all (`zokernels.perturb.points`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from zokernels.perturb.factors import Vectors
from zokernels.perturb.weight import Entry, PerturbedWeight, is_perturbed, resolve

# A product with the stored weight, given what comes in and a bias.
Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def vectors_of(weight: Any) -> Vectors | None:
    """The vectors by which a perturbed matrix is known; None where it has none."""
    return weight.entry.filler.factors.of(weight.place) if is_perturbed(weight) else None


def linear(x: torch.Tensor, weight: PerturbedWeight, bias: Any, vectors: Vectors) -> torch.Tensor:
    """`torch.nn.functional.linear`."""
    stored = weight.stored

    def product(rows: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return F.linear(rows, stored, b)

    return _product(x, weight, product, vectors.right, vectors.left, vectors, bias)


def matmul(x: torch.Tensor, weight: PerturbedWeight, bias: Any, vectors: Vectors) -> torch.Tensor:
    """``x @ weight + bias``, of a weight of shape (in, out)."""
    stored = weight.stored

    def product(rows: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        if b is not None and rows.dim() == 2:
            return torch.addmm(b, rows, stored)
        return rows @ stored if b is None else rows @ stored + b

    return _product(x, weight, product, vectors.left, vectors.right, vectors, bias)


def _product(
    x: torch.Tensor,
    weight: PerturbedWeight,
    product: Product,
    taken: torch.Tensor,
    given: torch.Tensor,
    vectors: Vectors,
    bias: Any,
) -> torch.Tensor:
    """``product(x, bias)``, and with it scale · (x · taken) · given; signs as in `Vectors`."""
    entry = weight.entry
    entry.used.add(weight.place)
    own = _values(entry, bias)
    if entry.points is None:
        y = product(x, own[0])
        return vectors.add(y, torch.matmul(x, taken[0]).unsqueeze(-1), given[0])
    points = entry.points
    whole, is_common = points.whole(x), own[0] is own[-1]
    common_bias = own[0] if is_common else None
    if whole is None:
        y = product(x, common_bias).expand(points.count, *x.shape[:-1], -1).clone()
        dots = torch.matmul(x, taken.t()).movedim(-1, 0)
    else:
        y = product(whole, common_bias)
        rows = whole.reshape(points.count, -1, whole.shape[-1])
        dots = torch.bmm(rows, taken.unsqueeze(-1)).view(whole.shape[:-1])
    vectors.add(y, dots.unsqueeze(-1), _beside(given, y))
    if not is_common:
        y += _beside(torch.stack(own), y)  # type: ignore[arg-type]
    return points.wrap(y)


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
    dots = [torch.mv(x, r).unsqueeze(-1) for x, r in zip(flat, vectors.right, strict=True)]
    together, sizes = torch.cat(list(flat)), [len(x) for x in flat]
    for begin in range(0, len(stored), step):
        end = min(begin + step, len(stored))
        found = list(F.linear(together, stored[begin:end]).split(sizes))
        for k, (y, bias) in enumerate(zip(found, biases, strict=True)):
            vectors.of(k).add(y, dots[k], vectors.left[k, begin:end])
            if bias is not None:
                y += bias[begin:end]
        yield begin, end, found


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
    own = _values(entry, bias)
    if points is None:
        y = operation(x, stored, own[0], **place)
        _add_convolution(operation, y, x, stored.shape, vectors, place)
        return y
    whole, is_common = points.whole(x), own[0] is own[-1]
    common_bias = own[0] if is_common else None
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
    if not is_common:
        biases = torch.stack(own)  # type: ignore[arg-type]
        y += biases.view(
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


def _values(entry: Entry, bias: Any) -> list[torch.Tensor | None]:
    """A bias for each lane; one and the same where they have it in common."""
    if is_perturbed(bias):
        return [b for (b,) in resolve(bias)]
    if bias is None or entry.points is None:
        return [bias] * entry.count
    return list(entry.points.parts(bias))


def _beside(own: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A row of each point, of shape (points, width), beside rows of shape (points, …, width)."""
    return own.view(len(own), *[1] * (y.dim() - 2), -1)

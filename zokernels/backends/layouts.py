"""How a tensor lies in memory: row by row, as the passes take it, or in another order.

A convolution's weight in channels_last, a transposed matrix and a slice of columns hold each
element once, in another order than the noise counts them; in an expanded tensor several elements
are one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from zokernels.backends import shards


def is_row_major(tensor: torch.Tensor) -> bool:
    """Whether a pass takes the tensor as it lies; of a `DTensor` the pass itself sees to that."""
    return tensor.is_contiguous() or shards.is_sharded(tensor)


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a pass takes it: itself, or a copy."""
    return tensor if is_row_major(tensor) else tensor.detach().contiguous()


def by_device(tensors: Sequence[torch.Tensor]) -> dict[torch.device, list[int]]:
    """The positions of the tensors of each device."""
    found: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault(t.device, []).append(i)
    return found


def shaped(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A run of memory as a tensor of another's shape, and of its order where that has no gaps."""
    if like.is_contiguous():
        return memory.view(like.shape)
    strides = torch.empty_like(like, device="meta").stride()
    return memory.as_strided(like.shape, strides)


def check_apart(named: Mapping[str, torch.Tensor]) -> None:
    """Raise unless every element of every tensor has memory of its own.

    Args:
        named: Tensors in any layout, by what a message calls them.

    Raises:
        ValueError: Naming the tensor that has an element in several places, or the two that share.
    """
    spans = []
    for name, tensor in named.items():
        t = shards.local(tensor)
        # What has no memory, or not yet, shares none.
        if t.layout is not torch.strided or not t.numel() or not t.data_ptr():
            continue
        if _repeats(t):
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} has strides {t.stride()}: some of its elements "
                "share memory, as an expanded tensor's do, and can't be trained apart; give each "
                "its own, p.data = p.data.contiguous(), or freeze it."
            )
        begin = t.data_ptr()
        spans.append(_Span(str(t.device), begin, begin + _extent(t) * t.element_size(), name, t))
    for near in _clusters(sorted(spans, key=lambda s: (s.device, s.begin))):
        if shared := _sharing(near):
            raise ValueError(
                f"{shared[0]} and {shared[1]} share memory, but each weight may be written once; "
                "make them one parameter (b.weight = a.weight), give one of them its own "
                "(p.data = p.data.clone()), or freeze it."
            )


class _Span(NamedTuple):
    """The addresses from a tensor's first element to the end of its last one, gaps included."""

    device: str
    begin: int
    end: int
    name: str
    tensor: torch.Tensor


def _repeats(t: torch.Tensor) -> bool:
    """Whether an element has the memory of another; of an exotic stride that is assumed."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _extent(t: torch.Tensor) -> int:
    return 1 + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))


def _clusters(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Spans, in order, by what they reach into: those that meet no other stand alone."""
    found: list[list[_Span]] = []
    device, end = "", 0
    for span in spans:
        if span.device != device or span.begin >= end:
            found.append([])
            device, end = span.device, span.end
        found[-1].append(span)
        end = max(end, span.end)
    return found


def _sharing(spans: Sequence[_Span]) -> tuple[str, str] | None:
    """Two of the tensors, whose spans meet, that share an element; None if none do."""
    if len(spans) == 1:
        return None
    start, size = spans[0].begin, spans[0].tensor.element_size()
    held = torch.full(((max(s.end for s in spans) - start) // size,), -1, dtype=torch.int32)
    for j, (_, begin, _, name, t) in enumerate(spans):
        # Of another size they are views of the same memory, whatever the elements.
        if t.element_size() != size:
            return spans[0].name, name
        here = held.as_strided(t.shape, t.stride(), (begin - start) // size)
        if (owner := int(here.max())) >= 0:
            return spans[owner].name, name
        here.fill_(j)
    return None

"""How a tensor lies in memory: row by row, as the passes take it, or in another order.

A convolution's weight in channels_last, a transposed matrix and a slice of columns hold each
element once, in another order than the noise counts them; in an expanded tensor several elements
are one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

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
    for name, tensor in named.items():
        t = shards.local(tensor)
        if _has_memory(t) and _repeats(t):
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} has strides {t.stride()}: some of its elements "
                "share memory, as an expanded tensor's do, and can't be trained apart; give each "
                "its own, p.data = p.data.contiguous(), or freeze it."
            )
    for near in _clusters(_spans(named)):
        if shared := _sharing(near):
            raise ValueError(
                f"{shared[0]} and {shared[1]} share memory, but each weight may be written once; "
                "make them one parameter (b.weight = a.weight), give one of them its own "
                "(p.data = p.data.clone()), or freeze it."
            )


def check_known(named: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    """Raise unless what is perturbed by its own name is read by that alone.

    Args:
        named: What is trained, by what a message calls it.
        others: What else of the model has memory.

    Raises:
        ValueError: Naming one of each that share some.
    """
    for near in _clusters(_spans({**others, **named})):
        for one in (span for span in near if span.name in named):
            for other in (span for span in near if span.name in others):
                if _sharing(sorted([one, other], key=lambda s: s.begin)):
                    raise ValueError(
                        f"{one.name} shares memory with {other.name}, which is not trained: an "
                        "update moves both, and a perturbed forward only the first. Make them one "
                        "parameter (b.weight = a.weight), give one of them its own memory "
                        "(p.data = p.data.clone()), or use perturb='in_place'."
                    )


def _has_memory(t: torch.Tensor) -> bool:
    # What has no memory, or not yet, shares none.
    return t.layout is torch.strided and t.numel() > 0 and not is_lazy(t) and t.data_ptr() != 0


def _spans(named: Mapping[str, torch.Tensor]) -> list[_Span]:
    """Where the tensors that have memory lie, in order."""
    found = []
    for name, tensor in named.items():
        t = shards.local(tensor)
        if _has_memory(t):
            begin = t.data_ptr()
            end = begin + _extent(t) * t.element_size()
            found.append(_Span(str(t.device), begin, end, name, t))
    return sorted(found, key=lambda s: (s.device, s.begin))


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

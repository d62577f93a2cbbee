"""Exact selection by magnitude over many tensors, in a few readings and without a copy of them.

The pattern of a non-negative float, read as an integer, sorts as the float does; so its digits of
16 bits are found one after the other, each from a histogram of 65,536 counts. `torch.quantile`
refuses more than 16 million elements, and `torch.kthvalue` needs them in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zokernels.backends import shards

_CHUNK = 1 << 20
_DIGITS = 1 << 16


def magnitude_at(tensors: Sequence[torch.Tensor], share: float) -> float:
    """The k-th smallest ``|w|`` of all elements, k = round(share · their number), at least 1.

    Args:
        tensors: Floating-point tensors with at least one element between them.
        share: Share of the elements that shall not exceed the result, 0 … 1.

    Raises:
        ValueError: If there is no element, or the k-th is infinite or NaN.
    """
    total = sum(t.numel() for t in tensors)
    if not total:
        raise ValueError("There is no weight to select from: every tensor is empty.")
    rank = max(1, round(share * total))
    width = 64 if any(t.dtype is torch.float64 for t in tensors) else 32
    found = 0
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(_DIGITS, dtype=torch.int64)
        for pattern in _patterns(tensors, width):
            if shift < width - 16:
                pattern = pattern[pattern >> (shift + 16) == found]
            counts += torch.bincount(pattern >> shift & (_DIGITS - 1), minlength=_DIGITS).cpu()
        at_most = counts.cumsum(0)
        digit = int(torch.searchsorted(at_most, rank))
        rank -= int(at_most[digit - 1]) if digit else 0
        found = found << 16 | digit
    kinds = (torch.int32, torch.float32) if width == 32 else (torch.int64, torch.float64)
    threshold = torch.tensor(found, dtype=kinds[0]).view(kinds[1]).item()
    if not threshold < float("inf"):
        raise ValueError(
            f"The weight at share {share} has the magnitude {threshold}, but it must be finite; "
            "the weights hold infinities or NaN."
        )
    return threshold


def share_at_most(tensor: torch.Tensor, threshold: float) -> float:
    """The share of the elements with ``|w| ≤ threshold``; 0 of an empty tensor."""
    count = sum(int((part.abs().double() <= threshold).sum()) for part in _parts(tensor))
    return count / max(1, tensor.numel())


def _patterns(tensors: Sequence[torch.Tensor], width: int) -> Iterator[torch.Tensor]:
    wide = (torch.float32, torch.int32) if width == 32 else (torch.float64, torch.int64)
    for t in tensors:
        for part in _parts(t):
            yield part.abs().to(wide[0]).view(wide[1])


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    whole = shards.whole(tensor.detach())
    yield from whole.reshape(-1).split(_CHUNK) if tensor.numel() else ()

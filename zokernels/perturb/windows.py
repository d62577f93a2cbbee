"""Which weights are made in one pass: small ones, and large ones that a forward asks for in turn.

A pass a weight costs the host of a GPU more than the device. The order is learned from a forward,
and a window holds as many weights as fit in the memory of the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Elements that a window may hold, even where the largest weight has fewer.
_LEAST = 1 << 22
# How often the order may turn out to be another one before weights are made one by one.
_PLANS = 3
# Elements of a group of small weights; what is in it begins at a cache line, so that a sum's order
# does not hang on it.
GROUP, _ALIGN = 1 << 18, 64


class Windows:
    """The windows of forwards of one kind.

    Args:
        params: The parameters, of which forwards ask for some.
    """

    def __init__(self, params: Sequence[torch.Tensor]):
        self._sizes = [p.numel() for p in params]
        self._kinds = [(p.dtype, p.device) for p in params]
        self._asked: list[int] = []
        self._windows: list[tuple[int, ...]] = []
        self._next = 0
        self._plans = 0
        self._is_learning, self._is_missed = True, False

    def begin(self) -> None:
        """A forward begins: it asks for weights in the order of one before, or so we hope."""
        if self._is_missed:
            self._windows, self._is_learning = [], True
        elif self._is_learning and self._asked and self._plans < _PLANS:
            self._windows, self._is_learning = self._cut(self._asked), False
            self._plans += 1
        self._asked, self._next, self._is_missed = [], 0, False

    def relearn(self) -> None:
        """Forwards no longer ask for all that they did: from the next on, what they do is learned.

        What was planned serves the one under way.
        """
        self._is_missed = True

    def ask(self, i: int) -> tuple[int, ...]:
        """What to make now that the forward asks for a weight that is not in memory."""
        self._asked.append(i)
        for n in range(self._next, len(self._windows)):
            if i in self._windows[n]:
                self._next = n + 1
                return self._windows[n]
        self._is_missed = self._is_missed or not self._is_learning
        return (i,)

    def _cut(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        # A head whose logits wait is never made whole: only what is asked for counts.
        most = max([_LEAST, *(self._sizes[i] for i in order)])
        windows: list[tuple[int, ...]] = []
        last: tuple[torch.dtype, torch.device] | None = None
        held = 0
        for i in order:
            if windows and i in windows[-1]:
                continue
            if self._kinds[i] != last or held + self._sizes[i] > most:
                windows.append(())
                held = 0
            windows[-1] += (i,)
            last, held = self._kinds[i], held + self._sizes[i]
        return windows


def group_small(
    params: Sequence[torch.Tensor], most: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Groups of small parameters of one kind: their numbers, and where each begins in scratch.

    Small is what has at most so many elements as ``most`` says of it.

    What is not row-major is filled one by one, so that such parameters have groups of their own.
    """
    groups: list[tuple[list[int], list[int]]] = []
    end: dict[int, int] = {}
    open_group: dict[tuple, int] = {}
    for i, (p, small) in enumerate(zip(params, most, strict=True)):
        if p.numel() > small:
            continue
        kind = (p.dtype, p.device, p.is_contiguous())
        g = open_group.get(kind)
        if g is None or end[g] + p.numel() > GROUP:
            g = open_group[kind] = len(groups)
            groups.append(([], []))
            end[g] = 0
        groups[g][0].append(i)
        groups[g][1].append(end[g])
        end[g] += aligned(p.numel())
    return groups


def aligned(elements: int) -> int:
    """So many elements, to the end of a cache line."""
    return -(-elements // _ALIGN) * _ALIGN

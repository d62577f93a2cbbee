"""Which large weights are made in one pass: those that a forward asks for one after the other.

A pass a weight costs the host of a GPU more than the device. The order is learned from a forward,
and a window holds as many weights as fit in the memory of the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Elements that a window may hold, even where the largest weight has fewer.
_LEAST = 1 << 22
# How often the order may turn out to be another one before weights are made one by one.
_PLANS = 3


class Windows:
    """The windows of forwards of one kind.

    Args:
        params: The parameters, of which forwards ask for some.
    """

    def __init__(self, params: Sequence[nn.Parameter]):
        self._sizes = [p.numel() for p in params]
        self._kinds = [(p.dtype, p.device) for p in params]
        self._most = max([_LEAST, *self._sizes])
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

    def ask(self, i: int) -> tuple[int, ...]:
        """What to make now that the forward asks for a weight that is not in memory."""
        self._asked.append(i)
        for n in range(self._next, len(self._windows)):
            if i in self._windows[n]:
                self._next = n + 1
                return self._windows[n]
        self._is_missed = not self._is_learning
        return (i,)

    def _cut(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        windows: list[tuple[int, ...]] = []
        last: tuple[torch.dtype, torch.device] | None = None
        held = 0
        for i in order:
            if windows and i in windows[-1]:
                continue
            if self._kinds[i] != last or held + self._sizes[i] > self._most:
                windows.append(())
                held = 0
            windows[-1] += (i,)
            last, held = self._kinds[i], held + self._sizes[i]
        return windows

"""Making perturbed weights, in scratch memory of the size of the largest layer.

A forward has lanes: one, or several that share it, each at its own point. What a forward reads
again is kept until its end, as far as a bound allows, and else made again.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Hashable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from zokernels import masks
from zokernels.backends import layouts
from zokernels.perturb.drawing import Drawing, Lane, Values
from zokernels.perturb.factors import Factors
from zokernels.perturb.windows import Windows, aligned, group_small

# Tensors of up to so many elements are filled together.
SMALL = 1 << 14
# Bytes a lane of what a forward reads again, and so is kept.
_KEPT = 1 << 26
# How often a forward may make its weights, on average, before that is said.
_OFTEN = 4


class Filler:
    """The perturbed values of parameters, for each lane of a forward.

    Args:
        params: Parameters, on any devices and in any layout.
        keep: Keep the memory of every value, so that it has the same address in each forward.

    Attributes:
        lanes: The points of the forward that is under way.
        sources: The stored weights, while one is.
        factors: What is known of matrices by two vectors, and not made.
        seconds: Time spent in here.
        matrices: How many were made whole so far, one for each lane that has its own.
    """

    # Whether operations may go by factors where they know how.
    has_factors = True

    def __init__(self, params: Sequence[nn.Parameter], keep: bool = False):
        self.params = list(params)
        self.sources: list[torch.Tensor] = []
        self.keep = keep
        self.lanes: Sequence[Lane] = ()
        self.seconds = 0.0
        self.matrices = 0
        self.factors = Factors(keep)
        self._drawing = Drawing(keep)
        self._scratch: dict[tuple, torch.Tensor] = {}
        self._addresses: tuple = ()
        self._groups: list[tuple[list[int], list[int]]] = []
        self._group_of: dict[int, int] = {}
        # Where a group's parameters lie in scratch: for each lane, a place a parameter.
        self._pieces: dict[tuple[int, int], list[dict[int, torch.Tensor]]] = {}
        # The values that are there until the forward ends, and those of a window or nothing.
        self._held: dict[int, Values] = {}
        self._window: dict[int, Values] = {}
        self._together: dict[int, torch.Tensor] = {}
        # What this forward has made, what forwards make more than once, and what that comes to.
        self._made: set[int | tuple[int, int]] = set()
        self._again: set[int] = set()
        self._room = self._elements = self._elements_again = 0
        self._is_warned = False
        # Of each number of lanes.
        self._windows: dict[int, Windows] = {}
        self._places: dict[tuple, tuple[list[Values], dict[int, Values]]] = {}

    def begin(self, lanes: Sequence[Lane]) -> None:
        """What is asked for from here on is for a forward at these points."""
        self.sources = [p.detach() for p in self.params]
        addresses = [(p.data_ptr(), p.dtype, p.shape, p.stride()) for p in self.sources]
        in_factors = any(lane is not None and lane.dist == "rank1" for lane in lanes)
        if (addresses, in_factors) != self._addresses:
            self._forget_places()
            self._addresses = (addresses, in_factors)
            # A group is made whole, and matrices that have factors need not be.
            most = [0 if in_factors and p.dim() > 1 else SMALL for p in self.sources]
            self._groups = group_small(self.sources, most)
            self._group_of = {i: g for g, (chosen, _) in enumerate(self._groups) for i in chosen}
            self._windows.clear()
        self.lanes = lanes
        self._drawing.begin(lanes, self.sources)
        if self.has_factors:
            with self._timed():
                self.factors.begin(lanes, self.sources)
        self._held, self._window, self._together, self._made = {}, {}, {}, set()
        self._room = _KEPT
        self._elements = self._elements_again = 0
        if len(lanes) not in self._windows:
            self._windows[len(lanes)] = Windows(self.sources)
        self._windows[len(lanes)].begin()

    def end(self) -> None:
        """The forward is over."""
        self._held, self._window, self._together, self.sources = {}, {}, {}, []
        self.factors.end()
        if self._elements_again > (_OFTEN - 1) * self._elements and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                "A perturbed forward reads its weights again and again (it generates text, or runs "
                "a cell in a loop), and makes them "
                f"{1 + self._elements_again / self._elements:.0f} times, since they are more than "
                "are kept; perturb='in_place' makes them once, and keeps a copy of the trainable "
                "weights.",
                stacklevel=2,
            )

    def release(self) -> None:
        """Give the scratch memory back; it is made again when it is needed."""
        self._scratch.clear()
        self.factors.release()
        self._held, self._window = {}, {}
        self._forget_places()

    @property
    def can_split(self) -> bool:
        """Whether a part of a parameter can be made without the rest."""
        return not any(lane and isinstance(lane.mask, masks.Bits) for lane in self.lanes)

    def values(self, chosen: Sequence[int]) -> list[Values]:
        """The values of some parameters, in scratch: use them before the next call."""
        held, window = self._held, self._window
        try:
            return [held[i] if i in held else window[i] for i in chosen]
        except KeyError:
            pass
        with self._timed():
            found: list[Values] = []
            # One large tensor has scratch of its own; what comes besides has not.
            large = False
            for i in chosen:
                if i in self._held:
                    found.append(self._held[i])
                elif i in self._group_of:
                    found.append(self._small(i))
                elif i in self._window:
                    large = True
                    found.append(self._window[i])
                elif self._keeps(i, i):
                    found.append(self._keep(i))
                else:
                    found.append(self._fresh(i) if large else self._large(i))
                    large = True
            return found

    def fresh(self, i: int) -> Values:
        """The values of a parameter, in memory that is theirs until the forward ends."""
        if i in self._held:
            return self._held[i]
        with self._timed():
            if i in self._group_of:
                return self._small(i)
            return self._keep(i) if self._keeps(i, i) else self._fresh(i)

    def hold(self, i: int) -> Values:
        """The values of a parameter, the same memory for all who ask, which may be written."""
        with self._timed():
            if i not in self._held or None in self.lanes:
                self._keep(i)
            return self._held[i]

    def hold_together(self, i: int) -> torch.Tensor:
        """What `hold` gives, as one tensor whose first dimension is the lanes."""
        whole = self._together.get(i)
        if whole is None:
            whole = self._together[i] = torch.stack(self.hold(i))
            self._held[i] = list(whole.unbind())
        return whole

    def item(self, i: int, at: int) -> Values:
        """One of those that a parameter has in its first dimension, in memory of its own."""
        if i in self._held:
            return [w[at] for w in self._held[i]]
        with self._timed():
            p = self.sources[i]
            size = p[at].numel()
            self._count((i, at), size)
            self._count_matrix(p)
            out = [
                p[at] if lane is None else self._own(("own", i, k, at), p[at])
                for k, lane in enumerate(self.lanes)
            ]
            self._drawing.fill_range(None, i, at * size, (at + 1) * size, out)
            return out

    def _keeps(self, i: int, what: int | tuple[int, int]) -> bool:
        """Whether to keep a parameter of which a forward asks for this: it does so again."""
        if what in self._made and i not in self._again:
            # A window that was planned before has it, too.
            self._again.add(i)
            for windows in self._windows.values():
                windows.relearn()
        return i in self._again and self.sources[i].nbytes <= self._room

    def _keep(self, i: int) -> Values:
        p = self.sources[i]
        self._room -= p.nbytes
        self._count(i, p.numel())
        self._count_matrix(p)
        memory = [self._piece(("own", i, k), p, p.numel()) for k in range(len(self.lanes))]
        out = [layouts.shaped(m, p) for m in memory]
        for o, lane in zip(out, self.lanes, strict=True):
            if lane is None:
                o.copy_(p)
        self._drawing.fill(("own", i), [i], [[o] for o in out])
        self._held[i] = out
        return out

    def _count(self, what: int | tuple[int, int], elements: int) -> None:
        if what in self._made:
            self._elements_again += elements
        else:
            self._elements += elements
        self._made.add(what)

    def _count_matrix(self, p: torch.Tensor) -> None:
        if p.dim() > 1:
            self.matrices += sum(lane is not None for lane in self.lanes)

    def part(self, i: int, begin: int, end: int) -> Values:
        """Rows ``begin`` … ``end`` − 1 of a matrix, in the scratch of `values`."""
        with self._timed():
            if i not in self._held and self._keeps(i, (i, begin)):
                self._keep(i)
            if i in self._held:
                return [w[begin:end] for w in self._held[i]]
            p = self.sources[i]
            first, last = begin * p.shape[1], end * p.shape[1]
            self._count((i, begin), last - first)
            out = self._take("large", p, last - first)
            self._window = {}
            self._drawing.fill_range(("part", i), i, first, last, out)
            return [
                p[begin:end] if lane is None else out[k].view(end - begin, p.shape[1])
                for k, lane in enumerate(self.lanes)
            ]

    def rows(self, i: int, numbers: Sequence[torch.Tensor]) -> Values:
        """Rows of a matrix, looked up, in memory of their own.

        Args:
            i: The parameter.
            numbers: For each lane an int64 tensor of any shape.

        Returns:
            For each lane a tensor of shape (*numbers, width).
        """
        if (vectors := self.factors.of(i)) is not None:
            with self._timed():
                return [vectors.rows(self.sources[i], n, k) for k, n in enumerate(numbers)]
        if (
            not self._drawing.is_native_for([self.sources[i]])
            or numbers[0].dtype is not torch.int64
        ):
            return [F.embedding(n, w) for n, w in zip(numbers, self.values([i])[0], strict=True)]
        with self._timed():
            p = self.sources[i]
            flat = [n.reshape(-1) for n in numbers]
            for n in flat:
                if len(n) and not 0 <= int(n.min()) <= int(n.max()) < len(p):
                    raise IndexError(
                        f"The batch looks up the rows {int(n.min())} to {int(n.max())} of an "
                        f"embedding that has {len(p)}; use the tokenizer that belongs to this "
                        "model."
                    )
            shape = (p.shape[1],)
            out = [torch.empty((len(n), *shape), dtype=p.dtype) for n in flat]
            self._drawing.fill_rows(i, flat, out)
            for k, point in enumerate(self.lanes):
                if point is None:
                    out[k] = F.embedding(flat[k], p)
            return [o.view(n.shape + shape) for o, n in zip(out, numbers, strict=True)]

    def _large(self, i: int) -> Values:
        p = self.sources[i]
        self._count(i, p.numel())
        self._count_matrix(p)
        if self._drawing.in_windows:
            return self._in_window(i)
        out = [layouts.shaped(o, p) for o in self._take("large", p, p.numel())]
        self._drawing.fill(("large", i), [i], [[o] for o in out])
        return [p if lane is None else out[k] for k, lane in enumerate(self.lanes)]

    def _in_window(self, i: int) -> Values:
        chosen = self._windows[len(self.lanes)].ask(i)
        out, held = self._places_of(chosen)
        self._drawing.fill(("window", chosen), chosen, out)
        self._window = held
        return held[i]

    def _places_of(self, chosen: tuple[int, ...]) -> tuple[list[Values], dict[int, Values]]:
        """Where the weights of a window lie: for each lane one a weight, and by their numbers."""
        key = (chosen, *(lane is None for lane in self.lanes))
        if key not in self._places:
            own = [self.sources[j] for j in chosen]
            starts = list(itertools.accumulate((aligned(p.numel()) for p in own), initial=0))
            out = [
                [m[s : s + p.numel()].view(p.shape) for s, p in zip(starts, own, strict=False)]
                for m in self._take("large", own[0], starts[-1])
            ]
            held = {
                j: [p if lane is None else out[k][n] for k, lane in enumerate(self.lanes)]
                for n, (j, p) in enumerate(zip(chosen, own, strict=True))
            }
            self._places[key] = (out, held)
        return self._places[key]

    def _fresh(self, i: int) -> Values:
        p = self.sources[i]
        self._count(i, p.numel())
        self._count_matrix(p)
        out = [
            p if lane is None else self._own(("own", i, k), p) for k, lane in enumerate(self.lanes)
        ]
        self._drawing.fill(None, [i], [[o] for o in out])
        return out

    def _own(self, name: tuple, like: torch.Tensor) -> torch.Tensor:
        if not self.keep:
            return torch.empty_like(like)
        return layouts.shaped(self._piece(name, like, like.numel()), like)

    def _small(self, i: int) -> Values:
        """A small parameter's values; all of its group are made, and are there from here on."""
        g = self._group_of[i]
        chosen, pieces = self._groups[g][0], self._pieces_of(g)
        self._drawing.fill(("group", g), chosen, [list(own.values()) for own in pieces])
        for j in chosen:
            self._count_matrix(self.sources[j])
            own = [
                self.sources[j] if lane is None else pieces[k][j]
                for k, lane in enumerate(self.lanes)
            ]
            # One that was written has memory of its own.
            self._held.setdefault(j, own)
        return self._held[i]

    def _pieces_of(self, g: int) -> list[dict[int, torch.Tensor]]:
        key = (g, len(self.lanes))
        if key not in self._pieces:
            chosen, starts = self._groups[g]
            own = [self.sources[j] for j in chosen]
            memory = self._take(("group", g), own[0], starts[-1] + own[-1].numel())
            self._pieces[key] = [
                {
                    j: layouts.shaped(m[s : s + p.numel()], p)
                    for j, s, p in zip(chosen, starts, own, strict=True)
                }
                for m in memory
            ]
        return self._pieces[key]

    def _take(self, name: Hashable, like: torch.Tensor, size: int) -> Values:
        """Scratch of at least ``size`` elements for each lane."""
        return [self._piece((name, k), like, size) for k in range(len(self.lanes))]

    def _piece(self, name: tuple, like: torch.Tensor, size: int) -> torch.Tensor:
        key = (*name, like.dtype, like.device)
        held = self._scratch.get(key)
        if held is None or held.numel() < size:
            self._forget_places()
            self._scratch.pop(key, None)
            held = self._scratch[key] = like.new_empty(size)
        return held[:size]

    def _forget_places(self) -> None:
        """What was prepared for memory that is no longer used is void."""
        self._drawing.forget()
        self._pieces.clear()
        self._places.clear()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        # A transform of torch.func around the model would wrap what is made for it.
        with torch._C._DisableFuncTorch():
            yield
        self.seconds += time.perf_counter() - started

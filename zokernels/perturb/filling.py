"""Making perturbed weights, in scratch memory of the size of the largest layer.

A forward has lanes: one, or several that share it, each at its own point. Two lanes on the two
sides of a direction are made by one draw.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from zokernels import masks
from zokernels.backends import checks, layouts, native
from zokernels.backends.plan import AddNoise
from zokernels.perturb.deferred import DeferredDirection, Prepared
from zokernels.perturb.direction import Direction, is_mirror
from zokernels.perturb.windows import Windows, aligned, group_small

# The point of a lane; None is θ itself.
Lane = Direction | None
Values = list[torch.Tensor]  # one tensor a lane

# Tensors of up to so many elements are filled together.
SMALL = 1 << 14


class Filler:
    """The perturbed values of parameters, for each lane of a forward.

    Args:
        params: Parameters, on any devices and in any layout.
        keep: Keep the memory of every value, so that it has the same address in each forward.

    Attributes:
        lanes: The points of the forward that is under way.
        seconds: Time spent in here.
    """

    def __init__(self, params: Sequence[nn.Parameter], keep: bool = False):
        self.params = list(params)
        self.keep = keep
        self.lanes: Sequence[Lane] = ()
        self.seconds = 0.0
        self._pairs: list[tuple[int, int | None]] = []
        self._is_native = self._in_windows = False
        # The lanes again, as other backends than native fill them.
        self._filling: Sequence[Lane] = ()
        self._known = Prepared()
        self._prepared: dict[tuple, native.Prepared] = {}
        self._scratch: dict[tuple, torch.Tensor] = {}
        self._addresses: list[tuple] = []
        self._groups: list[tuple[list[int], list[int]]] = []
        self._group_of: dict[int, int] = {}
        # Where a group's parameters lie in scratch: for each lane, a place a parameter.
        self._pieces: dict[tuple[int, int], list[dict[int, torch.Tensor]]] = {}
        # The values that are in scratch now: those of a group, and of a window or nothing.
        self._held: dict[int, Values] = {}
        self._group: dict[int, Values] = {}
        self._window: dict[int, Values] = {}
        # Of each number of lanes.
        self._windows: dict[int, Windows] = {}
        self._places: dict[tuple, tuple[list[Values], dict[int, Values]]] = {}

    def begin(self, lanes: Sequence[Lane]) -> None:
        """What is asked for from here on is for a forward at these points."""
        addresses = [(p.data_ptr(), p.dtype, p.stride()) for p in self.params]
        if addresses != self._addresses:
            self._forget_places()
            self._addresses = addresses
            self._groups = group_small(self.params, SMALL)
            self._group_of = {i: g for g, (chosen, _) in enumerate(self._groups) for i in chosen}
            self._windows.clear()
        self.lanes = lanes
        self._pairs = _pair(lanes)
        self._is_native = all(lane is None or self._takes_native(lane) for lane in lanes)
        self._filling = lanes if self._is_native else self._known.of(lanes)
        self._in_windows = not self._is_native and all(
            lane is None or lane.can_mirror for lane in self._filling
        )
        self._held, self._group, self._window = {}, {}, {}
        if len(lanes) not in self._windows:
            self._windows[len(lanes)] = Windows(self.params)
        self._windows[len(lanes)].begin()

    def release(self) -> None:
        """Give the scratch memory back; it is made again when it is needed."""
        self._scratch.clear()
        self._held, self._group, self._window = {}, {}, {}
        self._forget_places()

    @property
    def can_split(self) -> bool:
        """Whether a part of a parameter can be made without the rest."""
        return not any(lane and isinstance(lane.mask, masks.Bits) for lane in self.lanes)

    def values(self, chosen: Sequence[int]) -> list[Values]:
        """The values of some parameters, in scratch: use them before the next call."""
        try:
            return [self._held[i] for i in chosen]
        except KeyError:
            pass
        started = time.perf_counter()
        found: list[Values] = []
        # One large tensor and one group have scratch of their own; what comes besides has not.
        large, group = False, None
        for i in chosen:
            g = self._group_of.get(i)
            if i in self._window:
                found.append(self._window[i])
                large = True
            elif g is None and not large:
                large = True
                found.append(self._large(i))
            elif g is not None and group in (None, g):
                group = g
                found.append(self._small(i, g))
            else:
                found.append(self._fresh(i))
        self.seconds += time.perf_counter() - started
        return found

    def fresh(self, i: int) -> Values:
        """The values of a parameter, in memory of their own."""
        with self._timed():
            return self._fresh(i)

    def part(self, i: int, begin: int, end: int) -> Values:
        """Rows ``begin`` … ``end`` − 1 of a matrix, in the scratch of `values`."""
        with self._timed():
            p = self.params[i].detach()
            first, last = begin * p.shape[1], end * p.shape[1]
            out = self._take("large", p, last - first)
            self._hold_window({})
            if self._is_native_for([p]):
                for lane, a, b in self._draws():
                    prepared = self._prepare(("part", i), lane, [i], a, b, [[o] for o in out])
                    prepared.run_range(lane.seeds, lane.moves[i].scales, first, last)
            else:
                self._fill_lanes(
                    self._filling, [p[begin:end].reshape(-1)], [i], [[o] for o in out], [first]
                )
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
        if not self._is_native_for([self.params[i]]) or numbers[0].dtype is not torch.int64:
            return [F.embedding(n, w) for n, w in zip(numbers, self.values([i])[0], strict=True)]
        with self._timed():
            p = self.params[i].detach()
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
            for _, a, b in self._draws():
                together = b is not None and torch.equal(flat[a], flat[b])
                for k, mirror in ((a, b),) if together else ((a, None), (b, None)):
                    if k is None:
                        continue
                    own = self.lanes[k]
                    assert own is not None
                    prepared = self._prepare(None, own, [i], k, mirror, [[o] for o in out])
                    prepared.run_rows(own.seeds, own.moves[i].scales, flat[k])
            for k, point in enumerate(self.lanes):
                if point is None:
                    out[k] = F.embedding(flat[k], p)
            return [o.view(n.shape + shape) for o, n in zip(out, numbers, strict=True)]

    def _large(self, i: int) -> Values:
        if self._in_windows:
            return self._in_window(i)
        p = self.params[i].detach()
        out = [layouts.shaped(o, p) for o in self._take("large", p, p.numel())]
        self._fill(("large", i), [i], [[o] for o in out])
        return [p if lane is None else out[k] for k, lane in enumerate(self.lanes)]

    def _in_window(self, i: int) -> Values:
        chosen = self._windows[len(self.lanes)].ask(i)
        out, held = self._places_of(chosen)
        self._fill(None, chosen, out)
        self._hold_window(held)
        return held[i]

    def _hold_window(self, held: dict[int, Values]) -> None:
        self._window, self._held = held, {**self._group, **held}

    def _places_of(self, chosen: tuple[int, ...]) -> tuple[list[Values], dict[int, Values]]:
        """Where the weights of a window lie: for each lane one a weight, and by their numbers."""
        key = (chosen, *(lane is None for lane in self.lanes))
        if key not in self._places:
            own = [self.params[j].detach() for j in chosen]
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
        p = self.params[i].detach()
        out = [p if lane is None else self._own(i, k) for k, lane in enumerate(self.lanes)]
        if self._is_native or self.keep:
            self._fill(None, [i], [[o] for o in out])
        else:
            # What is prepared would hold on to this memory.
            self._fill_lanes(self.lanes, [p], [i], [[o] for o in out])
        return out

    def _own(self, i: int, k: int) -> torch.Tensor:
        p = self.params[i].detach()
        if not self.keep:
            return torch.empty_like(p)
        return layouts.shaped(self._piece(("own", i, k), p, p.numel()), p)

    def _small(self, i: int, g: int) -> Values:
        if i not in self._group:
            chosen, pieces = self._groups[g][0], self._pieces_of(g)
            self._fill(("group", g), chosen, [list(own.values()) for own in pieces])
            self._group = {
                j: [
                    self.params[j].detach() if lane is None else pieces[k][j]
                    for k, lane in enumerate(self.lanes)
                ]
                for j in chosen
            }
            self._held = {**self._group, **self._window}
        return self._group[i]

    def _pieces_of(self, g: int) -> list[dict[int, torch.Tensor]]:
        key = (g, len(self.lanes))
        if key not in self._pieces:
            chosen, starts = self._groups[g]
            own = [self.params[j].detach() for j in chosen]
            memory = self._take("group", own[0], starts[-1] + own[-1].numel())
            self._pieces[key] = [
                {
                    j: layouts.shaped(m[s : s + p.numel()], p)
                    for j, s, p in zip(chosen, starts, own, strict=True)
                }
                for m in memory
            ]
        return self._pieces[key]

    def _fill(self, what: tuple | None, chosen: Sequence[int], out: Sequence[Values]) -> None:
        """Fill ``out[lane][j]`` with the values of ``chosen[j]``; ``what`` names fixed memory."""
        sources = [self.params[i].detach() for i in chosen]
        if not self._is_native_for(sources):
            self._fill_lanes(self._filling, sources, chosen, out)
            return
        for lane, a, b in self._draws():
            scales = {lane.moves[i].scales for i in chosen}
            if len(scales) == 1:
                prepared = self._prepare(what, lane, chosen, a, b, out)
                prepared.run(lane.seeds, scales.pop())
            else:
                alone = [self.lanes[k] if k in (a, b) else None for k in range(len(out))]
                self._fill_lanes(alone, sources, chosen, out)

    def _fill_lanes(
        self,
        lanes: Sequence[Lane],
        sources: Sequence[torch.Tensor],
        chosen: Sequence[int],
        out: Sequence[Values],
        offsets: Sequence[int] | None = None,
    ) -> None:
        for a, b in self._pairs:
            one, other = lanes[a], None if b is None else lanes[b]
            if one is not None and other is not None and one.can_mirror:
                assert isinstance(one, DeferredDirection) and b is not None
                one.fill(sources, out[a], chosen, offsets, out[b])
                continue
            for lane, k in ((one, a), (other, b)):
                if lane is not None and k is not None:
                    lane.fill(sources, out[k], chosen, offsets)

    def _draws(self) -> Iterator[tuple[Direction, int, int | None]]:
        """Each lane whose noise must be drawn, its number, and that of its mirror image."""
        for a, b in self._pairs:
            lane = self.lanes[a]
            if lane is not None:
                yield lane, a, b

    def _prepare(
        self,
        what: tuple | None,
        lane: Direction,
        chosen: Sequence[int],
        a: int,
        b: int | None,
        out: Sequence[Values],
    ) -> native.Prepared:
        key = (what, a, b, len(lane.seeds), lane.dist)
        prepared = self._prepared.get(key) if what else None
        if prepared is None:
            prepared = native.Prepared(_plan(lane, chosen, out[a]), None if b is None else out[b])
            if what:
                self._prepared[key] = prepared
        return prepared

    def _take(self, name: str, like: torch.Tensor, size: int) -> Values:
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
        self._known.forget()
        self._prepared.clear()
        self._pieces.clear()
        self._places.clear()

    def _is_native_for(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether native kernels read these where they lie."""
        return self._is_native and all(map(layouts.is_row_major, sources))

    def _takes_native(self, lane: Direction) -> bool:
        if lane.is_deferred or lane.mask is not None:
            return False
        if lane.runs_by is not native:
            return False
        moves = set(lane.moves)
        for move in moves:
            for scale in move.scales:
                checks.binary32(checks.finite(scale, "a coefficient"), "a coefficient")
        return all(move.is_plain for move in moves)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def _plan(lane: Direction, chosen: Sequence[int], out: Sequence[torch.Tensor]) -> AddNoise:
    numbers = checks.numbers_of_pass(
        [lane.params[i].detach() for i in chosen], lane.seeds, lane.moves[chosen[0]].scales,
        streams=[lane.streams[i] for i in chosen], dist=lane.dist,
    )  # fmt: skip
    return AddNoise(**numbers, out=out)


def _pair(lanes: Sequence[Lane]) -> list[tuple[int, int | None]]:
    """The lanes, those next to each other together that mirror each other."""
    pairs: list[tuple[int, int | None]] = []
    k = 0
    while k < len(lanes):
        one, other = lanes[k], lanes[k + 1] if k + 1 < len(lanes) else None
        both = one is not None and other is not None and is_mirror(one, other)
        pairs.append((k, k + 1 if both else None))
        k += 2 if both else 1
    return pairs

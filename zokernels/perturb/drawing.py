"""Drawing the values of perturbed weights into memory, for every lane of a forward.

Two lanes on the two sides of a direction are made by one draw. What comes again and again is
prepared once: the native library's calls, and passes that read their numbers in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zokernels.backends import checks, layouts, native
from zokernels.backends.plan import AddNoise
from zokernels.perturb.deferred import DeferredDirection, Prepared
from zokernels.perturb.direction import Direction, is_mirror

# The point of a lane; None is θ itself.
Lane = Direction | None
Values = list[torch.Tensor]  # one tensor a lane


class Drawing:
    """Fills memory with the values of weights at the points of a forward's lanes.

    Args:
        keep: Whether memory has the same address in each forward, so that all may be prepared.

    Attributes:
        lanes: The points of the forward that is under way.
        sources: The stored weights.
        is_native: Whether the native library draws for all lanes.
        in_windows: Whether a pass a weight would cost the host more than the device.
    """

    def __init__(self, keep: bool):
        self.keep = keep
        self.lanes: Sequence[Lane] = ()
        self.sources: list[torch.Tensor] = []
        self.is_native = self.in_windows = False
        self._pairs: list[tuple[int, int | None]] = []
        # The lanes again, as other backends than native fill them.
        self._filling: Sequence[Lane] = ()
        self._known = Prepared()
        self._prepared: dict[tuple, native.Prepared] = {}

    def begin(self, lanes: Sequence[Lane], sources: list[torch.Tensor]) -> None:
        """A forward begins at these points."""
        self.lanes, self.sources = lanes, sources
        self._pairs = _pair(lanes)
        self.is_native = all(lane is None or _takes_native(lane) for lane in lanes)
        self._filling = lanes if self.is_native else self._known.of(lanes)
        self.in_windows = not self.is_native and all(
            lane is None or lane.can_mirror for lane in self._filling
        )

    def is_native_for(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the native library reads these where they lie."""
        return self.is_native and all(map(layouts.is_row_major, sources))

    def forget(self) -> None:
        """What was prepared for memory that is no longer used is void."""
        self._known.forget()
        self._prepared.clear()

    def fill(self, what: tuple | None, chosen: Sequence[int], out: Sequence[Values]) -> None:
        """Fill ``out[lane][j]`` with the values of ``chosen[j]``.

        Args:
            what: A name of memory that stays where it is; None for memory that may not.
            chosen: The parameters' numbers.
            out: For each lane one tensor a parameter; those of a lane at θ itself are not written.
        """
        sources = [self.sources[i] for i in chosen]
        if not self.is_native_for(sources):
            # What is prepared would hold on to memory that is nobody's afterwards.
            lanes = self._filling if what or self.keep else self.lanes
            self._fill_lanes(lanes, sources, chosen, out)
            return
        for lane, a, b in self._draws():
            scales = {lane.moves[i].scales for i in chosen}
            if len(scales) == 1:
                prepared = self._prepare(what, lane, chosen, a, b, out)
                prepared.run(lane.seeds, scales.pop())
            else:
                alone = [self.lanes[k] if k in (a, b) else None for k in range(len(out))]
                self._fill_lanes(alone, sources, chosen, out)

    def fill_range(self, what: tuple | None, i: int, first: int, last: int, out: Values) -> None:
        """Fill ``out[lane]`` with elements ``first`` … ``last`` − 1 of a parameter."""
        if self.is_native_for([self.sources[i]]):
            for lane, a, b in self._draws():
                prepared = self._prepare(what, lane, [i], a, b, [[o] for o in out])
                prepared.run_range(lane.seeds, lane.moves[i].scales, first, last)
            return
        lanes = self._filling if what or self.keep else self.lanes
        source = self.sources[i].reshape(-1)[first:last]
        self._fill_lanes(lanes, [source], [i], [[o.view(-1)] for o in out], [first])

    def fill_rows(self, i: int, rows: Sequence[torch.Tensor], out: Values) -> None:
        """Fill ``out[lane]`` with the rows of that number of a matrix; by the native library."""
        for _, a, b in self._draws():
            together = b is not None and torch.equal(rows[a], rows[b])
            for k, mirror in ((a, b),) if together else ((a, None), (b, None)):
                lane = None if k is None else self.lanes[k]
                if k is not None and lane is not None:
                    prepared = self._prepare(None, lane, [i], k, mirror, [[o] for o in out])
                    prepared.run_rows(lane.seeds, lane.moves[i].scales, rows[k])

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
            plan = self._plan(lane, chosen, out[a])
            prepared = native.Prepared(plan, None if b is None else out[b])
            if what:
                self._prepared[key] = prepared
        return prepared

    def _plan(self, lane: Direction, chosen: Sequence[int], out: Values) -> AddNoise:
        numbers = checks.numbers_of_pass(
            [self.sources[i] for i in chosen], lane.seeds, lane.moves[chosen[0]].scales,
            streams=[lane.streams[i] for i in chosen], columns=lane.columns_of(chosen),
            dist=lane.dist,
        )  # fmt: skip
        return AddNoise(**numbers, out=out)


def _takes_native(lane: Direction) -> bool:
    if lane.is_deferred or lane.mask is not None:
        return False
    if lane.runs_by is not native:
        return False
    moves = set(lane.moves)
    for move in moves:
        for scale in move.scales:
            checks.binary32(checks.finite(scale, "a coefficient"), "a coefficient")
    return all(move.is_plain for move in moves)


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

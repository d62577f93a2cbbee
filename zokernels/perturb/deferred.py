"""A direction whose seed and scales are in memory, and read there when a forward runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import torch

from zokernels import ops
from zokernels.backends import checks, layouts, shards
from zokernels.backends.deferred import Deferred, Given, reads_in_memory
from zokernels.backends.plan import AddNoise, Pass, bits32, signed
from zokernels.perturb.direction import Direction, Move, is_mirror

_ONE = bits32(1.0)


class DeferredDirection(Direction):
    """A direction with the numbers of its passes in memory.

    Args:
        like: The parameters, their streams, the mask and the backend.
        numbers: What each pass reads, by kind of parameter: see `zokernels.backends.deferred`.
        kinds: The place in ``numbers`` of each parameter's.

    Attributes:
        other: The direction on the other side, if there is one: a pass can make its values, too.
        is_closed: Whether every pass that a forward makes is prepared by now, so that a new one is
            an error: what prepares it can't be captured in a graph.
    """

    is_deferred = True

    def __init__(self, like: Direction, numbers: Sequence[torch.Tensor], kinds: Sequence[int]):
        # What the passes are prepared with, before their numbers are known.
        count = len(like.seeds)
        anything = [Move((1.0,) * count)] * len(like.params)
        super().__init__(
            like.params, like.streams, anything, [0] * count, like.dist, like.mask, like.backend
        )
        self.numbers = list(numbers)
        self.kinds = list(kinds)
        self.other: Direction | None = None
        self.can_mirror = reads_in_memory(self.runs_by)  # type: ignore[misc]
        self.is_closed = False
        self._prepared: dict[tuple, list[Deferred]] = {}
        self._vectors: DeferredDirection | None = None

    @property
    def count(self) -> int:
        """How many passes are prepared."""
        return len(self._prepared)

    def forget(self) -> None:
        """Let go of what is prepared: its memory may not be that of the next forward."""
        self._prepared.clear()
        self._vectors = None

    def of_vectors(self, vectors: Sequence[torch.Tensor], places: Sequence[int]) -> Direction:
        """The same point, whose numbers are read where those of this one are."""
        if self._vectors is None or self._vectors.params is not vectors:
            like = super().of_vectors(vectors, places)
            kinds = [self.kinds[i] for i in places]
            self._vectors = DeferredDirection(like, self.numbers, kinds)
        self._vectors.is_closed = self.is_closed
        if self.other is not None:
            # One of the two has been made before the other knew of it.
            self._vectors.other = self.other.of_vectors(vectors, places)
        return self._vectors

    def fill(
        self,
        sources: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor],
        chosen: Sequence[int],
        offsets: Sequence[int] | None = None,
        mirror: Sequence[torch.Tensor] = (),
    ) -> None:
        """Write the moved values of the chosen parameters into ``out``, as in `Direction.fill`.

        Args:
            sources: As there, and so are the following.
            out: Memory of the same sizes.
            chosen: Places in ``params``.
            offsets: Where each source starts.
            mirror: Memory for the values on the other side, or nothing.

        Raises:
            RuntimeError: If the direction is closed and has no such pass.
        """
        key = (
            tuple(chosen), tuple(offsets or ()), tuple(t.data_ptr() for t in sources),
            tuple(t.data_ptr() for t in (*out, *mirror)),
        )  # fmt: skip
        if key not in self._prepared:
            if self.is_closed:
                raise RuntimeError(
                    "The forward asks for perturbed weights that it did not ask for before, so "
                    "that it can't be captured; let loss_fn do the same in every call."
                )
            self._prepared[key] = self._prepare(sources, out, chosen, offsets, mirror)
        for one in self._prepared[key]:
            one.run()

    def _prepare(
        self,
        sources: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor],
        chosen: Sequence[int],
        offsets: Sequence[int] | None,
        mirror: Sequence[torch.Tensor],
    ) -> list[Deferred]:
        found: list[Deferred] = []
        for kind in dict.fromkeys(self.kinds[i] for i in chosen):
            places = [j for j, i in enumerate(chosen) if self.kinds[i] == kind]
            others = [mirror[j] for j in places] if mirror else []

            def take(
                backend: ModuleType,
                plan: Pass,
                kind: int = kind,
                others: list[torch.Tensor] = others,
            ) -> None:
                assert isinstance(plan, AddNoise)
                both = replace(plan, mirror=others)
                found.append(Deferred(backend, both, self.numbers[kind], decays=False))

            with ops.taking(take):
                super().fill(
                    [sources[j] for j in places],
                    [out[j] for j in places],
                    [chosen[j] for j in places],
                    [offsets[j] for j in places] if offsets else None,
                )
        return found


def words(seeds: Sequence[int], scales: Sequence[float]) -> list[int]:
    """What the passes of a perturbed forward read: see `zokernels.backends.deferred.words`."""
    rounded = [checks.binary32(checks.finite(s, "a coefficient"), "a coefficient") for s in scales]
    return [*map(signed, seeds), *map(bits32, rounded), _ONE, 0, 1]


@dataclass
class _Known:
    """A direction that came before, and where its numbers go."""

    direction: DeferredDirection
    kinds: list[int]
    given: list[Given]


class Prepared:
    """Directions of forwards that come again and again with other seeds and scales.

    The first of them prepares their passes and each sends its numbers, where a backend can read
    them in memory: a forward asks for some hundred passes, and on a GPU each would take the host
    longer than the device.
    """

    # Passes of addresses that are no longer used are forgotten with the rest, beyond so many.
    _MOST = 1 << 14

    def __init__(self) -> None:
        self._known: dict[tuple, _Known] = {}

    def forget(self) -> None:
        """Let go of what is prepared: its memory may not be that of the next forward."""
        self._known.clear()

    def of(self, lanes: Sequence[Direction | None]) -> list[Direction | None]:
        """The same points, those prepared whose numbers can be read in memory."""
        found = [
            self._of(k, lane) if lane is not None and _can_wait(lane) else lane
            for k, lane in enumerate(lanes)
        ]
        for (lane, following), (one, other) in zip(pairwise(lanes), pairwise(found), strict=True):
            if isinstance(one, DeferredDirection) and one is not lane:
                both = following is not None and lane is not None and is_mirror(lane, following)
                one.other = other if both else None
        return found

    def _of(self, k: int, lane: Direction) -> Direction:
        # A pass reads its numbers on its own device.
        wanted = [(move, p.device) for move, p in zip(lane.moves, lane.params, strict=True)]
        place = {one: number for number, one in enumerate(dict.fromkeys(wanted))}
        kinds = [place[one] for one in wanted]
        read: dict[tuple, Sequence[int]] = {
            (j,): words(lane.seeds, move.scales) for (move, _), j in place.items()
        }
        key = (k, len(lane.seeds), lane.dist, lane.backend)
        known = self._known.get(key)
        if known is None or not _is_alike(known, lane, kinds):
            devices = list(dict.fromkeys(device for _, device in place))
            given = [
                Given({(j,): len(read[j,]) for (_, on), j in place.items() if on == device}, device)
                for device in devices
            ]
            numbers = [given[devices.index(on)].section(j) for (_, on), j in place.items()]
            known = self._known[key] = _Known(DeferredDirection(lane, numbers, kinds), kinds, given)
        for one in known.given:
            one.write(read)
        return known.direction


def _can_wait(lane: Direction) -> bool:
    """Whether a pass may read its numbers when it runs."""
    if lane.is_deferred or not lane.params or shards.among(list(lane.params)):
        return False
    # What is prepared holds the memory of weights, and not of a twin that is made anew.
    if not all(map(layouts.is_row_major, lane.params)):
        return False
    # A pass whose coefficients are all 0 copies, and adds no zero to a -0.
    simple = all(move.is_plain and any(move.scales) for move in set(lane.moves))
    return simple and reads_in_memory(lane.runs_by)


def _is_alike(known: _Known, lane: Direction, kinds: list[int]) -> bool:
    before = known.direction
    return (
        before.count <= Prepared._MOST
        and known.kinds == kinds
        and list(before.streams) == list(lane.streams)
        and before.mask == lane.mask
    )

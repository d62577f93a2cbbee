"""Where a forward looks: the directions' seeds, and how each parameter moves along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from zokernels import masks, noise, passes
from zokernels.backends import layouts, select


class Move(NamedTuple):
    """How a parameter moves along K directions: w ↦ decay · w + Σₖ scaleₖ · zₖ, rounded once.

    ``as_written`` asks for the values that a pass would write, to the bit.
    """

    scales: tuple[float, ...]
    decay: float = 1.0
    rounding: str = "nearest"
    as_written: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the weight itself stays, and the result is rounded to nearest."""
        return self.decay == 1.0 and self.rounding == "nearest"


@dataclass
class Direction:
    """Trainable parameters and the K seeds of the noise that moves them.

    ``params``, ``streams`` and ``moves`` have one entry a parameter.

    Attributes:
        is_deferred: Whether the numbers of its passes are known only when they run.
        can_mirror: Whether one pass can fill the other side's memory as well.
    """

    is_deferred: ClassVar[bool] = False
    can_mirror: ClassVar[bool] = False

    params: Sequence[nn.Parameter]
    streams: Sequence[int]
    moves: Sequence[Move]
    seeds: Sequence[int]
    dist: str = "gaussian"
    mask: masks.Mask | None = None
    backend: str | None = None
    rounding_seed: int = 0

    @property
    def has_factors(self) -> bool:
        """Whether a matrix's noise is known by two vectors, and nobody asks for its bits."""
        return (
            self.dist == "rank1"
            and self.mask is None
            and len(self.seeds) == 1
            and all(move.is_plain and not move.as_written for move in set(self.moves))
        )

    def of_vectors(self, vectors: Sequence[torch.Tensor], places: Sequence[int]) -> Direction:
        """The same point, of vectors that stand for rows or columns of parameters.

        Args:
            vectors: Of shape (rows, 1) or (1, columns).
            places: For each the number of its parameter.
        """
        return Direction(
            vectors,  # type: ignore[arg-type]
            [self.streams[i] for i in places],
            [self.moves[i] for i in places],
            self.seeds,
            self.dist,
            backend=self.backend,
        )

    def columns_of(self, chosen: Sequence[int]) -> list[int] | None:
        """The columns of the chosen parameters, where the noise has some."""
        if self.dist != "rank1":
            return None
        return [noise.columns_of(self.params[i].shape) for i in chosen]

    @property
    def runs_by(self) -> ModuleType | None:
        """The backend that runs all of its passes; None if those of each device have another."""
        found = {
            select([self.params[i] for i in chosen], self.backend, noise.KINDS[self.dist])
            for chosen in layouts.by_device(self.params).values()
        }
        return found.pop() if len(found) == 1 else None

    def fill(
        self,
        sources: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor],
        chosen: Sequence[int],
        offsets: Sequence[int] | None = None,
    ) -> None:
        """Write the moved values of the chosen parameters into ``out``.

        Args:
            sources: Their weights, or a part of each that begins at its offset.
            out: Memory of the same sizes.
            chosen: Their places in ``params``.
            offsets: Where each source starts in its parameter.
        """
        alike: dict[Move, list[int]] = {}
        for place, i in enumerate(chosen):
            alike.setdefault(self.moves[i], []).append(place)
        for move, places in alike.items():
            passes.add_noise(
                [sources[j] for j in places],
                [out[j] for j in places],
                self.seeds,
                move.scales,
                streams=[self.streams[chosen[j]] for j in places],
                offsets=[offsets[j] for j in places] if offsets else None,
                columns=self.columns_of([chosen[j] for j in places]),
                dist=self.dist,
                mask=masks.take(self.mask, [chosen[j] for j in places]),
                decay=move.decay,
                rounding=move.rounding,
                rounding_seed=self.rounding_seed,
                backend=self.backend,
            )


def is_mirror(a: Direction, b: Direction) -> bool:
    """Whether b is a on the other side: θ − εz for θ + εz, so that one draw serves both."""
    if a.is_deferred:
        return a.other is b  # type: ignore[attr-defined]
    return (
        list(a.seeds) == list(b.seeds)
        and a.mask is None
        and b.mask is None
        and a.dist == b.dist
        and all(
            m.is_plain and n.is_plain and n.scales == tuple(-s for s in m.scales)
            for m, n in set(zip(a.moves, b.moves, strict=True))
        )
    )

"""The two vectors of each matrix along a direction of rank one, for every lane of a forward.

With z = left · rightᵀ a product with W + σz is one with W as it is stored, and two vectors more.
All of a model's vectors are drawn at a forward's beginning, in one pass: a pass over the column
(rows, 1) gives σ·left·right₀, one over the row (1, columns) σ·left₀·right, and their first element,
σ·left₀·right₀, is what their signs' product has to be multiplied by to be σz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from zokernels import noise
from zokernels.backends import of_products
from zokernels.backends.plan import Shift
from zokernels.perturb.drawing import Drawing, Lane
from zokernels.perturb.windows import aligned


class Vectors(NamedTuple):
    """What σz is of a matrix: scale · left · rightᵀ; the first dimension is the lanes.

    Attributes:
        left: ±1 of shape (lanes, rows), in the matrix's type; 0 for a lane at θ itself.
        right: ±1 of shape (lanes, columns).
        scale: Of shape (lanes,), float32, or float64 of a matrix of float64.
        known: The scales of the first lane, or nothing where the host does not know them.
        place: Which of those is this matrix's.
        backend: Whose `shift` multiplies by them, or None.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: torch.Tensor
    known: Sequence[float]
    place: int
    backend: ModuleType | None

    @property
    def number(self) -> float | None:
        """The scale of the first lane, where the host knows it."""
        return self.known[self.place] if self.known else None

    def pay_for(self, rows: int, transposed: bool = False) -> bool:
        """Whether a product of so many rows is done by them, and not with a matrix that is made.

        What the two cost on a GPU is what they move: the product's rows are read once more, and
        its result written and read once more; a matrix is written, and read. A CPU computes, too:
        it widens 16-bit weights one by one, and rounds them.

        Args:
            rows: Of each lane.
            transposed: Whether a row of the product has as many elements as the matrix has columns.
        """
        if not self.left.is_cuda or self.backend is None:
            return True
        out, width = self.left.shape[1], self.right.shape[1]
        if transposed:
            out, width = width, out
        return rows * (width + 2 * out) <= 2 * width * out

    def of(self, lane: int) -> Vectors:
        """Those of a lane."""
        here = slice(lane, lane + 1)
        return self._replace(
            left=self.left[here], right=self.right[here], scale=self.scale[here],
            known=self.known if lane == 0 else (),
        )  # fmt: skip

    def shift(
        self,
        x: torch.Tensor,
        taken: torch.Tensor,
        given: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``bias + scale · (x · taken) · given``; the scale is not rounded to 16 bits.

        Args:
            x: Of shape (lanes, rows, in).
            taken: ``right``, or ``left`` of a matrix that is multiplied from its other side.
            given: The other one.
            bias: Anything that a tensor of shape (lanes, rows, out) may be added to, or None.

        Returns:
            A tensor of shape (lanes, rows, out).
        """
        if self.backend and all(t is None or self._is_in_memory(t) for t in (x, bias)):
            common, each = (given.shape[1],), (len(x), 1, given.shape[1])
            # Any other shape is torch's to broadcast, or to refuse.
            if x.shape[2] == taken.shape[1] and (bias is None or bias.shape in (common, each)):
                plan = Shift.of(x, taken, given, self.scale, bias)
                self.backend.shift(plan)
                return plan.y
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(taken.dtype)
            bias = x.new_zeros(()) if bias is None else bias.to(x.dtype)
            if len(x) == 1 and self.number is not None:
                dots = torch.mv(x[0], taken[0]).view(1, -1, 1)
                return torch.addcmul(bias, dots, given.unsqueeze(1), value=self.number)
            dots = self._scaled(torch.bmm(x, taken.unsqueeze(-1)))
            return torch.addcmul(bias, dots, given.unsqueeze(1))

    def _is_in_memory(self, t: torch.Tensor) -> bool:
        """Whether a backend may read it: its values are there, and no derivative goes through."""
        return (
            type(t) in (torch.Tensor, torch.nn.Parameter)
            and t.dtype is self.left.dtype
            and not (torch.is_grad_enabled() and t.requires_grad)
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
            and forward_ad.unpack_dual(t).tangent is None
        )

    def add(self, y: torch.Tensor, factor: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """Add scale · factor · signs to y, in place; see `shift`."""
        if self.number is not None and len(self.scale) == 1:
            return y.addcmul_(factor, signs, value=self.number)
        return y.addcmul_(self._scaled(factor), signs)

    def _scaled(self, factor: torch.Tensor) -> torch.Tensor:
        scale = self.scale.view(-1, *[1] * (factor.dim() - 1)) if factor.dim() else self.scale[0]
        return (factor.to(scale.dtype) * scale).to(factor.dtype)

    def rows(self, stored: torch.Tensor, numbers: torch.Tensor, lane: int) -> torch.Tensor:
        """Rows of a matrix at a lane's point, looked up: of shape (*numbers, width)."""
        left = self.left[lane][numbers].unsqueeze(-1)
        return self.of(lane).add(F.embedding(numbers, stored), left, self.right[lane])


@dataclass
class _Memory:
    """The vectors of the matrices of one type on one device, each lane's one after the other."""

    drawn: torch.Tensor
    signs: torch.Tensor
    # Where a matrix's vectors begin, and with them its scales.
    starts: list[int]
    # The first lane's scales, where the host knows them.
    known: list[float]
    vectors: dict[int, Vectors]

    def read(self, lanes: Sequence[Lane]) -> None:
        """Make what the vectors are of what has been drawn."""
        for k, lane in enumerate(lanes):
            if lane is None:
                self.drawn[k].zero_()
        self.signs.copy_(self.drawn.sign())
        if self.drawn.device.type == "cpu":
            self.known[:] = self.drawn[0, self.starts].tolist()


class Factors:
    """Draws the vectors of matrices.

    Args:
        keep: Whether memory has the same address in each forward.
    """

    def __init__(self, keep: bool):
        self._drawing = Drawing(keep)
        self._memories: list[_Memory] = []
        self._known: tuple = ()
        self._vectors: list[torch.Tensor] = []
        self._out: list[list[torch.Tensor]] = []
        self._of_vector: list[int] = []
        self._found: dict[int, Vectors] = {}

    def of(self, i: int) -> Vectors | None:
        """The vectors of a parameter; None where the forward has none of it."""
        return self._found.get(i)

    def begin(self, lanes: Sequence[Lane], sources: Sequence[torch.Tensor]) -> None:
        """Draw what a forward at these points needs of the stored weights' directions."""
        self._found = {}
        moved = [lane for lane in lanes if lane is not None]
        if not moved or not all(lane.has_factors for lane in moved):
            return
        known = (len(lanes), *((p.shape, p.dtype, p.device) for p in sources))
        if known != self._known:
            self._make(len(lanes), sources)
            self._known = known
        points = [lane and lane.of_vectors(self._vectors, self._of_vector) for lane in lanes]
        self._drawing.begin(points, self._vectors)
        if self._vectors:
            self._drawing.fill(("vectors",), range(len(self._vectors)), self._out)
        for memory in self._memories:
            memory.read(lanes)
            self._found |= memory.vectors

    def end(self) -> None:
        """The forward is over."""
        self._found = {}

    def release(self) -> None:
        """Give the memory back."""
        self._drawing.forget()
        self._memories, self._vectors, self._out, self._known = [], [], [], ()

    def _make(self, lanes: int, sources: Sequence[torch.Tensor]) -> None:
        self.release()
        self._of_vector, self._out = [], [[] for _ in range(lanes)]
        alike: dict[tuple, list[int]] = {}
        for i, p in enumerate(sources):
            if p.dim() > 1 and p.numel():
                alike.setdefault((p.dtype, p.device), []).append(i)
        for (dtype, device), chosen in alike.items():
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            places, end = [], 0
            for i in chosen:
                columns = noise.columns_of(sources[i].shape)
                rows = sources[i].numel() // columns
                middle = end + aligned(rows)
                places.append((i, slice(end, end + rows), slice(middle, middle + columns)))
                end = middle + aligned(columns)
            nothing = torch.zeros(end, dtype=wide, device=device)
            drawn = torch.zeros((lanes, end), dtype=wide, device=device)
            signs = torch.zeros((lanes, end), dtype=dtype, device=device)
            memory = _Memory(drawn, signs, [left.start for _, left, _ in places], [], {})
            self._memories.append(memory)
            backend = of_products(dtype, device)
            for n, (i, left, right) in enumerate(places):
                memory.vectors[i] = Vectors(
                    signs[:, left], signs[:, right], drawn[:, left.start], memory.known, n, backend
                )
                for here, shape in ((left, (-1, 1)), (right, (1, -1))):
                    self._vectors.append(nothing[here].view(shape))
                    self._of_vector.append(i)
                    for k in range(lanes):
                        self._out[k].append(drawn[k, here].view(shape))

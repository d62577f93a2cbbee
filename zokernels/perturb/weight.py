"""A weight as a perturbed forward sees it: made when an operation asks for it, and thrown away.

`PerturbedWeight` stands in a module's place for a parameter. The operations that take weights are
known by name (`zokernels.perturb.operations`); any other gets a tensor of its own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from zokernels.perturb.dispatch import METADATA, OPERATIONS
from zokernels.perturb.filling import Filler, Lane

Operation = Callable[..., Any]


class Unshareable(RuntimeError):
    """The lanes of a forward cannot share it; the message says why."""


class Entry:
    """A forward under way, at the points of its lanes.

    Attributes:
        filler: Makes the values.
        head: The parameter whose product with the hidden states is the logits, if it is known.
        used: The parameters that an operation has asked for.
        count: How many lanes there are.
        rows: Rows of the batch that all lanes make together; 0 outside of the model.
        waiting: Logits that were asked for and not computed.
    """

    def __init__(self, filler: Filler, head: int | None = None):
        self.filler = filler
        self.head = head
        self.used: set[int] = set()
        self.rows = 0
        self.waiting: list[weakref.ref] = []
        self.is_open = False
        self.count = 0
        # What the first lane's closure has computed for all of them, in its order.
        self._shared: list[tuple[tuple, list[torch.Tensor], list[torch.Tensor]]] = []
        self._next = 0

    @contextlib.contextmanager
    def forward(self, lanes: Sequence[Lane]) -> Iterator[None]:
        """A forward at these points, from the first closure to the end of the last."""
        self.filler.begin(lanes)
        self.count = len(lanes)
        self.waiting, self._shared, self._next = [], [], 0
        self.is_open = True
        try:
            yield
            # Whoever kept logits beyond the forward finds them computed.
            for logits in [ref() for ref in self.waiting]:
                if logits is not None:
                    logits.computed()
        finally:
            self.is_open = False

    def closure_of(self, lane: int) -> None:
        """The closure of a lane begins."""
        self._next = 0

    def once(
        self,
        what: tuple,
        lane: int | None,
        of: list[torch.Tensor],
        compute: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """What ``compute()`` gives for all lanes, which the first of their closures computes.

        Args:
            what: A name of the computation.
            lane: The lane whose closure asks; None inside of the model, for all of them.
            of: What it is made of. The other closures must ask for the same.
            compute: Makes one tensor a lane.

        Raises:
            Unshareable: If a closure asks for something else than the first.
        """
        if lane is None or self.count == 1:
            return compute()
        if lane == 0:
            self._shared.append((what, of, compute()))
            return self._shared[-1][2]
        if self._next < len(self._shared):
            known, made_of, found = self._shared[self._next]
            self._next += 1
            if known == what and all(map(torch.equal, made_of, of)):
                return found
        raise Unshareable("the closure asked for other logits in its second forward")

    def split(self, t: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of all lanes' rows as one a lane; one row stands for every row.

        Raises:
            Unshareable: If its first dimension isn't the batch.
        """
        if self.count == 1:
            return [t]
        if self.rows and t.dim() and t.shape[0] % self.rows == 0:
            return list(t.chunk(self.count))
        if self.rows and t.dim() > 1 and t.shape[0] == 1:
            return [t] * self.count
        raise Unshareable(
            f"a layer got a tensor of shape {tuple(t.shape)}, whose first dimension is not the "
            f"batch, of {self.rows // self.count} rows"
            if self.rows
            else "a layer was entered outside of the model's own forward"
        )

    def join(self, parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The lanes' results as one tensor; ``like`` is what was split."""
        if self.count == 1:
            return parts[0]
        if like.shape[0] == 1 != self.rows:
            rows = self.rows // self.count
            parts = [p.expand(rows, *p.shape[1:]) for p in parts]
        return torch.cat(parts)


class PerturbedWeight(torch.Tensor):
    """Stands for a parameter while a perturbed forward runs. It has no memory of its own."""

    entry: Entry
    place: int
    parameter: nn.Parameter
    # What `isinstance(w, nn.Parameter)` looks at.
    _is_param = True

    @staticmethod
    def __new__(cls, parameter: nn.Parameter, entry: Entry, place: int) -> PerturbedWeight:
        """Stand for ``parameter``, the filler's number ``place``."""
        # On the meta device an operation that passed by __torch_function__ would fail, and not go
        # on with weights that are not perturbed.
        empty = torch.empty_like(parameter, device="meta")
        self = torch.Tensor._make_subclass(cls, empty, parameter.requires_grad)
        self.entry, self.place, self.parameter = entry, place, parameter
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The parameter's."""
        return self.parameter.device

    is_meta = False
    is_cuda = property(lambda self: self.parameter.is_cuda)

    def data_ptr(self) -> int:
        """The stored weight's: what identifies it."""
        return self.parameter.data_ptr()

    def value(self, wanted_by: str) -> torch.Tensor:
        """The values where there is one lane.

        Raises:
            Unshareable: If there are several.
        """
        if not self.entry.is_open:
            raise RuntimeError(
                "A perturbed weight was used after its forward; keep no reference to a module's "
                "weights from inside the closure."
            )
        if self.entry.count > 1:
            raise Unshareable(
                f"{wanted_by} takes a weight of shape {tuple(self.parameter.shape)} in a way that "
                "does not tell the halves of the batch apart"
            )
        self.entry.used.add(self.place)
        return self.entry.filler.fresh(self.place)[0]

    @classmethod
    def __torch_function__(
        cls, func: Operation, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The operation on perturbed values."""
        kwargs = kwargs or {}
        known = OPERATIONS.get(func)
        if known is not None:
            result = known(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = str(getattr(func, "__name__", func))

        def value(w: PerturbedWeight) -> torch.Tensor:
            return w.value(name)

        args, kwargs = tree_map_only(PerturbedWeight, value, (args, kwargs))
        return func(*args, **kwargs)


def resolve(*tensors: torch.Tensor | None) -> list[list[torch.Tensor | None]]:
    """The values of an operation's weights: for each lane, one a weight.

    What isn't perturbed is the same for every lane. They are in scratch.
    """
    ours = [t for t in tensors if type(t) is PerturbedWeight]
    entry = ours[0].entry
    places = [w.place for w in ours]
    entry.used.update(places)
    values = iter(entry.filler.values(places))
    each = [next(values) if type(t) is PerturbedWeight else [t] * entry.count for t in tensors]
    return [list(of_lane) for of_lane in zip(*each, strict=True)]

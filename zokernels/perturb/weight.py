"""A parameter as a perturbed forward sees it: its values are made when an operation asks for them.

While a forward runs, a parameter stays where it is, in its module and in every list and closure
that holds it, and only its class changes, to `PerturbedWeight`. Nothing has to be put in its place
or put back: what the forward does to the parameter itself (a flag, a hook) is done to it. The
operations that take weights are known by name (`zokernels.perturb.operations`); any other gets a
tensor of its own.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.eager_transforms
import torch._functorch.vmap
from torch import nn
from torch.utils._pytree import tree_map_only

from zokernels.perturb.dispatch import DATA, LAYOUT, METADATA, OPERATIONS, STATE, writes
from zokernels.perturb.filling import Filler, Lane
from zokernels.perturb.points import Points

Operation = Callable[..., Any]


class Unshareable(RuntimeError):
    """The lanes of a forward cannot share it; the message says why."""


class Misused(RuntimeError):
    """The closure does with a parameter what no perturbed forward can follow."""

    @classmethod
    def by_other_data(cls, name: str) -> Misused:
        """``p.data = …`` of the trainable parameter of this name, which has been undone."""
        return cls(
            f"The closure's forward gives the trainable parameter {name!r} other data, but its "
            "step perturbs what it had at its beginning; do so outside of the closure."
        )


class Entry:
    """A forward under way, at the points of its lanes.

    Attributes:
        filler: Makes the values.
        places: The number of each parameter, by its id.
        names: The name of each parameter, by its number.
        head: The number of the weight whose product with hidden states is the logits, or None.
        used: The parameters that an operation has asked for.
        count: How many lanes there are.
        points: The lanes, while all of them run the model's own forward together.
        lane: The lane whose closure runs.
        waiting: Logits that were asked for and not computed.
    """

    def __init__(self, filler: Filler, names: Sequence[str], head: nn.Parameter | None = None):
        self.filler = filler
        self.places = {id(p): i for i, p in enumerate(filler.params)}
        self.names = list(names)
        self.head = self.places.get(id(head))
        self.used: set[int] = set()
        self.waiting: list[weakref.ref] = []
        self.is_open = False
        self.count = 0
        self.points: Points | None = None
        self.lane = 0
        # What the first lane's closure has computed for all of them, in its order.
        self._shared: list[tuple[tuple, list[torch.Tensor], list[torch.Tensor]]] = []
        self._next = 0
        self._is_warned = False

    @contextlib.contextmanager
    def forward(self, lanes: Sequence[Lane]) -> Iterator[None]:
        """A forward at these points, from the first closure to the end of the last."""
        self.filler.begin(lanes)
        self.count, self.lane = len(lanes), 0
        self.waiting, self._shared, self._next = [], [], 0
        self.is_open = True
        try:
            yield
            # Whoever kept logits beyond the forward finds them computed.
            for logits in [ref() for ref in self.waiting]:
                if logits is not None and logits.lane is not None:
                    logits.computed()
        finally:
            self.is_open = False
            self.filler.end()

    def closure_of(self, lane: int) -> None:
        """The closure of a lane begins."""
        self.lane, self._next = lane, 0

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

    def value(self, place: int, stays: bool = False) -> torch.Tensor:
        """A parameter's values in memory of their own, as the code that runs now sees them.

        Args:
            place: Its number.
            stays: Whether whoever asks again in this forward gets the same memory.

        Raises:
            Misused: If no forward is under way.
        """
        if not self.is_open:
            raise Misused(
                "A perturbed weight was used after its forward; keep no reference to a module's "
                "weights from inside the closure."
            )
        self.used.add(place)
        if self.points is not None and stays:
            return self.points.wrap(self.filler.hold_together(place))
        return self.of(self.filler.hold(place) if stays else self.filler.fresh(place))

    def of(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of each lane as the code that runs now sees them."""
        return values[self.lane] if self.points is None else self.points.join(values)

    def warn_of_write(self, place: int) -> None:
        """Say once that a write into a weight will be undone."""
        if not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"The closure's forward writes into the trainable parameter {self.names[place]!r}; "
                "what a perturbed forward writes into a weight is thrown away with it. Write it "
                "outside of the closure.",
                stacklevel=4,
            )


class PerturbedWeight(nn.Parameter):
    """The class of a parameter while a perturbed forward runs."""

    entry: Entry  # of the subclass that each `Entry` has

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain parameter: who makes one of this one's class, as a copy does, wants that."""
        return nn.Parameter(*args, **kwargs)

    @property
    def place(self) -> int:
        """The parameter's number."""
        return self.entry.places[id(self)]

    @property
    def stored(self) -> torch.Tensor:
        """The weight as it is stored."""
        return self.entry.filler.sources[self.place]

    # These would pass by the function below.
    def untyped_storage(self) -> torch.UntypedStorage:
        """A copy's memory of perturbed values."""
        return self.entry.value(self.place).clone().untyped_storage()

    def storage(self) -> Any:
        """As `untyped_storage`, with a type."""
        return self.entry.value(self.place).clone().storage()

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
        if func in METADATA or func in STATE:
            if func in LAYOUT:
                args = (args[0].stored, *args[1:])
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == DATA.__set__ and is_perturbed(args[0]):
            raise Misused.by_other_data(cls.entry.names[args[0].place])
        written: Any = args[0] if args and writes(func, kwargs) else None
        if is_perturbed(written):
            entry = written.entry
            if entry.count > 1 and entry.points is None:
                raise Unshareable("the closure writes into a weight")
            entry.warn_of_write(written.place)
        # Who takes a pointer, or writes, counts on memory that is there for the whole forward.
        stays = func in _ALIASES or is_perturbed(written)

        def value(w: PerturbedWeight) -> torch.Tensor:
            return w.entry.value(w.place, stays)

        args, kwargs = tree_map_only(PerturbedWeight, value, (args, kwargs))
        return func(*args, **kwargs)


def is_perturbed(t: Any) -> bool:
    """Whether something is a parameter that a forward under way perturbs."""
    # Three times as fast as isinstance, which asks the class of nn.Parameter.
    return PerturbedWeight in type(t).__mro__


_ALIASES = frozenset([torch.Tensor.data_ptr, DATA.__get__])


def resolve(*tensors: torch.Tensor | None) -> list[list[torch.Tensor | None]]:
    """The values of an operation's weights: for each lane, one a weight.

    What isn't perturbed is each lane's own part of it. They are in scratch, and in memory of their
    own where a derivative may be taken: it reads them when the next layer has used the scratch.
    """
    ours: list[Any] = [t for t in tensors if is_perturbed(t)]
    entry = ours[0].entry
    places = [w.place for w in ours]
    entry.used.update(places)
    filler = entry.filler
    of_places = map(filler.fresh, places) if torch.is_grad_enabled() else filler.values(places)
    values = iter(of_places)
    each = [next(values) if is_perturbed(t) else _parts(entry, t) for t in tensors]
    return [list(of_lane) for of_lane in zip(*each, strict=True)]


def together(weight: PerturbedWeight) -> torch.Tensor:
    """A small weight's values at all lanes, with the lanes as its first dimension.

    They are stacked once a forward: a loop that generates asks for them again with every token.
    """
    entry, place = weight.entry, weight.place
    own = [w for (w,) in resolve(weight) if w is not None]
    # A base point has the stored weight, which is held in no memory of a lane's own.
    return torch.stack(own) if None in entry.filler.lanes else entry.filler.hold_together(place)


def _parts(entry: Entry, t: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    if t is None or entry.points is None:
        return [t] * entry.count
    return entry.points.parts(t)


@contextlib.contextmanager
def _told_of_functorch() -> Iterator[None]:
    """Inside the block `torch.vmap` and `torch.func` take a weight's perturbed values.

    They wrap what they are given by its memory, and ask no class.
    """
    before = [(module, name, getattr(module, name)) for module, name in _WRAPPERS]

    def instead(wrap: Operation) -> Operation:
        def of_values(t: Any, *args: Any) -> Any:
            return wrap(t.entry.value(t.place) if is_perturbed(t) else t, *args)

        return of_values

    try:
        for module, name, wrap in before:
            setattr(module, name, instead(wrap))
        yield
    finally:
        for module, name, wrap in before:
            setattr(module, name, wrap)


_WRAPPERS = [
    (torch._functorch.vmap, "_add_batch_dim"),
    (torch._functorch.eager_transforms, "_wrap_for_grad"),
]


class Disguise:
    """Makes parameters `PerturbedWeight`s, and what they were again.

    Meanwhile their own data are NaN: what passes by ``__torch_function__`` (a scripted module, an
    extension) makes a loss that is not finite, and not one of stored weights.

    Args:
        entry: The forwards that the parameters are perturbed in.
    """

    def __init__(self, entry: Entry):
        self.params = entry.filler.params
        self._entry = entry
        self._kinds: dict[type, type] = {}
        self._nothing: dict[tuple[torch.dtype, torch.device, torch.Size], torch.Tensor] = {}
        self._worn: list[tuple[type, torch.Tensor]] = []

    @contextlib.contextmanager
    def worn(self) -> Iterator[None]:
        """The parameters are perturbed weights inside the block.

        Raises:
            Misused: If they are so already.
        """
        for p in self.params:
            if is_perturbed(p):
                raise Misused(
                    "A perturbed forward began inside of another one of the same parameters; "
                    "perturb one after the other, or use perturb='in_place'."
                )
        self._worn = [(type(p), p.data) for p in self.params]
        put_on = 0
        try:
            for put_on in range(len(self.params)):
                self.cover(put_on)
            with _told_of_functorch():
                yield
        finally:
            for i in range(put_on + 1 if self.params else 0):
                kind, data = self._worn[i]
                self.params[i].__class__ = kind
                self.params[i].data = data
            self._worn = []

    def show(self, i: int, values: torch.Tensor) -> None:
        """Let a parameter be one of these values, for whom no operation can be watched."""
        self.params[i].__class__ = self._worn[i][0]
        self.params[i].data = values

    def cover(self, i: int) -> None:
        """The opposite of `show`."""
        p, (kind, data) = self.params[i], self._worn[i]
        p.__class__ = kind
        key = (data.dtype, data.device, data.shape)
        if key not in self._nothing:
            nan = torch.full((), torch.nan, dtype=data.dtype, device=data.device)
            self._nothing[key] = nan.expand(data.shape)
        p.data = self._nothing[key]
        if kind not in self._kinds:
            of_entry = {"entry": self._entry, "__module__": __name__}
            self._kinds[kind] = type("PerturbedWeight", (PerturbedWeight, kind), of_entry)
        p.__class__ = self._kinds[kind]

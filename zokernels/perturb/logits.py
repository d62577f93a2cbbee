"""Logits that wait: a head's product is made only at the positions that somebody asks for.

A language model makes logits of every position, and its loss looks at a few, or sums over them.
`PerturbedLogits` keeps the hidden states and the head instead. Taking positions, reshaping and
widening act on the hidden states; a cross-entropy runs over the vocabulary in parts, so that
neither the perturbed head nor the logits are ever whole in memory; any other use computes them.
A write makes them real first, with every view of them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from zokernels.perturb import structured
from zokernels.perturb.dispatch import DATA, METADATA, writes
from zokernels.perturb.weight import Entry, Misused, PerturbedWeight, Unshareable, is_perturbed

# A vocabulary smaller than this gains nothing.
_FEWEST_ROWS = 8192
# Bytes of the head that are made at a time: small enough for a CPU's cache, many enough for a GPU.
_PART = {"cpu": 1 << 22, "cuda": 1 << 26}

Hidden = list[torch.Tensor]  # of each lane, of shape (…, width)


class PerturbedLogits(torch.Tensor):
    """Logits of shape (…, vocabulary), not computed yet. It has no memory of its own.

    Some are views of others, their base. Where one of these is written, the base is computed, and
    all of them are views of it from then on, as if it had never waited.
    """

    entry: Entry
    hidden: Hidden
    # The lane whose logits these are; None for all of them, which belong to a point each.
    lane: int | None
    weight: int  # the head's number, and its bias's if that is perturbed
    bias: torch.Tensor | int | None
    vocabulary: int
    wide: torch.dtype
    of: PerturbedLogits | None  # whose view these are
    path: tuple[Callable[[torch.Tensor], torch.Tensor], ...]  # from the base to these
    in_order: bool  # whether they would lie in memory without gaps
    known: torch.Tensor | None  # the logits, once they are computed
    versions: list[int]  # of the hidden states

    @staticmethod
    def can_wait(x: torch.Tensor, weight: PerturbedWeight) -> bool:
        """Whether this product is that of the head with hidden states."""
        entry, stored = weight.entry, weight.stored
        return (
            weight.place == entry.head
            and x.dim() > 1
            and x.dtype is stored.dtype
            # Of float64 the sums would have to be, too.
            and x.dtype is not torch.float64
            and stored.shape[0] >= _FEWEST_ROWS
            and entry.filler.can_split
            and not torch.is_autocast_enabled(x.device.type)
            # A derivative would read parts of the head that are there no longer.
            and not (torch.is_grad_enabled() and x.requires_grad)
        )

    @classmethod
    def waiting(cls, x: torch.Tensor, weight: PerturbedWeight, bias: Any) -> PerturbedLogits:
        """The logits of hidden states of shape (…, width)."""
        entry, bias = weight.entry, bias.place if is_perturbed(bias) else bias
        # Whether or not somebody looks at the logits, an operation has asked for these.
        entry.used.update(i for i in (weight.place, bias) if isinstance(i, int))
        hidden = [x] if entry.points is None else entry.points.parts(x)
        lane = 0 if entry.points is None else None
        return cls._make(entry, hidden, lane, weight.place, bias, x.dtype)

    @classmethod
    def _make(
        cls,
        entry: Entry,
        hidden: Hidden,
        lane: int | None,
        weight: int,
        bias: Any,
        wide: torch.dtype,
        view: tuple[PerturbedLogits, Callable, bool] | None = None,
    ) -> PerturbedLogits:
        size = entry.filler.sources[weight].shape[0]
        empty = torch.empty((*hidden[0].shape[:-1], size), dtype=wide, device="meta")
        self = torch.Tensor._make_subclass(cls, empty)
        self.entry, self.hidden, self.lane = entry, hidden, lane
        self.weight, self.bias, self.vocabulary, self.wide = weight, bias, size, wide
        self.known = None
        self.of, self.path, self.in_order = None, (), True
        if view is not None:
            of, step, self.in_order = view
            self.of, self.path = of.base, (*of.path, step)
        self.versions = _versions(hidden)
        entry.waiting.append(weakref.ref(self))
        return self

    @property
    def base(self) -> PerturbedLogits:
        """The logits that these are a view of, or these themselves."""
        return self if self.of is None else self.of

    def check_hidden(self) -> None:
        """Raise Misused if the hidden states were written after the model's head got them."""
        if _versions(self.hidden) != self.versions:
            raise Misused(
                "The hidden states that logits wait to be made of were written in place; give the "
                "optimizer lazy_logits=False."
            )

    def copy_of(self, hidden: Hidden, wide: torch.dtype | None = None) -> PerturbedLogits:
        """The same head's logits of other hidden states, in memory of their own."""
        self.check_hidden()
        return self._make(self.entry, hidden, self.lane, self.weight, self.bias, wide or self.wide)

    def view_by(
        self, step: Callable[[torch.Tensor], torch.Tensor], hidden: Hidden, in_order: bool
    ) -> PerturbedLogits:
        """A view: what ``step`` makes of these logits, whose hidden states are these."""
        self.check_hidden()
        view = (self, step, in_order)
        return self._make(self.entry, hidden, self.lane, self.weight, self.bias, self.wide, view)

    def each(self) -> list[Any]:
        """The logits of each lane, where these belong to a point."""
        if self.base.known is not None:
            assert self.entry.points is not None
            return list(self.entry.points.parts(self.computed()))
        return [
            self._make(self.entry, self.hidden, lane, self.weight, self.bias, self.wide)
            for lane in range(len(self.hidden))
        ]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """That of the hidden states."""
        return self.hidden[0].device

    is_meta = False
    is_cuda = property(lambda self: self.hidden[0].is_cuda)

    def computed(self) -> torch.Tensor:
        """The logits themselves."""
        if self.base.known is not None:
            return functools.reduce(lambda t, step: step(t), self.path, self.base.known)
        if self.known is None:
            found = self.entry.once(("logits",), self.lane, self.hidden, self._compute)
            self.known = self.joined(found)
        return self.known

    def make_real(self) -> None:
        """From here on these logits and all views of them share memory."""
        self.base.computed()

    def joined(self, found: list[torch.Tensor]) -> torch.Tensor:
        """What was computed for each lane, as the code that runs now sees it."""
        if self.lane is not None:
            return found[self.lane]
        if self.entry.points is None:
            raise Unshareable("the model kept logits of all points, and the closure used them")
        return self.entry.points.join(found)

    def parts(self, t: torch.Tensor) -> list[torch.Tensor]:
        """Another tensor's values for each lane."""
        points = self.entry.points
        return [t] * len(self.hidden) if points is None else points.parts(t)

    def _compute(self) -> list[torch.Tensor]:
        flat = [h.reshape(-1, h.shape[-1]) for h in self.hidden]
        out = [h.new_empty(len(h), self.vocabulary) for h in flat]
        for begin, end, parts in self.products(flat):
            for o, part in zip(out, parts, strict=True):
                o[:, begin:end] = part
        shape = (*self.hidden[0].shape[:-1], self.vocabulary)
        return [o.view(shape).to(self.wide) for o in out]

    def products(self, flat: Hidden) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """For parts of the vocabulary, begin … end − 1: each lane's logits, of shape (rows, part).

        Args:
            flat: Each lane's hidden states, of shape (rows, width).

        Raises:
            Misused: If the hidden states have been written since the model's head got them.
        """
        self.check_hidden()
        filler = self.entry.filler
        # A product with a few rows of a strided slice takes a hundred times as long in bfloat16.
        flat = [h.contiguous() for h in flat]
        step = rows_of_a_part(flat[0].shape[1], flat[0].dtype, flat[0].device.type)
        biases = self.biases()
        vectors = filler.factors.of(self.weight)
        if vectors is not None and vectors.pay_for(len(flat[0])):
            yield from structured.parts(filler.sources[self.weight], vectors, flat, biases, step)
            return
        for begin in range(0, self.vocabulary, step):
            end = min(begin + step, self.vocabulary)
            values = filler.part(self.weight, begin, end)
            yield (
                begin,
                end,
                [
                    F.linear(h, w, None if b is None else b[begin:end])
                    for h, w, b in zip(flat, values, biases, strict=True)
                ],
            )

    def biases(self) -> list[torch.Tensor | None]:
        """The head's bias for each lane."""
        if not isinstance(self.bias, int):
            return [self.bias] * len(self.hidden)
        (own,) = self.entry.filler.values([self.bias])
        return [b.clone() for b in own]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """What acts on positions waits; what looks at logits computes them."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        own = WAITING.get(func)
        if own is not None and isinstance(first, PerturbedLogits) and first.base.known is None:
            result = own(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, PerturbedLogits)]
        written = [t for t in (first, kwargs.get("out")) if isinstance(t, PerturbedLogits)]
        if written and (writes(func, kwargs) or "out" in kwargs):
            for t in given:
                t.make_real()
        result = _on_computed(func, args, kwargs)
        # A view of a part that was computed alone would not see what is written into the whole.
        if any(_is_view(result, t.known) for t in given if t.base.known is None):
            for t in given:
                t.make_real()
            result = _on_computed(func, args, kwargs)
        return next((t for t in written if result is t.base.known and t.base is t), result)


def _on_computed(func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    args, kwargs = tree_map_only(PerturbedLogits, lambda t: t.computed(), (args, kwargs))
    return func(*args, **kwargs)


def _is_view(result: Any, of: torch.Tensor | None) -> bool:
    """Whether something that a function returned shares a tensor's memory."""
    addresses = {_address(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
    return of is not None and _address(of) in addresses


def _address(t: torch.Tensor) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.untyped_storage().data_ptr()


def _versions(hidden: Hidden) -> list[int]:
    return [0 if h.is_inference() else h._version for h in hidden]


def rows_of_a_part(width: int, dtype: torch.dtype, device: str) -> int:
    """How many rows of the head are made at a time."""
    return max(64, _PART.get(device, _PART["cpu"]) // (width * dtype.itemsize))


def _same(logits: PerturbedLogits) -> Any:
    return logits


def _contiguous(logits: PerturbedLogits, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    return logits if logits.in_order else logits.copy_of(logits.hidden)


def _float(logits: PerturbedLogits, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _to(logits, torch.float32)


def _to(logits: PerturbedLogits, *args: Any, **kwargs: Any) -> Any:
    wanted = args[0] if len(args) == 1 and not kwargs else None
    if wanted in (logits.device, logits.wide):
        return logits
    if wanted is torch.float32:
        return logits.copy_of(logits.hidden, torch.float32)
    return NotImplemented


def _view(logits: PerturbedLogits, *shape: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    if not all(isinstance(n, int) for n in shape) or len(shape) < 2 or not logits.in_order:
        return NotImplemented
    if shape[-1] not in (logits.vocabulary, -1) or (shape[-1] == -1 and -1 in shape[:-1]):
        return NotImplemented
    rows = list(shape[:-1])
    if shape[-1] == -1 and torch.Size(rows).numel() * logits.vocabulary != logits.numel():
        return NotImplemented
    hidden = [h.reshape(*rows, h.shape[-1]) for h in logits.hidden]
    return logits.view_by(lambda t: t.view(*rows, logits.vocabulary), hidden, in_order=True)


def _reshape(logits: PerturbedLogits, *shape: Any, **kwargs: Any) -> Any:
    """A view where there are no gaps, and else a copy."""
    return _view(_contiguous(logits), *shape, **kwargs)


def _take(logits: PerturbedLogits, index: Any) -> Any:
    given = index
    index = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    if any(i is Ellipsis for i in index):
        at = next(j for j, i in enumerate(index) if i is Ellipsis)
        index = (*index[:at], *[whole] * (logits.dim() - len(index) + 1), *index[at + 1 :])
    if len(index) == logits.dim():
        if not (isinstance(index[-1], slice) and index[-1] == whole):
            return NotImplemented
        index = index[:-1]
    plain = all(
        isinstance(i, slice | int)
        or (
            isinstance(i, torch.Tensor)
            and i.dtype is torch.int64
            and i.dim() > 0
            and not torch._C._functorch.is_functorch_wrapped_tensor(i)
        )
        for i in index
    ) and not any(isinstance(i, bool) for i in index)
    if not plain or len(index) >= logits.dim():
        return NotImplemented
    hidden = [h[index] for h in logits.hidden]
    if any(isinstance(i, torch.Tensor) for i in index):
        return logits.copy_of(hidden)
    in_order = logits.in_order and all(isinstance(i, slice) and i == whole for i in index)
    return logits.view_by(lambda t: t[given], hidden, in_order)


# What acts on logits and lets them wait; `zokernels.perturb.losses` adds to it.
WAITING: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.detach: _same,
    DATA.__get__: _same,
    torch.Tensor.float: _float,
    torch.Tensor.to: _to,
    torch.Tensor.view: _view,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.__getitem__: _take,
}

"""Logits that wait: a head's product is made only at the positions that somebody asks for.

A language model makes logits of every position, and its loss looks at a few, or sums over them.
`PerturbedLogits` keeps the hidden states and the head instead. Taking positions, reshaping and
widening act on the hidden states; a cross-entropy runs over the vocabulary in parts, so that
neither the perturbed head nor the logits are ever whole in memory; any other use computes them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from zokernels.perturb.dispatch import METADATA
from zokernels.perturb.weight import Entry, PerturbedWeight, resolve

# A vocabulary smaller than this gains nothing.
_FEWEST_ROWS = 8192
# Bytes of the head that are made at a time: small enough for a CPU's cache, many enough for a GPU.
_PART = {"cpu": 1 << 22, "cuda": 1 << 26}

Hidden = list[torch.Tensor]  # of each lane, of shape (…, width)


class LaneLosses(torch.Tensor):
    """Losses of all lanes, of shape (lanes,), in a place where a model expects one loss."""


class PerturbedLogits(torch.Tensor):
    """Logits of shape (…, vocabulary), not computed yet. It has no memory of its own."""

    entry: Entry
    hidden: Hidden
    # The lane whose logits these are; None for all of them, one after the other in dimension 0.
    lane: int | None
    weight: PerturbedWeight
    bias: torch.Tensor | None
    wide: torch.dtype
    known: torch.Tensor | None  # the logits, once they are computed

    @staticmethod
    def can_wait(x: Any, weight: PerturbedWeight) -> bool:
        """Whether this product is that of the head with hidden states."""
        entry = weight.entry
        return (
            weight.place == entry.head
            and type(x) is torch.Tensor
            and x.dim() > 1
            and x.dtype is weight.dtype
            # Of float64 the sums would have to be, too.
            and x.dtype is not torch.float64
            and weight.shape[0] >= _FEWEST_ROWS
            and entry.filler.can_split
            and not torch.is_autocast_enabled(x.device.type)
        )

    @classmethod
    def of(cls, x: torch.Tensor, weight: PerturbedWeight, bias: Any) -> PerturbedLogits:
        """The logits of hidden states of shape (…, width), all lanes' together."""
        entry = weight.entry
        # Whether or not somebody looks at the logits, an operation has asked for these.
        entry.used.update(w.place for w in (weight, bias) if isinstance(w, PerturbedWeight))
        lane = 0 if entry.count == 1 else None
        return cls._make(entry.split(x), lane, weight, bias, x.dtype)

    @classmethod
    def _make(
        cls, hidden: Hidden, lane: int | None, weight: PerturbedWeight, bias: Any, wide: torch.dtype
    ) -> PerturbedLogits:
        one = hidden[lane or 0]
        rows = tuple(one.shape[:-1])
        if lane is None:
            rows = (len(hidden) * rows[0], *rows[1:])
        empty = torch.empty((*rows, weight.shape[0]), dtype=wide, device="meta")
        self = torch.Tensor._make_subclass(cls, empty)
        self.entry, self.hidden, self.lane = weight.entry, hidden, lane
        self.weight, self.bias, self.wide = weight, bias, wide
        self.known = None
        weight.entry.waiting.append(weakref.ref(self))
        return self

    def like(self, hidden: Hidden, wide: torch.dtype | None = None) -> PerturbedLogits:
        """The same head's logits of other hidden states."""
        return self._make(hidden, self.lane, self.weight, self.bias, wide or self.wide)

    def of_lane(self, lane: int) -> PerturbedLogits:
        """One lane's part."""
        return self._make(self.hidden, lane, self.weight, self.bias, self.wide)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """That of the hidden states."""
        return self.hidden[0].device

    is_meta = False
    is_cuda = property(lambda self: self.hidden[0].is_cuda)

    def computed(self) -> torch.Tensor:
        """The logits themselves."""
        if self.known is None:
            found = self.entry.once(("logits",), self.lane, self.hidden, self._compute)
            self.known = torch.cat(found) if self.lane is None else found[self.lane]
        return self.known

    def _compute(self) -> list[torch.Tensor]:
        size = self.weight.shape[0]
        flat = [h.reshape(-1, h.shape[-1]) for h in self.hidden]
        out = [h.new_empty(len(h), size) for h in flat]
        for begin, end, parts in self.products(flat):
            for o, part in zip(out, parts, strict=True):
                o[:, begin:end] = part
        shape = (*self.hidden[0].shape[:-1], size)
        return [o.view(shape).to(self.wide) for o in out]

    def products(self, flat: Hidden) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """For parts of the vocabulary, begin … end − 1: each lane's logits, of shape (rows, part).

        Args:
            flat: Each lane's hidden states, of shape (rows, width).
        """
        weight, entry = self.weight, self.entry
        # A product with a few rows of a strided slice takes a hundred times as long in bfloat16.
        flat = [h.contiguous() for h in flat]
        step = rows_of_a_part(weight.shape[1], flat[0].dtype, flat[0].device.type)
        biases: list[Any] = [self.bias] * len(flat)
        if isinstance(self.bias, PerturbedWeight):
            biases = [own[0].clone() for own in resolve(self.bias)]  # type: ignore[union-attr]
        for begin in range(0, weight.shape[0], step):
            end = min(begin + step, weight.shape[0])
            values = entry.filler.part(weight.place, begin, end)
            yield (
                begin,
                end,
                [
                    F.linear(h, w, None if b is None else b[begin:end])
                    for h, w, b in zip(flat, values, biases, strict=True)
                ],
            )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """What acts on positions waits; what looks at logits computes them."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        own = _WAITING.get(func)
        if own is not None and isinstance(args[0], PerturbedLogits):
            result = own(*args, **kwargs)
            if result is not NotImplemented:
                return result

        def compute(t: PerturbedLogits) -> torch.Tensor:
            return t.computed()

        args, kwargs = tree_map_only(PerturbedLogits, compute, (args, kwargs))
        return func(*args, **kwargs)


def rows_of_a_part(width: int, dtype: torch.dtype, device: str) -> int:
    """How many rows of the head are made at a time."""
    return max(64, _PART.get(device, _PART["cpu"]) // (width * dtype.itemsize))


def _same(logits: PerturbedLogits, *_: Any, **__: Any) -> Any:
    return logits


def _float(logits: PerturbedLogits, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else logits.like(logits.hidden, torch.float32)


def _to(logits: PerturbedLogits, *args: Any, **kwargs: Any) -> Any:
    wanted = args[0] if len(args) == 1 and not kwargs else None
    if wanted is torch.float32:
        return logits.like(logits.hidden, torch.float32)
    return logits if wanted in (logits.device, logits.wide) else NotImplemented


def _view(logits: PerturbedLogits, *shape: Any) -> Any:
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    size = logits.weight.shape[0]
    if not all(isinstance(n, int) for n in shape) or len(shape) < 2:
        return NotImplemented
    if shape[-1] not in (size, -1) or (shape[-1] == -1 and -1 in shape[:-1]):
        return NotImplemented
    rows = list(shape[:-1])
    if shape[-1] == -1 and torch.Size(rows).numel() * size != logits.numel():
        return NotImplemented
    if logits.lane is None:
        # The lanes must stay one after the other.
        if rows[0] > 0 and rows[0] % len(logits.hidden):
            return NotImplemented
        rows[0] = rows[0] // len(logits.hidden) if rows[0] > 0 else rows[0]
    return logits.like([h.reshape(*rows, h.shape[-1]) for h in logits.hidden])


def _take(logits: PerturbedLogits, index: Any) -> Any:
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
        or (isinstance(i, torch.Tensor) and i.dtype is torch.int64 and i.dim() > 0)
        for i in index
    ) and not any(isinstance(i, bool) for i in index)
    if not plain or len(index) >= logits.dim():
        return NotImplemented
    if logits.lane is None and not (isinstance(index[0], slice) and index[0] == whole):
        return NotImplemented
    return logits.like([h[index] for h in logits.hidden])


def _gather(logits: PerturbedLogits, dim: int, index: torch.Tensor) -> Any:
    """Logits of a few words: only their rows of the head are made."""
    last = dim in (-1, logits.dim() - 1)
    if not last or index.shape[:-1] != logits.shape[:-1] or index.numel() * 8 > logits.shape[-1]:
        return NotImplemented
    lanes = len(logits.hidden)
    words = list(index.chunk(lanes)) if logits.lane is None else [index] * lanes

    def chosen() -> list[torch.Tensor]:
        rows = logits.entry.filler.rows(logits.weight.place, words)
        biases: list[Any] = [logits.bias] * lanes
        if isinstance(logits.bias, PerturbedWeight):
            biases = [own[0] for own in resolve(logits.bias)]
        found = []
        for h, w, b, word in zip(logits.hidden, rows, biases, words, strict=True):
            product = (h[..., None, :].float() * w.float()).sum(-1)
            product = product if b is None else product + b[word].float()
            # A product of 16-bit tensors is rounded to 16 bits.
            found.append(product.to(h.dtype).to(logits.wide))
        return found

    found = logits.entry.once(("gather",), logits.lane, [*logits.hidden, index], chosen)
    return torch.cat(found) if logits.lane is None else found[logits.lane]


def _cross_entropy(
    logits: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """The same loss, from parts of the vocabulary, at the positions that count."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    if not plain or not isinstance(logits, PerturbedLogits) or logits.dim() != 2:
        return NotImplemented
    if target.dim() != 1 or target.dtype is not torch.int64 or reduction not in ("mean", "sum"):
        return NotImplemented
    lanes = len(logits.hidden)
    targets = list(target.chunk(lanes)) if logits.lane is None else [target] * lanes

    def losses() -> list[torch.Tensor]:
        kept = [t != ignore_index for t in targets]
        hidden = [h[k] for h, k in zip(logits.hidden, kept, strict=True)]
        wanted = [t[k] for t, k in zip(targets, kept, strict=True)]
        _check_targets(wanted, logits.shape[-1], ignore_index)
        found = _negative_log_likelihoods(logits, hidden, wanted)
        return [getattr(torch, reduction)(x).to(logits.wide) for x in found]

    what = ("cross_entropy", reduction, ignore_index)
    found = logits.entry.once(what, logits.lane, [*logits.hidden, target], losses)
    if logits.lane is None:
        return torch.stack(found).as_subclass(LaneLosses)
    return found[logits.lane]


def _check_targets(targets: list[torch.Tensor], vocabulary: int, ignore_index: int) -> None:
    for t in targets:
        if len(t) and not 0 <= int(t.min()) <= int(t.max()) < vocabulary:
            raise IndexError(
                f"The labels lie between {int(t.min())} and {int(t.max())}, but the head has "
                f"{vocabulary} rows; use the tokenizer of this model, and {ignore_index} for what "
                "is not to count."
            )


def _negative_log_likelihoods(
    logits: PerturbedLogits, hidden: Hidden, targets: list[torch.Tensor]
) -> list[torch.Tensor]:
    """For each lane log Σ exp(logits) − logit of the target, float32, of shape (rows,)."""
    sums = [torch.full((len(t),), -torch.inf, device=t.device) for t in targets]
    chosen = [torch.zeros(len(t), device=t.device) for t in targets]
    for begin, end, parts in logits.products(hidden):
        for k, part in enumerate(parts):
            part = part.float()
            sums[k] = torch.logaddexp(sums[k], torch.logsumexp(part, 1))
            inside = (targets[k] >= begin) & (targets[k] < end)
            at = (targets[k] - begin).clamp(0, end - begin - 1)
            chosen[k] = torch.where(inside, part.gather(1, at[:, None])[:, 0], chosen[k])
    return [s - c for s, c in zip(sums, chosen, strict=True)]


_WAITING: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.contiguous: _same,
    torch.Tensor.detach: _same,
    torch.Tensor.float: _float,
    torch.Tensor.to: _to,
    torch.Tensor.view: _view,
    torch.Tensor.reshape: _view,
    torch.Tensor.__getitem__: _take,
    torch.Tensor.gather: _gather,
    F.cross_entropy: _cross_entropy,
}

"""The rows of all members of a population: which tensors have them, member by member.

Known by data flow. What an operation makes of some rows, of as many rows, is theirs again, row by
row; what moves rows is asked where it moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from zokernels.perturb.points import Points
from zokernels.perturb.weight import Unshareable

_MARK = "_zokernels_rows"


def _functions(*names: str) -> set[Any]:
    """Those of torch and of its tensors that have these names."""
    found = (getattr(holder, name, None) for name in names for holder in (torch, torch.Tensor))
    return {function for function in found if function is not None}


# What moves elements by where they are and not by their values: whose rows come out is found by
# moving the members' numbers alike.
_MOVES = _functions(
    "__getitem__", "index_select", "gather", "take_along_dim", "flip", "flipud", "roll",
    "repeat_interleave", "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes",
    "permute", "movedim", "t",
) | {getattr(torch.Tensor, name).__get__ for name in ("T", "mT")}  # fmt: skip
# What moves them by their values, along the dimension that is given after so many arguments.
_SORTS = {
    f: place for name, place in (("sort", 1), ("argsort", 1), ("topk", 2)) for f in _functions(name)
}


class Rows(TorchFunctionMode):
    """Knows the tensors whose rows are the members', one member after the other.

    Args:
        count: Number of members.
    """

    def __init__(self, count: int):
        super().__init__()
        self.count = count
        self.is_watching = True

    def mark(self, t: torch.Tensor, in_order: bool = True) -> torch.Tensor:
        """A tensor of rows, known as such from here on; or of rows that were put out of order."""
        setattr(t, _MARK, (self, in_order))
        return t

    def has(self, t: Any) -> bool:
        """Whether a tensor is such rows."""
        return isinstance(t, torch.Tensor) and vars(t).get(_MARK) == (self, True)

    def is_out_of_order(self, t: Any) -> bool:
        """Whether a tensor's rows are the members', and no longer one member after the other."""
        return isinstance(t, torch.Tensor) and vars(t).get(_MARK) == (self, False)

    def repeat(self, batch: Any) -> Any:
        """The batch once for each member; see `zokernels.optim.asking.Population.repeat`."""
        if isinstance(batch, Mapping):
            # A tokenizer's batch is no dict, and a model takes it by its keys.
            return {key: self.repeat(value) for key, value in batch.items()}
        return tree_map(self._repeat, batch, is_leaf=is_plain_list)

    def _repeat(self, t: Any) -> Any:
        if isinstance(t, list):
            return t * self.count
        if not isinstance(t, torch.Tensor) or not t.dim():
            return t
        return self.mark(t.detach().repeat(self.count, *[1] * (t.dim() - 1)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if not self.is_watching:
            return found
        if func in _MOVES and args and self.has(args[0]) and not _is_by_row(func, args):
            return self._moved(func, found, args, kwargs)
        given = tree_leaves((args, kwargs))
        lengths = {len(t) for t in given if self.has(t)}
        strays = {len(t) for t in given if self.is_out_of_order(t)}
        if func in _SORTS and lengths and _dimension(func, args, kwargs) == 0:
            strays |= lengths
        for t in tree_leaves(found) if lengths or strays else ():
            if type(t) is torch.Tensor and t.dim() and len(t) in lengths | strays:
                self.mark(t, len(t) not in strays)
        return found

    def _moved(self, func: Callable[..., Any], found: Any, args: tuple, kwargs: dict) -> Any:
        """What a function of `_MOVES` gave, marked by whose rows it is."""
        if type(found) is torch.Tensor and found.dim() and found.numel():
            whose = func(self._members_of(args[0]), *args[1:], **kwargs).reshape(len(found), -1)
            if bool((whose == whose[:, :1]).all()):
                each = whose[:, 0].tolist()
                in_order = len(each) % self.count == 0 and each == self._in_order(len(each))
                if in_order or len(each) == len(args[0]):
                    self.mark(found, in_order)
        return found

    def _members_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The number of the member that each element belongs to."""
        numbers = torch.tensor(self._in_order(len(rows)), dtype=torch.int32, device=rows.device)
        return numbers.view(-1, *[1] * (rows.dim() - 1)).expand(rows.shape).contiguous()

    def _in_order(self, length: int) -> list[int]:
        return [k * self.count // length for k in range(length)]

    def size(self, tensors: Sequence[Any]) -> int:
        """How many rows a model got.

        Raises:
            Unshareable: If there are none of the members, or not one member's after the other's.
        """
        if any(map(self.is_out_of_order, tensors)):
            raise Unshareable(
                "rows of population.repeat(batch) were put in another order, in which they would "
                "get other members' weights"
            )
        sizes = {len(t) for t in tensors if self.has(t)}
        if len(sizes) != 1:
            raise Unshareable(
                "the model got a batch that is not population.repeat(batch), or not made of it row "
                "by row"
            )
        return sizes.pop()

    def enter(self, t: Any, size: int, points: Points) -> Any:
        """What a model gets, as it is at one point."""
        if not isinstance(t, torch.Tensor) or not t.dim() or len(t) != size:
            return t
        if not self.has(t) and t.dim() < 2:
            # A position for each token, say, of as many tokens as there are rows.
            return t
        parts = t.unflatten(0, (self.count, -1))
        # Alike for all members, as a prompt is, or a mask that was made by its shape.
        if bool((parts == parts[:1]).all()):
            return parts[0]
        return points.wrap(parts) if self.has(t) else t

    def leave(self, t: Any, points: Points) -> Any:
        """What a model gave, as rows; of a number at each point, one a member."""
        whole = points.whole(t) if isinstance(t, torch.Tensor) else None
        if whole is None:
            return t
        return self.mark(whole.flatten(0, 1) if whole.dim() > 1 else whole)


def _is_by_row(func: Callable[..., Any], args: tuple) -> bool:
    """Whether it is an index that takes every row, as ``logits[:, -1]`` is."""
    index = args[1] if func is torch.Tensor.__getitem__ else None
    return (
        isinstance(index, tuple)
        and index[:1] == (slice(None),)
        and not any(isinstance(x, torch.Tensor | list) for x in index)
    )


def _dimension(func: Callable[..., Any], args: tuple, kwargs: dict) -> int:
    """Along which dimension a function of `_SORTS` goes."""
    t, place = args[0], _SORTS[func]
    at = kwargs.get("dim", args[place] if len(args) > place else -1)
    return at % t.dim() if t.dim() else 0


def is_plain_list(thing: Any) -> bool:
    """Whether it is a list of texts, of numbers, or of lists of such: one a row."""
    return (
        isinstance(thing, list)
        and bool(thing)
        and not any(isinstance(x, torch.Tensor) for x in tree_leaves(thing))
    )

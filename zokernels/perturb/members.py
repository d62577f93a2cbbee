"""All members of a population in the rows of one batch, each row with its member's weights.

A batch that is repeated member by member has the rows of the k-th member in its k-th part. Outside
of the model's forward they are rows like any others, so that a loop such as ``generate`` decides
about each; inside they are points (`zokernels.perturb.points`), of which the model sees one. A
model's cache holds rows between forwards. What is such rows, `zokernels.perturb.rows` knows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from zokernels.perturb.filling import Lane
from zokernels.perturb.on_entry import OnEntry
from zokernels.perturb.points import Points
from zokernels.perturb.replaced import replaced_forward
from zokernels.perturb.rows import Rows
from zokernels.perturb.weight import Entry, Misused, Unshareable


@contextlib.contextmanager
def together(perturber: OnEntry, lanes: Sequence[Lane], rows: Rows) -> Iterator[None]:
    """The model's forwards take rows of all lanes, inside the block.

    Raises:
        RuntimeError: If a parameter was not perturbed in the forwards.
    """
    base = getattr(perturber.model, "get_base_model", lambda: perturber.model)()
    models = list({id(m): m for m in (perturber.model, base)}.values())
    try:
        perturber.check_watched()
        with contextlib.ExitStack() as stack:
            entry = stack.enter_context(perturber.standing(lanes))
            stack.enter_context(rows)
            stack.enter_context(_unwarned(perturber.model))
            shared = [_Forward(m, entry, rows) for m in models]
            for m, forward in zip(models, shared, strict=True):
                stack.enter_context(replaced_forward(m, forward))
            yield
    except Unshareable as error:
        raise RuntimeError(_apart(str(error))) from error
    ran = any(forward.ran for forward in shared)
    if ran and (missed := perturber.unperturbed()) is not None:
        raise RuntimeError(
            _apart(f"parameter {missed!r} was not perturbed, since no operation asked for it")
        )


@contextlib.contextmanager
def _unwarned(model: nn.Module) -> Iterator[None]:
    """Models of transformers do not look, for a warning's sake, whether a token is padding.

    Members that have ended earlier than others differ in that, and one forward has one answer.
    """
    name = "warn_if_padding_and_no_attention_mask"
    warning = [m for m in model.modules() if hasattr(type(m), name)]
    for m in warning:
        vars(m)[name] = lambda *_: None
    try:
        yield
    finally:
        for m in warning:
            vars(m).pop(name, None)


class _Forward:
    """A model's forward that takes and gives rows of all members."""

    def __init__(self, model: nn.Module, entry: Entry, rows: Rows):
        self.model, self.entry, self.rows = model, entry, rows
        self.forward = model.forward
        self.ran = False
        # Callers look at the arguments that a forward has.
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all members, row by row."""
        if self.entry.points is not None:
            return self.forward(*args, **kwargs)
        rows, entry = self.rows, self.entry
        flat, kind = tree_flatten((args, kwargs))
        with Points.open(entry.count) as points:
            entry.points, rows.is_watching = points, False
            try:
                size = rows.size(flat)
                caches = [x for x in flat if hasattr(x, "get_seq_length")]
                for holder, key, t in _tensors(caches):
                    if rows.has(t):
                        _put(holder, key, points.wrap(t.unflatten(0, (rows.count, -1))))
                args, kwargs = tree_unflatten([rows.enter(x, size, points) for x in flat], kind)
                outputs = self.forward(*args, **kwargs)
                if points.failed is not None:
                    raise points.failed
                if not self.ran:
                    self._check_attributes(points)
                leaves, kind = tree_flatten(outputs)
                caches += [x for x in leaves if hasattr(x, "get_seq_length")]
                for holder, key, t in _tensors(caches):
                    _put(holder, key, rows.leave(t, points))
                found = tree_unflatten([rows.leave(t, points) for t in leaves], kind)
            except Misused:
                raise
            except Exception as error:
                # A member by itself tells whether it is the model's own error.
                raise RuntimeError(_apart(str(error).strip().partition("\n")[0])) from error
            finally:
                entry.points, rows.is_watching = None, True
        self.ran = True
        return found

    def _check_attributes(self, points: Points) -> None:
        """Refuse a model that keeps in an attribute what belongs to a member."""
        for module in self.model.modules():
            kept = [v for n, v in vars(module).items() if n not in ("_parameters", "_modules")]
            for t in tree_leaves(kept):
                if isinstance(t, torch.Tensor) and points.whole(t) is not None:
                    raise Unshareable(
                        f"{type(module).__name__} keeps in an attribute what belongs to a member"
                    )


def _tensors(things: Any, seen: set[int] | None = None) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """The tensors inside of objects, with what holds each and by which key."""
    seen = set() if seen is None else seen
    if id(things) in seen or isinstance(things, nn.Module | type | str | torch.Tensor):
        return
    seen.add(id(things))
    if isinstance(things, dict):
        items = list(things.items())
    elif isinstance(things, list | tuple):
        items = list(enumerate(things))
    else:
        items = list(vars(things).items()) if hasattr(things, "__dict__") else []
    for key, value in items:
        if isinstance(value, torch.Tensor):
            yield things, key, value
        else:
            yield from _tensors(value, seen)


def _put(holder: Any, key: Any, value: torch.Tensor) -> None:
    if isinstance(holder, dict | list):
        holder[key] = value
    elif not isinstance(holder, tuple):
        setattr(holder, key, value)
    elif holder[key] is not value:
        raise Unshareable("the model's cache keeps tensors in tuples")


def _apart(why: str) -> str:
    return (
        f"The members can't share the model's forwards: {why.rstrip('.')}. Take them one at a "
        "time: for member in opt.ask(): with member: ..."
    )

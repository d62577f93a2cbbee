"""What forwards write, as it was before them: only what they write is copied.

Layers of a quantised base keep their packed weights in buffers, as large as the model. So the first
time each operation is looked at, before it runs, for what it writes; later on what was written then
is copied. What is looked at runs eagerly, since what is compiled passes no operation by.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zokernels.backends import tracer


class Kept:
    """Tensors that are kept: what a block that `Written.kept` is around may ask for."""

    def __init__(
        self,
        copies: _Copies,
        written: Set[int],
        new: Mapping[int, torch.Tensor],
        reassign: Callable[[], None],
    ):
        self._copies, self._written, self._new = copies, written, new
        self._reassign = reassign

    @property
    def is_new(self) -> bool:
        """Whether it is not known yet which of them forwards write."""
        return bool(self._new)

    def put_back(self) -> None:
        """Every tensor is as before the block."""
        self._reassign()
        self._copies.put_back(self._written)

    def looking(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward: what it writes first is copied before."""
        return _looking(self._new, self._copies) if self.is_new else contextlib.nullcontext()


class Written:
    """What is known of tensors that forwards may write, from time to time.

    Args:
        what: What they are to a user.
    """

    def __init__(self, what: str):
        self.what = what
        self._looked_at: set[int] = set()
        self._written: set[int] = set()

    @contextlib.contextmanager
    def kept(
        self,
        tensors: Mapping[int, torch.Tensor],
        name: Callable[[int], str],
        always: Sequence[torch.Tensor] = (),
        reassign: Callable[[], None] = lambda: None,
    ) -> Iterator[Kept]:
        """After the block every tensor is as before it, by whatever forwards wrote to it.

        Args:
            tensors: Large ones, copied if they are written, by numbers that are theirs as long as
                `forget` says nothing else.
            name: What one of these is called.
            always: Small ones, copied without a look.
            reassign: Puts the tensors themselves where they were.
        """
        copies = _Copies()
        for t in always:
            copies.make_small(t)
        for i in tensors.keys() & self._written:
            copies.make(i, tensors[i])
        versions = {i: t._version for i, t in tensors.items()}
        # One that was not looked at may be written like those that come with it.
        new = {} if tensors.keys() <= self._looked_at else tensors
        kept = Kept(copies, self._written, new, reassign)
        try:
            yield kept
            self._looked_at |= tensors.keys()
        finally:
            self._written |= tensors.keys() & copies.made.keys()
            kept.put_back()
            for i, t in tensors.items():
                if t._version != versions[i] and i not in copies.made:
                    self._written.add(i)
                    warnings.warn(
                        f"A forward wrote to the {self.what} {name(i)!r} ({bytes_of(t)} bytes), "
                        "which those of the first step had left alone, so that there is no copy: "
                        f"what it wrote stays. From the next step on the {self.what} is put back.",
                        stacklevel=2,
                    )

    def forget(self, all_but: Set[int]) -> None:
        """Drop what is known of tensors that are there no longer."""
        self._looked_at &= all_but
        self._written &= all_but


class _Copies:
    """Copies of tensors, made before they are written.

    Attributes:
        made: By what it is known by: a tensor, its copy, and its version then.
    """

    def __init__(self) -> None:
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._always: list[tuple[torch.Tensor, torch.Tensor]] = []

    def make(self, i: int, t: torch.Tensor) -> None:
        """Copy a tensor."""
        self.made[i] = (t, t.detach().clone(), t._version)

    def make_small(self, t: torch.Tensor) -> None:
        """Copy a tensor that is put back each time: of batch norm's writes no version tells."""
        if type(t) is torch.Tensor and t.layout is torch.strided and not _repeats(t):
            self._always.append((t, t.detach().clone()))
        else:
            self.make(id(t), t)

    def put_back(self, written: Set[int]) -> None:
        """Put back what has another version, or is known to be written, as ``t.data`` hides it."""
        for i, (t, copy, version) in self.made.items():
            if t._version != version or i in written:
                t.copy_(copy)
                self.made[i] = (t, copy, t._version)
        if self._always:
            # A graph that holds one of them shall not take it for written.
            torch._foreach_copy_([t.data for t, _ in self._always], [c for _, c in self._always])


@contextlib.contextmanager
def _looking(tensors: Mapping[int, torch.Tensor], copies: _Copies) -> Iterator[None]:
    with tracer.eager(), _BeforeWrites(tensors, copies):
        yield


class _BeforeWrites(TorchDispatchMode):
    """Copies a tensor when the first operation is about to write to its memory."""

    # Such as flexible attention; they have no schema, and are passed on.
    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[int, torch.Tensor], copies: _Copies):
        super().__init__()
        self.copies = copies
        self.left: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for i, t in tensors.items():
            if i not in copies.made:
                self.left.setdefault(_memory(t), []).append((i, t))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for written in _written_by(func, args, kwargs):
            for i, t in self.left.pop(_memory(written), ()):
                self.copies.make(i, t)
        return func(*args, **kwargs)


def _written_by(func: Any, args: tuple, kwargs: dict) -> Iterator[torch.Tensor]:
    """The tensors among its arguments that an operation may write to."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return
    # Batch norm updates running statistics that its schema calls inputs.
    all_of_them = "batch_norm" in schema.name
    for n, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if all_of_them or (info is not None and info.is_write):
            value = args[n] if n < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(value) if isinstance(t, torch.Tensor))


def _memory(t: torch.Tensor) -> int:
    """What tells a tensor's memory from others': views of it have the same."""
    address = t.untyped_storage().data_ptr() if t.layout is torch.strided else 0
    # A tensor that wraps others has no memory of its own.
    return address or id(t)


def _repeats(t: torch.Tensor) -> bool:
    """Whether elements share memory, which nobody can write."""
    return any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True))


def bytes_of(t: torch.Tensor) -> int:
    """What a tensor's elements come to."""
    return t.numel() * t.element_size()

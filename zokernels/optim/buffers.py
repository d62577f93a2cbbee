"""A model's buffers, as they were before the forwards of a step: only what they write is copied.

Layers of a quantised base keep their packed weights in buffers, as large as the model. So in the
first step each operation is looked at, before it runs, for what it writes; later steps copy what
was written then. A step that looks runs eagerly, since what is compiled passes no operation by.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zokernels.backends import tracer

# Bytes up to which a buffer is copied in each step, without a look: running means, positions.
SMALL = 4096


class Buffers:
    """What is known of a model's buffers, from step to step.

    Args:
        model: The module, where there is one.
    """

    def __init__(self, model: nn.Module | None):
        self.model = model
        # By their ids; while they are held here no other tensor can have one of these.
        self._looked_at: dict[int, torch.Tensor] = {}
        self._written: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[], None]]:
        """After the block every buffer is as before it, by whatever forwards wrote to it.

        Yields a function that makes it so before the next forward.
        """
        places = [] if self.model is None else list(_places(self.model))
        named = self.model.named_buffers() if self.model is not None else ()
        # A tensor of inference mode can't be written here, nor has it a version.
        buffers = {id(b): (name, b) for name, b in named if not b.is_inference()}
        large = {i: b for i, (_, b) in buffers.items() if _bytes(b) > SMALL}
        self._written = {i: b for i, b in self._written.items() if i in large}
        copies = _Copies()
        for i, (_, b) in buffers.items():
            if i not in large or i in self._written:
                copies.make(b)
        versions = {i: b._version for i, b in large.items()}
        is_new = not large.keys() <= self._looked_at.keys()

        def put_back() -> None:
            for module, name, b in places:
                # A forward may give a name another tensor, made with perturbed weights.
                if module._buffers.get(name) is not b:
                    module._buffers[name] = b
            copies.put_back(self._written)

        try:
            with _looking(large, copies) if is_new else contextlib.nullcontext():
                yield put_back
            self._looked_at = large
        finally:
            for i in large.keys() & copies.made.keys():
                self._written[i] = large[i]
            put_back()
            for i, b in large.items():
                if b._version != versions[i] and i not in copies.made:
                    self._written[i] = b
                    warnings.warn(
                        f"A forward wrote to the buffer {buffers[i][0]!r} ({_bytes(b)} bytes), "
                        "which those of the first step had left alone, so that there is no copy: "
                        "what it wrote stays. From the next step on the buffer is put back.",
                        stacklevel=2,
                    )


class _Copies:
    """Copies of buffers, made before they are written.

    Attributes:
        made: By a buffer's id itself, its copy, and its version then.
    """

    def __init__(self) -> None:
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def make(self, buffer: torch.Tensor) -> None:
        self.made[id(buffer)] = (buffer, buffer.detach().clone(), buffer._version)

    def put_back(self, written: Container[int]) -> None:
        """Put back what has another version, or is known to be written, as ``b.data`` hides it."""
        for i, (buffer, copy, version) in self.made.items():
            if buffer._version != version or i in written:
                buffer.copy_(copy)
                self.made[i] = (buffer, copy, buffer._version)


@contextlib.contextmanager
def _looking(buffers: dict[int, torch.Tensor], copies: _Copies) -> Iterator[None]:
    with tracer.eager(), _BeforeWrites(buffers, copies):
        yield


class _BeforeWrites(TorchDispatchMode):
    """Copies a buffer when the first operation is about to write to its memory."""

    # Such as flexible attention; they have no schema, and are passed on.
    supports_higher_order_operators = True

    def __init__(self, buffers: dict[int, torch.Tensor], copies: _Copies):
        super().__init__()
        self.copies = copies
        self.left: dict[int, list[torch.Tensor]] = {}
        for i, b in buffers.items():
            if i not in copies.made:
                self.left.setdefault(_memory(b), []).append(b)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for written in _written_by(func, args, kwargs):
            for b in self.left.pop(_memory(written), ()):
                self.copies.make(b)
        return func(*args, **kwargs)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Each buffer, where it is."""
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is not None:
                yield module, name, b


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


def _bytes(b: torch.Tensor) -> int:
    return b.numel() * b.element_size()

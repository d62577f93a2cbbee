"""Weights cut over processes: which elements of the whole a process holds, and where they start.

A `DTensor` (of FSDP2's ``fully_shard``, of tensor parallelism) stands for the whole tensor, and
each process holds a part of it. The noise is a function of an element's place in the whole, so that
a part is perturbed and updated where it lies, with the bits that the whole would have.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from zokernels import masks, noise
from zokernels.backends import checks


class Cut(NamedTuple):
    """A pass over the ranges that this process holds; the fields are the pass's own arguments."""

    params: Sequence[torch.Tensor]
    others: Sequence[Sequence[torch.Tensor]]
    streams: Sequence[int] | None
    offsets: Sequence[int] | None
    columns: Sequence[int | None] | None
    mask: masks.Mask | None


# Start in the local part, number of elements, and place of the first one in the whole.
_Range = tuple[int, int, int]
_PLAIN = (torch.Tensor, nn.Parameter)
_known: dict[Any, list[_Range]] = {}


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is a `DTensor`, of which this process may hold a part only."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def among(tensors: object) -> bool:
    """Whether one of a list of tensors is a `DTensor`."""
    # By type first: a pass over many small tensors is made in microseconds.
    return isinstance(tensors, list | tuple) and any(
        type(t) not in _PLAIN and is_sharded(t) for t in tensors
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is here; it shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of a `DTensor` a copy, for which every process that has a part must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def ranges(tensor: torch.Tensor) -> list[_Range]:
    """The ranges of the whole, row-major tensor that are here: (start here, elements, offset).

    One range if the tensor is cut in its first dimension; one for each row, if in its second.

    Raises:
        ValueError: If the parts are summands of the whole, or not contiguous.
    """
    if not is_sharded(tensor):
        return [(0, tensor.numel(), 0)]
    t: Any = tensor
    key = (tuple(t.shape), t.device_mesh, t.placements, tuple(t.device_mesh.get_coordinate() or ()))
    if key not in _known:
        if any(p.is_partial() for p in t.placements):
            raise ValueError(
                f"A DTensor of shape {tuple(t.shape)} has placements {t.placements}, of which "
                "each process holds a summand, so that no element can be written where it lies; "
                "redistribute it to Shard or Replicate."
            )
        (chunk,) = t.__create_chunk_list__()
        _known[key] = list(_ranges(tuple(t.shape), tuple(chunk.sizes), tuple(chunk.offsets)))
    if not local(tensor).is_contiguous():
        raise ValueError(
            f"The local part of a DTensor of shape {tuple(t.shape)} is not contiguous, but an "
            "element's noise follows from its place in memory; make it contiguous first."
        )
    return _known[key]


def _ranges(shape: Sequence[int], sizes: Sequence[int], offsets: Sequence[int]) -> Iterator[_Range]:
    # From dimension d on the part is one run of memory, in the whole as it is here.
    d = len(shape)
    while d > 0 and (d == len(shape) or sizes[d] == shape[d]):
        d -= 1
    count = prod(sizes[d:])
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    for n, index in enumerate(product(*map(range, sizes[:d]))):
        at = zip((*index, *[0] * (len(shape) - d)), offsets, strides, strict=True)
        yield n * count, count, sum((i + start) * stride for i, start, stride in at)


def cut(
    params: Sequence[torch.Tensor],
    others: Sequence[Sequence[torch.Tensor]],
    streams: Sequence[int] | None,
    offsets: Sequence[int] | None,
    columns: Sequence[int | None] | None,
    mask: masks.Mask | None,
    in_matrices: bool,
) -> Cut:
    """The arguments of a pass over whole tensors as those of a pass over what is here.

    Args:
        params: Tensors, some of them `DTensor`s.
        others: For each, the tensors that go with it (its states, or where the result goes).
        streams: As for `zokernels.ops.add_noise_`, and so are the following.
        offsets: Only where no tensor is a `DTensor`, which knows its own.
        columns: As for `zokernels.ops.add_noise_`.
        mask: Any but `Bits`.
        in_matrices: Whether the noise has rows and columns; else ``columns`` go on as they are, to
            be refused.

    Raises:
        ValueError: If the arguments do not go together.
    """
    if offsets is not None:
        raise ValueError("offsets are given, but a DTensor knows where its part starts; omit them.")
    if isinstance(mask, masks.Bits):
        raise ValueError(
            "A mask of a bit a weight (Bits) is for whole tensors, but a parameter is a DTensor; "
            "use Random or Magnitude."
        )
    pieces: list[torch.Tensor] = []
    with_them: list[list[torch.Tensor]] = []
    starts: list[int] = []
    places: list[int] = []
    for i, (p, with_it) in enumerate(zip(params, others, strict=True)):
        mine = ranges(p)
        for t in with_it:
            if local(t).shape != local(p).shape or ranges(t) != mine:
                raise ValueError(
                    f"params[{i}] is cut over processes in another way than a tensor that goes "
                    "with it (its state, or out); make that with torch.zeros_like(param)."
                )
        flat, flats = local(p).view(-1), [local(t).view(-1) for t in with_it]
        for start, count, offset in mine:
            pieces.append(flat[start : start + count])
            with_them.append([t[start : start + count] for t in flats])
            starts.append(offset)
            places.append(i)
    numbers, widths = places, columns
    if streams is not None:
        of_whole = checks.one_each(streams, "streams", params)
        numbers = [of_whole[i] for i in places]
    if in_matrices:
        given = [None] * len(params) if columns is None else columns
        own = [
            noise.columns_of(p.shape) if c is None else c
            for p, c in zip(params, checks.one_each(given, "columns", params), strict=True)
        ]
        widths = [own[i] for i in places]
    return Cut(pieces, with_them, numbers, starts, widths, masks.take(mask, places))


def of_model(model: nn.Module | None) -> bool:
    """Whether a parameter of the model is a `DTensor`."""
    modules = () if model is None else model.modules()
    return any(is_sharded(p) for m in modules for p in m._parameters.values() if p is not None)


def settle(model: nn.Module | None) -> None:
    """Bring a model of ``fully_shard`` to rest: every part where it belongs, nothing gathered.

    What a forward gathered and left, as FSDP2's root does for the sake of a backward that never
    comes, would be used again by the next one, with the weights of before. From here on every
    module frees what it gathered.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is None or fsdp is None or not torch.distributed.is_initialized():
        return
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            if module not in inside:
                inside.update(module.modules())
                module.set_reshard_after_forward(True)
                # It also forgets the order of the forwards, which a backward would have used up.
                # Only the module that ran first has it; torch below 2.13 has no such method.
                with contextlib.suppress(RuntimeError, AttributeError):
                    module.reset_iter_state()
            module.reshard()

"""What a base model is known by: its parameters' shapes and checksums, of whatever kind they are.

A frozen parameter need not be a dense tensor: quantised and sparse weights have parts, and what
lies on the meta device (as offloaded weights do) has no numbers at all.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator

import torch
from torch import nn

from zokernels.backends import shards

_PLAIN = (torch.Tensor, nn.Parameter)
_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class _Unreadable(Exception):
    """A tensor whose numbers cannot be had."""


def checksum(p: torch.Tensor) -> int | None:
    """CRC-32 of a tensor's elements in row-major order, little-endian; of the whole `DTensor`.

    Of a tensor in parts it is that of the parts, one after the other: of a sparse one its indices
    and values, of a quantised one its integers, scales and zero points, of a nested one its
    tensors, of a subclass what its ``__tensor_flatten__`` names. None where there is nothing to
    read: on the meta device, or of a subclass that has neither parts nor memory.
    """
    check = 0
    try:
        for part in _parts(shards.whole(p).detach()):
            check = _crc(part, check)
    except _Unreadable:
        return None
    return check


def shape(p: torch.Tensor) -> list[int]:
    """The shape; −1 for every dimension of a nested tensor but the first."""
    return [p.size(0)] + [-1] * (p.dim() - 1) if p.is_nested else list(p.shape)


def kind(p: torch.Tensor) -> str | None:
    """What a parameter is that is no dense tensor in memory, in words; None of one that is."""
    if shards.is_sharded(p):
        return None
    if p.is_meta:
        return "on the meta device"
    if p.is_nested:
        return "a nested tensor"
    if p.is_quantized:
        return "a quantised tensor"
    if p.layout is not torch.strided:
        return f"a tensor of layout {str(p.layout).removeprefix('torch.')}"
    # A subclass with memory of its own is as good as a plain tensor.
    if type(p) not in _PLAIN and (hasattr(p, "__tensor_flatten__") or checksum(p) is None):
        return f"a {type(p).__name__}"
    return None


def _parts(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """The dense tensors that hold a tensor's numbers."""
    if type(t) not in _PLAIN and hasattr(t, "__tensor_flatten__"):
        for name in t.__tensor_flatten__()[0]:
            yield from _parts(getattr(t, name))
    elif t.is_meta:
        raise _Unreadable
    elif t.is_nested:
        yield from t.unbind()
    elif t.layout in _SPARSE:
        for name in _SPARSE[t.layout]:
            yield from _parts(getattr(t, name)())
    elif t.is_quantized:
        yield t.int_repr()
        if t.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([t.q_scale(), t.q_zero_point()], dtype=torch.float64)
        else:
            yield from (t.q_per_channel_scales(), t.q_per_channel_zero_points())
    else:
        yield t if t.layout is torch.strided else t.to_dense()


def _crc(t: torch.Tensor, check: int) -> int:
    try:
        flat = t.resolve_conj().resolve_neg().reshape(-1).contiguous()
        if not flat.numel():
            return check
        numbers = flat.view(torch.uint8).cpu()
        # By its address, since numpy, which would give a buffer, need not be there.
        if not (address := numbers.data_ptr()):
            raise _Unreadable
        return zlib.crc32((ctypes.c_ubyte * numbers.numel()).from_address(address), check)
    except Exception:
        if type(t) in _PLAIN:
            raise
        # A subclass may answer whatever it was not made for with any error.
        raise _Unreadable from None

"""By how much a direction of rank one shifts a product, in one launch; see `native.shift`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from zokernels.backends.triton.arithmetic import INTERPRETED

# Elements that a program takes of a row at a time, and that it writes.
_TAKEN, _GIVEN, _WARPS = 1024, 2048, 4
# What Triton made of the kernel, for each kind of arguments: it would look for it longer than all
# the rest of a launch takes.
_compiled: dict[tuple, Any] = {}


@triton.jit(do_not_specialize=["rows", "between_scales"])
def _shift_kernel(
    x, taken, given, scales, bias, y, rows, between_scales, between_vectors, between_biases,
    WIDTH: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TAKEN: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = row // rows
    total = tl.zeros((TAKEN,), tl.float32)
    for begin in range(0, WIDTH, TAKEN):
        at = begin + tl.arange(0, TAKEN)
        inside = at < WIDTH
        value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        sign = tl.load(taken + lane * between_vectors + at, mask=inside, other=0.0)
        total += value * sign.to(tl.float32)
    factor = tl.sum(total, axis=0) * tl.load(scales + lane * between_scales)
    at = tl.program_id(1) * GIVEN + tl.arange(0, GIVEN)
    inside = at < OUT
    sign = tl.load(given + lane * between_vectors + at, mask=inside, other=0.0)
    shifted = factor * sign.to(tl.float32)
    if HAS_BIAS:
        beside = tl.load(bias + lane * between_biases + at, mask=inside, other=0.0)
        shifted += beside.to(tl.float32)
    tl.store(y + row * OUT + at, shifted.to(y.dtype.element_ty), mask=inside)


def shift(
    x: torch.Tensor,
    taken: torch.Tensor,
    given: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """What `zokernels.backends.native.shift` gives, with sums in an order that is always the same.

    Args:
        x: Of shape (lanes, rows, in), as are the following there.
        taken: ±1 of shape (lanes, in).
        given: ±1 of shape (lanes, out), as far apart as those.
        scales: Of shape (lanes,), float32.
        bias: Of shape (out,), (lanes, out) or (lanes, 1, out); or None.

    Returns:
        A tensor of shape (lanes, rows, out).
    """
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    lanes, rows, width = x.shape
    out = given.shape[1]
    y = x.new_empty((lanes, rows, out))
    if y.numel():
        with torch.cuda.device(x.device if x.is_cuda else -1):
            _launch(
                (lanes * rows, triton.cdiv(out, _GIVEN), 1),
                (x, taken, given, scales, x if bias is None else bias, y),
                (
                    rows, scales.stride(0), taken.stride(0),
                    0 if bias is None or bias.dim() == 1 else bias.stride(0),
                ),
                (width, out, bias is not None, _TAKEN, _GIVEN),
            )  # fmt: skip
    return y


def _launch(
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    constants: tuple[int | bool, ...],
) -> None:
    if INTERPRETED:
        _shift_kernel[grid](*tensors, *numbers, *constants)
        return
    # Triton compiles it anew for other types, for memory and distances of another alignment.
    aligned = tuple(t.data_ptr() % 16 == 0 for t in tensors)
    key = (tensors[0].device, tensors[0].dtype, *aligned, *numbers[2:], *constants)
    found = _compiled.get(key)
    if found is None:
        kernel = _shift_kernel[grid]
        _compiled[key] = kernel(*tensors, *numbers, *constants, num_warps=_WARPS)
    else:
        found[grid](*tensors, *numbers, *constants)

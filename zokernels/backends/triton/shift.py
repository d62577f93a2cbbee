"""By how much a direction of rank one shifts a product, in one launch; see `Shift`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from zokernels.backends.plan import Shift
from zokernels.backends.triton.launch import on_device

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


def shift(plan: Shift) -> None:
    """Run the shift, with sums in an order that is always the same."""
    if plan.y.numel():
        on_device(plan.x.device, lambda: _launch(plan))


def _launch(plan: Shift) -> None:
    lanes, rows, width = plan.x.shape
    out = plan.given.shape[1]
    tensors = (
        plan.x, plan.taken, plan.given, plan.scales,
        plan.x if plan.bias is None else plan.bias, plan.y,
    )  # fmt: skip
    distances = (plan.taken.stride(0), plan.bias_step)
    constants = (width, out, plan.bias is not None, _TAKEN, _GIVEN)
    arguments = (*tensors, rows, plan.scales.stride(0), *distances, *constants)
    grid = (lanes * rows, triton.cdiv(out, _GIVEN), 1)
    # Triton compiles it anew for other types, for memory and distances of another alignment.
    aligned = tuple(t.data_ptr() % 16 == 0 for t in tensors)
    key = (plan.x.device, plan.x.dtype, *aligned, *distances, *constants)
    found = _compiled.get(key)
    if found is not None:
        found[grid](*arguments)
        return
    # Whether a product and a sum are fused is said, or Triton 3.9 warns that it chose.
    kernel = _shift_kernel[grid]
    _compiled[key] = kernel(*arguments, num_warps=_WARPS, enable_fp_fusion=True)

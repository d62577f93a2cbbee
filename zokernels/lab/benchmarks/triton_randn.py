"""What Triton itself offers for noise, as a peer on a CUDA device: ``tl.randn``."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

_SEEDS = itertools.count()
_BLOCK = 1024


# A seed that is 0, 1 or a multiple of 16 would be compiled anew.
@triton.jit(do_not_specialize=["seed"])
def _add_randn_kernel(w_ptr, seed, scale, n, BLOCK: tl.constexpr):
    """Weights + scale · randn, by Triton's own Philox and Box–Muller; a block a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + at, mask=at < n).to(tl.float32)
    w += scale * tl.randn(seed, at)
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=at < n)


def add_randn_(p: torch.Tensor, scale: float) -> None:
    """Add noise to a CUDA tensor in place, with a new seed each time."""
    grid = (triton.cdiv(p.numel(), _BLOCK),)
    _add_randn_kernel[grid](p, next(_SEEDS), scale, p.numel(), BLOCK=_BLOCK)

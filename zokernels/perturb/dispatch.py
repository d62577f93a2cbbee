"""What stands for a weight asks here how an operation is done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Filled by `zokernels.perturb.operations`.
OPERATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}

# What is known of a weight without its values, in as many of these as this version of torch has.
_ATTRIBUTES = (
    "shape", "dtype", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_sparse",
    "is_quantized", "is_nested", "is_mkldnn", "is_cpu", "itemsize", "nbytes", "output_nr",
    "_version", "is_xpu", "is_mps",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset",
    "is_floating_point", "is_complex", "is_contiguous", "element_size", "__len__", "__hash__",
    "is_conj", "is_neg", "is_inference", "get_device",
)  # fmt: skip
METADATA = frozenset(
    [getattr(torch.Tensor, n).__get__ for n in _ATTRIBUTES if hasattr(torch.Tensor, n)]
    + [getattr(torch.Tensor, n) for n in _METHODS if hasattr(torch.Tensor, n)]
)

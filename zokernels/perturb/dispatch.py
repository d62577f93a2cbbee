"""What stands for a weight asks here how an operation is done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Filled by `zokernels.perturb.operations`.
OPERATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def _those_there_are(attributes: tuple[str, ...], methods: tuple[str, ...]) -> frozenset:
    """The functions of these names, as many of them as this version of torch has."""
    return frozenset(
        [getattr(torch.Tensor, n).__get__ for n in attributes if hasattr(torch.Tensor, n)]
        + [getattr(torch.Tensor, n) for n in methods if hasattr(torch.Tensor, n)]
    )


# What is known of a weight by where it lies, without its values.
LAYOUT = _those_there_are((), ("stride", "storage_offset", "is_contiguous"))
# What is known of it besides.
METADATA = LAYOUT | _those_there_are(
    (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn",
        "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_cpu", "is_cuda", "is_meta",
        "itemsize", "nbytes", "output_nr", "_version", "is_xpu", "is_mps", "names",
        "_backward_hooks", "_post_accumulate_grad_hooks",
    ),
    (
        "size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex",
        "element_size", "__len__", "__hash__", "is_conj", "is_neg", "is_inference", "get_device",
    ),
)  # fmt: skip
# What is done to a parameter itself, and not to its values.
STATE = frozenset(
    getattr(torch.Tensor, n).__set__ for n in ("requires_grad", "grad")
) | _those_there_are(
    (), ("requires_grad_", "retain_grad", "register_hook", "register_post_accumulate_grad_hook")
)
# What hands out a weight's memory, or other memory for it.
DATA: Any = torch.Tensor.data


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into its first argument, as torch names those that do."""
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "__set__") or kwargs.get("inplace") is True:
        return True
    in_place = name.startswith("__i") and name.endswith("__")
    return (in_place and name not in _READS) or (name.endswith("_") and not name.endswith("__"))


_READS = {"__invert__", "__index__", "__int__", "__iter__", "__init__", "__instancecheck__"}

"""The tensors that a captured step reads its batch from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten


class StaticBatch:
    """Copies of a batch's tensors, which later batches of the same shapes are written to.

    Args:
        example: Tensors in dicts, lists and tuples, on any device. What else is in it is constant.
        device: Where the copies are.

    Attributes:
        value: The batch, as `example` is built.
    """

    def __init__(self, example: Any, device: torch.device):
        flat, self._structure = tree_flatten_with_path(_plain(example))
        self._names = ["batch" + keystr(path) for path, _ in flat]
        self._leaves = [
            x.detach().to(device, copy=True) if isinstance(x, torch.Tensor) else x for _, x in flat
        ]
        self.value = tree_unflatten(self._leaves, self._structure)

    def fill(self, batch: Any) -> None:
        """Copy a batch into the tensors.

        Raises:
            ValueError: If it is not built as the example was; nothing is copied then.
        """
        flat, structure = tree_flatten_with_path(_plain(batch))
        if structure != self._structure:
            got = ", ".join("batch" + keystr(path) for path, _ in flat) or "nothing"
            raise ValueError(
                f"The batch has {got}, but the step was made for {', '.join(self._names)}; give "
                "the same entries in the same order, or make another GraphedStep for this kind."
            )
        for name, mine, (_, given) in zip(self._names, self._leaves, flat, strict=True):
            self._check(name, mine, given)
        for mine, (_, given) in zip(self._leaves, flat, strict=True):
            if isinstance(mine, torch.Tensor) and mine is not given:
                mine.copy_(given, non_blocking=True)

    @staticmethod
    def _check(name: str, mine: Any, given: Any) -> None:
        if isinstance(mine, torch.Tensor) and isinstance(given, torch.Tensor):
            if (mine.shape, mine.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"{name} is {given.dtype} of shape {tuple(given.shape)}, but the step was made "
                    f"for {mine.dtype} of shape {tuple(mine.shape)}; pad to that shape, or make "
                    "another GraphedStep for this one."
                )
        elif isinstance(mine, torch.Tensor) or isinstance(given, torch.Tensor) or mine != given:
            raise ValueError(
                f"{name} is {_shown(given)}, but the step was made for {_shown(mine)}, and only "
                "tensors may change; make another GraphedStep."
            )


def _plain(batch: Any) -> Any:
    # A tokenizer's output is a mapping, but not a dict.
    return dict(batch) if isinstance(batch, Mapping) else batch


def _shown(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else repr(value)
    )

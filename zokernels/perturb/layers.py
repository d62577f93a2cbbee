"""The layers of a model, wherever it keeps them."""

from __future__ import annotations

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The elements of the model's outermost module lists, in order; of sequences if it has none."""
    for kind in (nn.ModuleList, nn.Sequential):
        found = _elements(model, kind)
        if found:
            return found
    return []


def _elements(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    if isinstance(module, kind):
        return list(module.children())
    return [layer for child in module.children() for layer in _elements(child, kind)]

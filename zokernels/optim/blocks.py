"""Blocks: a partition of the parameters, each part perturbed alone and updated from its own losses.

A partition is stored as one integer a parameter, the number of its block, as streams are. Source:
block-wise zeroth-order fine-tuning of Zhang et al., "Revisiting Zeroth-Order Optimization for
Memory-Efficient LLM Fine-Tuning: A Benchmark", ICML 2024, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import nn

from zokernels.perturb.layers import layers_of

# Update a block before the next one is perturbed (Gauss–Seidel), or all after the last one.
ORDERS = ("sequential", "simultaneous")

# Parts of names, besides `nn.Embedding`, of what comes before the layers; project_in is OPT-350M's.
_EARLY = ("emb", "project_in")

Blocks = str | Callable[[str], Hashable] | Sequence[Any] | None


def number(blocks: Blocks, model: nn.Module | None, params: Sequence[nn.Parameter]) -> list[int]:
    """The number of each parameter's block.

    Args:
        blocks: ``"layer"`` (the embeddings, each layer, and the head), ``"module"`` (each module
            that holds parameters itself), a list of lists of parameters, a function from a
            parameter's name to its block's label, or the numbers themselves.
        model: The module whose parameters these are; needed for names and for layers.
        params: The parameters to number.

    Raises:
        TypeError: If ``blocks`` is none of these.
        ValueError: If a trainable parameter is in no block or in two, or the module is needed.
    """
    if isinstance(blocks, list | tuple):
        if all(isinstance(b, int) and not isinstance(b, bool) for b in blocks):
            return _as_given(blocks, params)
        return _from_lists(blocks, model, params)
    if not callable(blocks) and blocks not in ("layer", "module"):
        raise TypeError(
            f"blocks is {blocks!r}, but it must be None, 'layer', 'module', a list of lists of "
            "parameters, or a function from a parameter's name to its block's label."
        )
    if model is None:
        raise ValueError(
            f"blocks={blocks!r} needs the module, but only parameters were given; pass the "
            "module itself, or blocks as a list of lists of parameters."
        )
    if callable(blocks):
        labels = {id(p): blocks(name) for name, p in model.named_parameters()}
        places: dict[Hashable, int] = {}
        numbers = {i: places.setdefault(label, len(places)) for i, label in labels.items()}
    else:
        numbers = by_layer(model) if blocks == "layer" else _by_module(model)
    return [numbers[id(p)] for p in params]


def by_layer(model: nn.Module) -> dict[int, int]:
    """The block of each parameter's id: 0 the embeddings, 1 … n the layers, n + 1 the head.

    Tied weights belong where they come first. The split between embeddings and head goes by
    `nn.Embedding`, by "emb" or "project_in" in the name, and by transformers'
    ``get_output_embeddings``.

    Raises:
        ValueError: If the model has no list of layers.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"blocks='layer' looks for an nn.ModuleList or nn.Sequential of layers, but "
            f"{type(model).__name__} has none; use blocks='module' or a list of lists."
        )
    numbers: dict[int, int] = {}
    for i, layer in enumerate(layers):
        for p in layer.parameters():
            numbers.setdefault(id(p), i + 1)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None and id(p) not in numbers:
                path = f"{name}.{key}".lower()
                early = isinstance(module, nn.Embedding) or any(word in path for word in _EARLY)
                numbers[id(p)] = 0 if early and module is not head else len(layers) + 1
    return numbers


def lists(groups: Sequence[dict]) -> list[list[nn.Parameter]]:
    """The partition of some param groups, given by numbers, as a list of lists of parameters."""
    numbered = [pair for g in groups for pair in zip(g["blocks"], g["params"], strict=True)]
    return [[p for n, p in numbered if n == k] for k in range(max(n for n, _ in numbered) + 1)]


def _by_module(model: nn.Module) -> dict[int, int]:
    numbers: dict[int, int] = {}
    for i, module in enumerate(model.modules()):
        for p in module._parameters.values():
            if p is not None:
                numbers.setdefault(id(p), i)
    used = {old: new for new, old in enumerate(sorted(set(numbers.values())))}
    return {i: used[old] for i, old in numbers.items()}


def _as_given(blocks: Sequence[int], params: Sequence[nn.Parameter]) -> list[int]:
    if len(blocks) != len(params) or min(blocks, default=0) < 0:
        raise ValueError(
            f"blocks has the numbers {list(blocks)}, but there are {len(params)} parameters; give "
            "each its block's number, at least 0."
        )
    return list(blocks)


def _from_lists(
    blocks: Sequence[Any], model: nn.Module | None, params: Sequence[nn.Parameter]
) -> list[int]:
    named = () if model is None else model.named_parameters()
    names = {id(p): repr(name) for name, p in named}
    numbers: dict[int, int] = {}
    for i, block in enumerate(blocks):
        # A tensor is iterable, and so would be taken for a block of its rows.
        members = [block] if isinstance(block, nn.Parameter) else list(block)
        for p in members:
            if not isinstance(p, nn.Parameter):
                raise TypeError(
                    f"blocks[{i}] holds a {type(p).__name__}, but a block is a list of parameters."
                )
            if numbers.setdefault(id(p), i) != i:
                raise ValueError(
                    f"Parameter {names.get(id(p), tuple(p.shape))} is in blocks "
                    f"{numbers[id(p)]} and {i}, but it can be in one only."
                )
    for place, p in enumerate(params):
        if p.requires_grad and id(p) not in numbers:
            raise ValueError(
                f"Parameter {names.get(id(p), place)} is trainable, but in none of the "
                f"{len(blocks)} blocks; put it in one, or freeze it."
            )
    # A frozen parameter outside every block: its number is never used.
    return [numbers.get(id(p), 0) for p in params]

"""Parts of a model, so that a probe can say where its gradient is and where only noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zokernels.optim import blocks

Groups = str | Callable[[str], Any] | None

# Parts of the names of modules, in the order in which they decide.
_WORDS = {
    "embeddings": ("emb", "wte", "wpe"),
    "attention": ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    "head": ("head", "classifier", "score", "pooler", "predictions"),
    "mlp": ("mlp", "ffn", "feed_forward", "fc", "intermediate", "output.dense", "_proj"),
}
# A norm's name in the models of transformers: LayerNorm, input_layernorm, ln_1, ln_f.
_NORMS = ("norm", "ln_")


def label(model: nn.Module | None, groups: Groups) -> dict[int, str]:
    """The part of each parameter, by its id.

    Args:
        model: The module.
        groups: ``"group"`` (embeddings, attention, mlp, norms, biases, head, other), ``"layer"``
            (embeddings, each layer, head), or a function of a parameter's name.

    Raises:
        ValueError: If ``groups`` is none of these, or there is no module, or it has no layers.
    """
    if not callable(groups) and groups not in ("group", "layer"):
        raise ValueError(
            f"groups is {groups!r}, but it must be None, 'group', 'layer', or a function from a "
            "parameter's name to its group's label."
        )
    if model is None:
        raise ValueError(
            f"groups={groups!r} needs the module, but the optimizer knows its parameters only; "
            "make it of the module, or leave groups out."
        )
    if callable(groups):
        return {id(p): str(groups(name)) for name, p in model.named_parameters()}
    if groups == "layer":
        numbers = blocks.by_layer(model)
        last = len(blocks.layers_of(model)) + 1
        names = {0: "embeddings", last: "head"}
        return {i: names.get(n, f"layer {n}") for i, n in numbers.items()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:
                found[id(p)] = "head" if module is head else _kind(module, path.lower(), name)
    return found


def _kind(module: nn.Module, path: str, name: str) -> str:
    last = path.rpartition(".")[2]
    if "norm" in type(module).__name__.lower() or any(word in last for word in _NORMS):
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if name.endswith("bias"):
        return "biases"
    whole = f"{path}.{name}"
    return next((k for k, words in _WORDS.items() if any(w in whole for w in words)), "other")

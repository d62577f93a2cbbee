"""The model families: which of their modules are the layers, the attention, and the head.

This table is all that is known of any one architecture; whatever needs such a name asks here.
"""

import re
from dataclasses import dataclass
from typing import Any

from zokernels.lab.errors import InputError


@dataclass(frozen=True)
class Family:
    """Names of modules.

    Attributes:
        layers: The list of layers, from the base model.
        attention: The attention, from a layer.
        query: The projection to queries, from the attention.
        value: The projection to values; the same where one projection makes both.
        head: The output layer of the language model.
    """

    layers: str
    attention: str
    query: str
    value: str
    head: str


_LLAMA = Family("layers", "self_attn", "q_proj", "v_proj", "lm_head")
_BERT = Family("encoder.layer", "attention.self", "query", "value", "cls")
_ROBERTA = Family("encoder.layer", "attention.self", "query", "value", "lm_head")

# By the configuration's model_type. Vicuna is a Llama.
FAMILIES: dict[str, Family] = {
    "opt": Family("decoder.layers", "self_attn", "q_proj", "v_proj", "lm_head"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Family("h", "attn", "c_attn", "c_attn", "lm_head"),
    "bert": _BERT,
    "roberta": _ROBERTA,
}


@dataclass(frozen=True)
class Modules:
    """A family's names in one model, from its root."""

    layers: str
    queries_and_values: str
    head: str


def of(model: Any) -> Modules:
    """The names of a model's modules.

    Args:
        model: A transformers model, with or without its head.

    Returns:
        The name of the list of layers, a regular expression that matches the projections to
        queries and values, and the name of the head.

    Raises:
        InputError: If the table has no such family.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise InputError(
            f"The table of model families has no '{kind}'; it has {', '.join(FAMILIES)}. Use the "
            "scheme full or bitfit, or --train-only, or add its row in families.py."
        )
    family = FAMILIES[kind]
    base = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    layers = ".".join(filter(None, (base, family.layers)))
    ends = "|".join(dict.fromkeys((family.query, family.value)))
    places = rf"{re.escape(layers)}\.\d+\.{re.escape(family.attention)}\.({ends})"
    return Modules(layers, places, family.head)

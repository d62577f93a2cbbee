"""Prefix and prompt tuning through peft, started from what the model really holds.

Prefix: the keys and values that some real tokens leave in every layer, so that the first step
starts near the model's own activations (as MeZO does; Li and Liang, ACL 2021). Prompt: the
embeddings of some real tokens (Lester et al., EMNLP 2021).
"""

from typing import Any

import torch

from zokernels.lab.errors import InputError

PREFIX_TOKENS, PROMPT_TOKENS = 5, 10


def import_peft(scheme: str) -> Any:
    """The package peft.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(
            f"The scheme '{scheme}' needs peft, which is not installed: "
            "pip install 'zokernels[hf]'."
        ) from None
    return peft


def prefix(model: Any) -> Any:
    """The model with a trainable prefix of 5 tokens in every layer, the rest frozen.

    Raises:
        InputError: If the model's attention takes no keys and values that could be a prefix.
    """
    peft = import_peft("prefix")
    text = _real_tokens(model, PREFIX_TOKENS)
    config = peft.PrefixTuningConfig(
        task_type=_task_type(model), num_virtual_tokens=PREFIX_TOKENS, prefix_projection=False
    )
    rows = _activations(model, text)
    return _adapted(peft.get_peft_model(model, config), rows)


def prompt(model: Any) -> Any:
    """The model with 10 trainable embeddings before its input, the rest frozen."""
    peft = import_peft("prompt")
    embed = model.get_input_embeddings()
    rows = embed(_real_tokens(model, PROMPT_TOKENS)).detach()[0]
    config = peft.PromptTuningConfig(
        task_type=_task_type(model),
        num_virtual_tokens=PROMPT_TOKENS,
        token_dim=embed.embedding_dim,
    )
    return _adapted(peft.get_peft_model(model, config), rows)


def _task_type(model: Any) -> str:
    """Peft's name for how such a model is called; an encoder, with or without a head, is plain."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type, ())
    causal = type(model).__name__ in ((names,) if isinstance(names, str) else names)
    return "CAUSAL_LM" if causal else "FEATURE_EXTRACTION"


def _real_tokens(model: Any, count: int) -> torch.Tensor:
    """Tokens by the global generator, none of them special."""
    config = model.config
    special = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
    allowed = [i for i in range(config.vocab_size) if i not in special]
    picked = torch.randint(len(allowed), (count,))
    device = model.get_input_embeddings().weight.device
    return torch.tensor([[allowed[int(i)] for i in picked]], device=device)


@torch.no_grad()
def _activations(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A row a token: its keys and values in every layer, in the order that peft reads them.

    The cache holds the heads that keys and values have, which under grouped-query attention are
    fewer than the queries'.
    """
    from transformers import DynamicCache

    # Of its own making: a cache by the configuration would forget what a sliding window passes.
    cache = DynamicCache()
    try:
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError):
        # An encoder that has no place for them.
        cache = DynamicCache()
    if not cache.layers:
        raise InputError(
            "--scheme prefix puts keys and values before each layer's own, and this "
            f"{type(model).__name__} takes none; use prompt, lora or bitfit."
        )
    states = [s for layer in cache.layers for s in (layer.keys, layer.values)]
    return torch.cat([s[0].transpose(0, 1).flatten(1) for s in states], dim=1)


@torch.no_grad()
def _adapted(adapted: Any, rows: torch.Tensor) -> Any:
    """The adapter in evaluation mode, with a row for each of its tokens to start from."""
    weight = adapted.prompt_encoder["default"].embedding.weight
    weight.data = rows.to(weight.dtype).clone()
    return adapted.eval()

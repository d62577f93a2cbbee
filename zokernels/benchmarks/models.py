"""Model configurations by name, built with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

from zokernels.benchmarks import machine
from zokernels.tasks.errors import InputError

_OPT = {
    # hidden, layers, heads, feed-forward
    "opt-125m": (768, 12, 12, 3072),
    "opt-350m": (1024, 24, 16, 4096),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
    "opt-13b": (5120, 40, 40, 20480),
}
NAMES = (*_OPT, "llama-2-7b", "mistral-7b", "roberta-large")


def config(name: str) -> Any:
    """The transformers configuration.

    Raises:
        InputError: If the name is unknown.
    """
    import transformers as hf

    if name in _OPT:
        hidden, layers, heads, inner = _OPT[name]
        return hf.OPTConfig(
            hidden_size=hidden,
            word_embed_proj_dim=512 if name == "opt-350m" else hidden,
            do_layer_norm_before=name != "opt-350m",
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=inner,
        )
    if name == "llama-2-7b":
        return hf.LlamaConfig()
    if name == "mistral-7b":
        return hf.MistralConfig()
    if name == "roberta-large":
        return hf.RobertaConfig(
            vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1,
            pad_token_id=1, bos_token_id=0, eos_token_id=2,
        )  # fmt: skip
    raise InputError(f"--model must be one of {', '.join(NAMES)}, got '{name}'.")


def check(name: str, rows: int, length: int, dtype: str, device: str) -> None:
    """Raise unless a model and its batch can be made here.

    Raises:
        InputError: If there is no such device, the text is too long, or memory is too small.
    """
    import transformers as hf

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device must be cpu, or cuda where torch sees one, got '{device}'.")
    chosen = config(name)
    longest = chosen.max_position_embeddings - (2 if isinstance(chosen, hf.RobertaConfig) else 0)
    if length > longest:
        raise InputError(f"--length is {length}, but {name} reads at most {longest} tokens.")
    with torch.device("meta"):
        kind_of = hf.AutoModelForMaskedLM if _is_masked(name) else hf.AutoModelForCausalLM
        weights = sum(p.numel() for p in kind_of.from_config(chosen).parameters())
    needed = weights * getattr(torch, dtype).itemsize
    free = machine.free_memory(device)
    if free is not None and needed > free:
        raise InputError(
            f"--model {name} in {dtype} takes {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} "
            "GiB are free; choose a smaller one, or --dtype bfloat16."
        )


def build(name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The model with random weights, in evaluation mode."""
    import transformers as hf

    torch.manual_seed(0)
    chosen = config(name)
    kind = hf.AutoModelForMaskedLM if _is_masked(name) else hf.AutoModelForCausalLM
    return kind.from_config(chosen, dtype=dtype).to(device).eval()


def batch(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, every position with a label."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    ids = ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _is_masked(name: str) -> bool:
    return name == "roberta-large"

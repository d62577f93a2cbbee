"""Model configurations by name, built with random weights: nothing is downloaded."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from zokernels.lab.benchmarks import machine
from zokernels.lab.errors import InputError

_OPT = {
    # hidden, layers, heads, feed-forward
    "opt-125m": (768, 12, 12, 3072),
    "opt-350m": (1024, 24, 16, 4096),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
    "opt-13b": (5120, 40, 40, 20480),
    # To try a command out: of few words and short texts, too.
    "opt-tiny": (64, 3, 4, 128),
}
_TINY = dict(vocab_size=512, max_position_embeddings=128)
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
            **_TINY if name == "opt-tiny" else {},
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
    check_shape(name, length, device)
    with torch.device("meta"):
        weights = sum(p.numel() for p in empty(name).parameters())
    needed = weights * getattr(torch, dtype).itemsize
    free = machine.free_memory(device)
    if free is not None and needed > free:
        raise InputError(
            f"--model {name} in {dtype} takes {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} "
            "GiB are free; choose a smaller one, or --dtype bfloat16."
        )


def check_shape(name: str, length: int, device: str) -> None:
    """Raise unless there is such a device and the model reads texts of this length.

    Raises:
        InputError: If not.
    """
    import transformers as hf

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device must be cpu, or cuda where torch sees one, got '{device}'.")
    chosen = config(name)
    longest = chosen.max_position_embeddings - (2 if isinstance(chosen, hf.RobertaConfig) else 0)
    if length > longest:
        raise InputError(f"--length is {length}, but {name} reads at most {longest} tokens.")


def build(name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The model with random weights, made on the device, in evaluation mode."""
    torch.manual_seed(0)
    # On a CPU first, 13 billion normals take minutes.
    with torch.device(device):
        model = empty(name, dtype)
    return model.to(device).eval()


def empty(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the device, or with the fake tensors, that torch is told to use."""
    return of_config(config(name), dtype)


def of_config(chosen: Any, dtype: torch.dtype) -> Any:
    """A language model of the configuration, of the class for its kind."""
    import transformers as hf

    is_masked = isinstance(chosen, hf.RobertaConfig)
    kind = hf.AutoModelForMaskedLM if is_masked else hf.AutoModelForCausalLM
    return kind.from_config(chosen, dtype=dtype)


def batch(model: Any, rows: int, length: int, caches: bool = True) -> dict[str, Any]:
    """Random tokens, every position with a label.

    Args:
        model: The model.
        rows: Of the batch.
        length: Tokens of a row.
        caches: Whether a causal model keeps every layer's keys and values, which it does unless
            told not to, and which only generation needs.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    ids = ids.to(model.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    causal = "use_cache" in inspect.signature(model.forward).parameters
    return given if caches or not causal else {**given, "use_cache": False}

"""A frozen base in 8 or 4 bits, by bitsandbytes (Dettmers et al., NeurIPS 2022 and 2023)."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from zokernels.lab.errors import InputError

KINDS = ("8bit", "4bit")
# What leaves every matrix alone.
SCHEMES = ("lora", "prefix", "prompt", "bitfit")


def options(kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told.

    Raises:
        InputError: If bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"--load-in {kind} needs bitsandbytes, which is not installed: "
            "pip install 'zokernels[quantised]'."
        )
    from transformers import BitsAndBytesConfig

    # Of what it would rather have, at every product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        if kind == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": config, "device_map": {"": device}}


@torch.no_grad()
def settle(model: Any) -> None:
    """Has packed weights stay as they were read, and runs the model once to see that it does.

    On a CPU with bfloat16 products bitsandbytes packs 4-bit weights anew at their first use, rounds
    inputs and scales to bfloat16 from then on, and mixes up the scales of a layer whose
    `state_dict` is asked for.

    Raises:
        InputError: If its layers are of a size that bitsandbytes does not take.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    try:
        model(input_ids=ids)
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f"--load-in: bitsandbytes does not take this model's layers ({error}); their sizes "
            "must be multiples of 32 or more."
        ) from None


def count(p: torch.nn.Parameter) -> int:
    """A parameter's weights, of which a packed one holds two in a byte."""
    return p.numel() * (2 if hasattr(p, "quant_state") and p.dtype == torch.uint8 else 1)

"""Tiny models in GGUF form, written by the package gguf, and what transformers should make of them.

Importing it skips a test's module where such files cannot be read.
"""

import pytest
import torch
from tiny import WORDS

from zokernels.lab.errors import InputError
from zokernels.lab.models import gguf_file

gguf = pytest.importorskip("gguf", reason="pip install 'zokernels[gguf]'")
transformers = pytest.importorskip("transformers", reason="pip install 'zokernels[gguf]'")
try:
    gguf_file.check_installed(transformers.__version__)
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

KIND = gguf.GGMLQuantizationType
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    # The sixth layer is Gemma's first that sees the whole text.
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    sliding_window=64,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    # Large enough that random models of this size tell sentences apart.
    initializer_range=0.3,
)


def vocabulary():
    """Words with a blank before them and without, and the pieces that they are merged of."""
    words = [*WORDS, "It"]
    pieces = dict.fromkeys([*SPECIAL, "▁", *sorted(set("".join(words)))])
    for word in words:
        for whole in (word, "▁" + word):
            pieces |= dict.fromkeys(whole[:end] for end in range(2, len(whole) + 1))
    return list(pieces)


def kind_of(name):
    """Blocks of several types in one file, as the usual mixtures have them."""
    if "embed" in name:
        return KIND.Q8_0
    return KIND.Q4_0 if "attn" in name else KIND.Q5_0 if "up_proj" in name else KIND.F16


def write(path, *, architecture="gemma3", leave_out=(), entries=(), tensors=()):
    """Writes a tiny Gemma 3 with random weights.

    Args:
        path: The file.
        architecture: What it says that it is.
        leave_out: Names of tensors that it lacks.
        entries: Further entries of its header, as pairs of a string and a number or a string.
        tensors: Further tensors, as pairs of a name and an array.

    Returns:
        The model with the weights that the file's blocks stand for.
    """
    tokens = vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = transformers.Gemma3TextConfig(**SHAPE, vocab_size=len(tokens))
        model = transformers.Gemma3ForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.2)
    out = gguf.GGUFWriter(path, architecture)
    out.add_context_length(SHAPE["max_position_embeddings"])
    out.add_embedding_length(SHAPE["hidden_size"])
    out.add_block_count(SHAPE["num_hidden_layers"])
    out.add_feed_forward_length(SHAPE["intermediate_size"])
    out.add_head_count(SHAPE["num_attention_heads"])
    out.add_head_count_kv(SHAPE["num_key_value_heads"])
    out.add_key_length(SHAPE["head_dim"])
    out.add_value_length(SHAPE["head_dim"])
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(1e6)
    out.add_sliding_window(SHAPE["sliding_window"])
    out.add_tokenizer_model("llama")
    out.add_token_list(tokens)
    out.add_token_scores([-float(i) for i in range(len(tokens))])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    out.add_token_types([control if token in SPECIAL else normal for token in tokens])
    out.add_pad_token_id(0)
    out.add_eos_token_id(1)
    out.add_bos_token_id(2)
    out.add_unk_token_id(3)
    out.add_add_bos_token(True)
    out.add_add_space_prefix(False)
    for key, value in entries:
        (out.add_string if isinstance(value, str) else out.add_uint32)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, SHAPE["num_hidden_layers"])
    for name, parameter in model.named_parameters():
        known = names.get_name(name.removesuffix(".weight")) + ".weight"
        values, kind = parameter.detach().numpy(), kind_of(name)
        if parameter.ndim == 1:
            # Llama.cpp multiplies by the weight of a norm, Gemma by 1 + that.
            stored = values + 1
            meant = stored - 1
        else:
            stored = gguf.quants.quantize(values, kind)
            meant = gguf.quants.dequantize(stored, kind)
        parameter.data = torch.tensor(meant)
        if known not in leave_out:
            out.add_tensor(known, stored, raw_dtype=kind if parameter.ndim > 1 else None)
    for name, values in tensors:
        out.add_tensor(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model

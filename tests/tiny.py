"""Tiny models with random weights and a word-level tokenizer, as folders on disk."""

import os
from pathlib import Path

import torch

import zokernels

WORDS = (
    "it was terrible great good bad fine dull film a an the and with heart slow very . , "
    "movie plot i of to is this no not every one"
).split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def environment():
    """The environment for a child process that imports this package, on one thread."""
    root = str(Path(zokernels.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def models():
    """A builder of a tiny random model for each kind, from its configuration."""
    import transformers as t

    shape = dict(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        # Large enough that random models of this size tell sentences apart.
        initializer_range=0.5,
        init_std=0.5,
    )
    encoder = dict(shape, intermediate_size=32)
    # Two queries share a key and a value; heads are wider than hidden_size / heads.
    grouped = dict(encoder, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    # A layer that sees a window of the text and one that sees all of it.
    windows = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
    gpt2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=80)
    return {
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**encoder)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**grouped, sliding_window=32)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**shape, **gpt2)),
        "qwen": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**{**grouped, "head_dim": 4})),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**grouped)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**grouped, **windows)),
        "bert": lambda: t.BertModel(t.BertConfig(**encoder)),
        "bert-mlm": lambda: t.BertForMaskedLM(t.BertConfig(**encoder)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**encoder)),
    }


def build(kind, path, seed=0):
    """Saves a tiny model of a kind of `models` with a tokenizer and returns its folder."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    causal = kind not in ("bert", "bert-mlm", "roberta")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A" if causal else "<s> $A </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models()[kind]()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

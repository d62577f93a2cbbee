"""Tiny models with random weights and a word-level tokenizer, as folders on disk."""

import os
from pathlib import Path

import torch

import zokernels

WORDS = (
    "it was terrible great good bad fine dull film a an the and with heart slow very . , "
    "movie plot i of to is this no not every one"
).split()


def environment():
    """The environment for a child process that imports this package, on one thread."""
    root = str(Path(zokernels.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def build(kind, path, seed=0):
    """Saves a tiny model of a kind ("opt", "llama", "bert", "roberta") and returns its folder."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    causal = kind in ("opt", "llama")
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
    shape = dict(
        vocab_size=len(vocabulary),
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {
            "opt": lambda: OPTForCausalLM(OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16)),
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**encoder)),
            "bert": lambda: BertModel(BertConfig(**encoder)),
            "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**encoder)),
        }[kind]()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

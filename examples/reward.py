"""A model learns a reward that has no gradient, over its own generations, by forward passes only.

python examples/reward.py

A tiny Llama with random weights reads three digits and an equals sign, and is to say the first.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zokernels as zk

EQUALS, PADDING = 10, 11


def prompts(count, draws):
    """Rows of three digits and an equals sign."""
    ids = torch.randint(0, EQUALS, (count, 4), generator=draws)
    ids[:, -1] = EQUALS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def reward(texts: list[list[int]]) -> float:
    """The share of texts whose answer is the first digit of their prompt."""
    return sum(text[4] == text[0] for text in texts) / len(texts)


def main(steps: int = 2000, seed: int = 0, told=print) -> float:
    """Trains and returns the reward on prompts that are not trained on."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=PADDING, bos_token_id=EQUALS, eos_token_id=None,
    )  # fmt: skip
    model, answer = LlamaForCausalLM(config).eval(), dict(max_new_tokens=1, do_sample=False)
    draws, unseen = torch.Generator().manual_seed(seed), prompts(500, torch.Generator())
    opt = zk.ZOSGD(
        model, lr=2e-2, eps=5e-2, num_queries=32, estimator="population", normalize="std",
        dist="rank1", maximize=True, seed=seed,
    )  # fmt: skip
    for step in range(steps + 1):
        if step % 100 == 0:
            found = reward(model.generate(**unseen, **answer).tolist())
            told(step, found)
        if step < steps:
            with opt.ask() as population:
                ids = model.generate(**population.repeat(prompts(32, draws)), **answer)
            opt.tell([reward(own.tolist()) for own in population.split(ids)])
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

"""A model learns a reward that has no gradient, over its own generations, by forward passes only.

python examples/reward.py

A tiny Llama with random weights sees three digits and an equals sign, and is to say the first of
them. The reward is a plain Python function of the text: 1 if it does, else 0.
"""

import sys
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zokernels as zk

DIGITS, EQUALS, PADDING = 10, 10, 11


def small_model(seed: int) -> LlamaForCausalLM:
    """Two layers, 26 thousand weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=PADDING, bos_token_id=EQUALS, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(count: int, draws: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of three digits and an equals sign."""
    ids = torch.randint(0, DIGITS, (count, 4), generator=draws)
    ids[:, -1] = EQUALS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def reward(texts: list[list[int]]) -> float:
    """The share of texts whose answer is the first digit of their prompt."""
    return sum(text[4] == text[0] for text in texts) / len(texts)


def main(
    steps: int = 2000, seed: int = 0, told: Callable[[int, float], None] | None = None
) -> float:
    """Trains and returns the reward on prompts that it has not seen in training."""
    model, draws = small_model(seed), torch.Generator().manual_seed(seed + 1)
    unseen = prompts(500, torch.Generator().manual_seed(10**6))
    opt = zk.ZOSGD(
        model, lr=2e-2, eps=5e-2, num_queries=32, estimator="population", normalize="std",
        dist="rank1", maximize=True, seed=seed,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=steps)
    for step in range(steps + 1):
        if step % 100 == 0:
            found = reward(model.generate(**unseen, max_new_tokens=1, do_sample=False).tolist())
            print(f"step {step}: reward {found:.3f}")
            if told:
                told(step, found)
        if step == steps:
            return found
        with opt.ask() as population:
            batch = population.repeat(prompts(32, draws))
            ids = model.generate(**batch, max_new_tokens=1, do_sample=False)
        opt.tell([reward(own.tolist()) for own in population.split(ids)])
        schedule.step()
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

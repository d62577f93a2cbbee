"""A plain loop: a causal language model learns SST-2 by forward passes only.

python examples/plain_loop.py facebook/opt-125m
"""

import sys

import zokernels as zk
from zokernels.lab.models import loading
from zokernels.lab.runs.evaluate import accuracy
from zokernels.lab.scoring import SCORERS
from zokernels.lab.tasks import batches, data, get_task


def main(name: str, steps: int = 2000) -> float:
    """Trains and returns the accuracy on dev."""
    task = get_task("sst2")
    splits = data.load(task)
    loaded = loading.load(name)
    scorer = SCORERS[loaded.kind](loaded.model, loaded.tokenizer, task, max_length=64)
    opt = zk.ZOSGD(loaded.model, lr=1e-6, eps=1e-3, seed=7)
    order = batches.batches(splits.train, 16, seed=7, balanced=False)
    for step in range(1, steps + 1):
        batch = scorer.collate(next(order))
        loss = opt.step(lambda batch=batch: scorer.loss(batch))
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, slope {opt.projected_gradients[0]:+.2f}")
    found = accuracy(scorer, splits.dev)
    print(f"dev accuracy {found.value:.1%} ± {found.error:.1%}")
    return found.value


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))

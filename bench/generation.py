"""Tokens a second of a population that generates together: ``python -m bench.generation``.

In turn and on one machine: the model itself on a batch of as many rows, all members at once on that
batch, and one member after the other on its own rows. Random weights, greedy, and as many new
tokens in each; the shares are of the medians, in results/generation.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import zokernels as zk
from zokernels.lab.benchmarks import machine, models, results

RESULTS = results.FOLDER / "generation.csv"
COLUMNS = (
    *machine.COLUMNS, "model", "weights", "dtype", "dist", "members", "rows", "prompt", "tokens",
    "repeats", "plain_tokens_per_s", "together_tokens_per_s", "apart_tokens_per_s",
    "share_of_plain", "times_apart",
)  # fmt: skip
PROMPT, TOKENS = 32, 32


def measure(model: Any, dist: str, members: int, rows: int, repeats: int) -> dict[str, object]:
    """The rates of the three, each round in turn."""
    ids = torch.randint(5, 1000, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    many = {key: t.repeat(members, 1) for key, t in batch.items()}
    told = dict(
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-3, num_queries=members, estimator="population", dist=dist)

    def plain() -> None:
        model.generate(**many, **told)

    def together() -> None:
        with opt.ask() as population:
            model.generate(**population.repeat(batch), **told)

    def apart() -> None:
        for member in opt.ask():
            with member:
                model.generate(**batch, **told)

    cases: dict[str, Callable[[], None]] = dict(plain=plain, together=together, apart=apart)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 1):
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            # The first round makes what later ones find.
            if number:
                seconds[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(own) for name, own in seconds.items()}
    rate = {name: members * rows * TOKENS / s for name, s in middle.items()}
    return {
        **{f"{name}_tokens_per_s": f"{r:.1f}" for name, r in rate.items()},
        "share_of_plain": f"{middle['plain'] / middle['together']:.3f}",
        "times_apart": f"{middle['apart'] / middle['together']:.2f}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, and append a row for each."""
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__)
    parser.add_argument("--model", default="opt-125m", choices=models.NAMES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dist", default="rank1", choices=("rank1", "gaussian"))
    parser.add_argument("--members", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rows", type=int, default=1, help="prompts that each member answers")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    model = models.build(options.model, getattr(torch, options.dtype))
    weights = sum(p.numel() for p in model.parameters())
    about = {k: v for k, v in machine.about("cpu").items() if k in COLUMNS}
    for members in options.members:
        found = measure(model, options.dist, members, options.rows, options.repeats)
        row = {
            **about, "model": options.model, "weights": weights, "dtype": options.dtype,
            "dist": options.dist, "members": members, "rows": options.rows, "prompt": PROMPT,
            "tokens": TOKENS, "repeats": options.repeats, **found,
        }  # fmt: skip
        results.append(RESULTS, COLUMNS, [row])
        print(*(f"{k} {row[k]}" for k in ("dist", "members", *found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

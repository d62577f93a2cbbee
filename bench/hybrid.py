"""What a hybrid step stores for its backward, by how many layers go by zeroth order.

``python -m bench.hybrid`` counts it anew on an OPT configuration of 24 layers with random weights,
into bench/results/hybrid.csv. `make report` makes the table of docs/optimizers.md from
it. Nothing is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

import zokernels as zk
from zokernels.lab.benchmarks import results
from zokernels.lab.benchmarks.results import Row

RESULTS = results.FOLDER / "hybrid.csv"
COLUMNS = ("split", "reuse_forward", "forwards", "stored_bytes", "share")
LAYERS, SPLITS = 24, (0, 8, 16)

Closure = Callable[[], torch.Tensor]


def model() -> nn.Module:
    """Layers in the proportions of OPT-1.3B, an eighth as wide."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024,
        num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def stored(net: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that autograd keeps during ``run`` besides the weights, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    # Holding on to the storages keeps their addresses apart.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(s.nbytes() for s in kept.values())


def count() -> list[Row]:
    """A row for backpropagation through everything, and one for each split and variant."""
    net = model()
    ids = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(1))
    calls: list[int] = []

    def closure() -> torch.Tensor:
        calls.append(1)
        return net(input_ids=ids, labels=ids).loss

    whole = stored(net, lambda: closure().backward())
    net.zero_grad()
    rows = [_row("none: backpropagation", "", 1, whole, whole)]
    sgd = functools.partial(torch.optim.SGD, lr=0.0)
    for split in SPLITS:
        for reuse in (False, True):
            opt = zk.HybridZO(net, split, sgd, lr=0.0, reuse_forward=reuse)
            calls.clear()
            bytes_kept = stored(net, functools.partial(opt.step, closure))
            rows.append(_row(str(split), str(reuse), len(calls), bytes_kept, whole))
    return rows


def _row(split: str, reuse: str, forwards: int, kept: int, whole: int) -> Row:
    values = (split, reuse, str(forwards), str(kept), f"{kept / whole:.3f}")
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    results.write(RESULTS, COLUMNS, count())

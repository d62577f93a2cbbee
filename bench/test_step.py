"""A whole step of a tiny OPT, for pytest-benchmark: Python's share shows, and little else."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: the extra hf")

from zokernels.lab.benchmarks import models  # noqa: E402
from zokernels.lab.runs import optimizers  # noqa: E402


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=512, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=4,
        num_attention_heads=4, ffn_dim=256, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_two_forwards(benchmark, model):
    inputs = models.batch(model, 2, 16)
    benchmark.group = "a step, four layers of 64"

    @torch.no_grad()
    def forwards():
        return float(model(**inputs).loss), float(model(**inputs).loss)

    benchmark.pedantic(forwards, rounds=20, iterations=5, warmup_rounds=2)


@pytest.mark.parametrize("perturb", ["on_entry", "paired", "in_place"])
@pytest.mark.parametrize("optimizer", ["zo-sgd", "zo-adam"])
def test_step(benchmark, model, optimizer, perturb):
    inputs = models.batch(model, 2, 16)
    opt = optimizers.build(optimizer, model, dict(lr=1e-6, eps=1e-3, perturb=perturb))
    benchmark.group = "a step, four layers of 64"
    loss = benchmark.pedantic(
        lambda: opt.step(lambda: model(**inputs).loss), rounds=20, iterations=5, warmup_rounds=2
    )
    assert torch.as_tensor(loss).isfinite()

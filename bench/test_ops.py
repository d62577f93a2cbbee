"""add_noise_ beside its floor and peers, for pytest-benchmark.

``python -m pytest bench --benchmark-enable``; ZOKERNELS_BENCH_NUMEL sets the number of weights.
"""

from __future__ import annotations

import pytest
import torch

from bench import cases

CASES = cases.cases()


def _build(case: cases.Case, p: torch.Tensor) -> cases.Pass:
    try:
        return case.build(p)
    except cases.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_noise_(benchmark, case):
    run = _build(case, cases.weights(case.dtype, cases.NUMEL))
    benchmark.group = f"add_noise_ {case.dtype}, {cases.NUMEL:,} weights"
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("case", [c for c in CASES if c.dist], ids=str)
def test_the_pass_timed_adds_the_noise(case):
    # A peer that did less than the work would be no peer.
    p = torch.zeros(100_000, dtype=cases.DTYPES[case.dtype])
    run = _build(case, p)
    p.data = torch.zeros_like(p)  # to compile a pass runs it
    run()
    assert p.double().std().item() == pytest.approx(cases.EPS, rel=0.02)
    assert abs(p.double().mean().item()) < 5 * cases.EPS / 100_000**0.5

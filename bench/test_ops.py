"""The passes and updates of `zokernels bench ops`, for pytest-benchmark: ``make bench``.

ZOKERNELS_BENCH_NUMEL sets the number of weights. Times of one case after the other tell less than
the command's alternation; what they are for is pytest-benchmark's own history and comparison.
"""

from __future__ import annotations

import os

import pytest
import torch

from zokernels.lab.benchmarks import ops, passes

NUMEL = int(os.environ.get("ZOKERNELS_BENCH_NUMEL", 20_000_000))
DTYPES = ("float32", "bfloat16")


def found(full: bool) -> list[passes.Case]:
    try:
        return ops.cases(ops.Plan(dtypes=DTYPES, full=full))
    except passes.Unavailable:
        return []


def built(case: passes.Case, tensors: passes.Tensors) -> passes.Pass:
    try:
        return case.build(tensors)
    except passes.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def tensors():
    return passes.Tensors(NUMEL)


@pytest.mark.parametrize("case", [c for c in found(False) if c.op == "add_noise_"], ids=str)
def test_add_noise_(benchmark, case, tensors):
    benchmark.group = f"add_noise_ {case.dtype}, {NUMEL:,} weights"
    benchmark.pedantic(built(case, tensors), rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize(
    "case",
    [c for c in found(True) if (c.op, c.variant) == ("add_noise_", "") and c.dist],
    ids=str,
)
def test_the_pass_timed_adds_the_noise(case):
    # A peer that did less than the work would be no peer.
    tensors = passes.Tensors(100_000)
    run = built(case, tensors)
    for replaced in (False, True):
        p = tensors.weights(case.dtype, replaced)
        p.data = torch.zeros_like(p)  # to compile a pass runs it
    run()
    p = next(p for p in (tensors.weights(case.dtype, r) for r in (False, True)) if p.any())
    assert p.double().std().item() == pytest.approx(passes.EPS, rel=0.02)
    assert abs(p.double().mean().item()) < 5 * passes.EPS / 100_000**0.5


@pytest.mark.parametrize("case", [c for c in found(False) if c.op != "add_noise_"], ids=str)
def test_apply_update_(benchmark, case, tensors):
    benchmark.group = f"apply_update_ {case.op} {case.dtype}, {NUMEL:,} weights"
    benchmark.pedantic(built(case, tensors), rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in found(True)
        if not (c.op.startswith("add_noise") or c.name == passes.FLOOR or c.peer)
    ],
    ids=str,
)
def test_the_pass_timed_updates_all_that_its_floor_moves(case):
    tensors = passes.Tensors(20_000)
    before = tensors.weights(case.dtype).clone()
    built(case, tensors)()
    state = "bfloat16" if case.variant == passes.NARROW else "float32"
    for held in tensors.states(passes.STATES[case.op], state):
        assert held.any()
    # A step of 1e-9, as momentum's here, rounds to nothing in 16 bits.
    if case.dtype == "float32" and case.op != "momentum":
        assert not tensors.weights(case.dtype).equal(before)

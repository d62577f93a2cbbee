"""The updates of `zokernels bench ops`, for pytest-benchmark: ``make bench``."""

from __future__ import annotations

import pytest

from bench.test_ops import NUMEL, built, found
from zokernels.lab.benchmarks import passes


@pytest.fixture(scope="module")
def tensors():
    return passes.Tensors(NUMEL)


@pytest.mark.parametrize("case", [c for c in found(False) if c.op != "add_noise_"], ids=str)
def test_apply_update_(benchmark, case, tensors):
    benchmark.group = f"apply_update_ {case.op} {case.dtype}, {NUMEL:,} weights"
    benchmark.pedantic(built(case, tensors), rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize(
    "case",
    [c for c in found(True) if c.op != "add_noise_" and c.name != passes.FLOOR and not c.peer],
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

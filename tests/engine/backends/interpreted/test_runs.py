"""Trajectories replayed by the Triton kernels, in Triton's interpreter."""

import copy

import pytest
from test_replay import equal, train, weights

import zokernels as zk


@pytest.mark.parametrize("case", ["stochastic", "magnitude mask", "adam"])
def test_a_run_is_replayed_with_the_bits_that_it_had(case, tmp_path):
    base, after = train(case, tmp_path / "run", steps=5)
    for until, chunk in ((5, 256), (3, 2)):
        model = copy.deepcopy(base)
        zk.replay(model, tmp_path / "run", until, chunk=chunk, backend="triton")
        assert equal(weights(model), after[until])
    assert not equal(after[-1], after[0])

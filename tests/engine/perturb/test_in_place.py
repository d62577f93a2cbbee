"""In place: what is written back is what was put aside, and nothing that the closure brought."""

import warnings

import pytest
import torch
from torch import nn

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("named", [True, False])
def test_a_forward_that_writes_a_weight_is_named_once_and_undone(named):
    torch.manual_seed(0)
    # With max_norm an embedding scales the rows that it looks up, in place.
    model, ids = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Linear(4, 1)), torch.arange(3)
    before = model[0].weight.detach().clone()
    params = model if named else list(model.parameters())
    opt = zk.ZOSGD(params, lr=0.0, eps=1e-2, perturb="in_place")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            opt.step(lambda: model(ids).sum())
    (message,) = [str(w.message) for w in said]
    assert ("'0.weight'" if named else "'number 0'") in message and "(7, 4)" in message
    assert torch.equal(model[0].weight, before)


def test_a_forward_that_only_reads_says_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    opt = zk.ZOSGD(model, lr=1e-3, perturb="in_place", num_queries=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            opt.step(lambda: model(torch.ones(2, 4)).sum())

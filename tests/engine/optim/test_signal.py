"""A loss an example: the step of their mean, and how much of its slopes is the gradient."""

import math

import pytest
import torch
from torch import nn

import zokernels as zk
from zokernels.estimators import ESTIMATORS

WEIGHTS, GRADIENT, SPREAD = 6, 1.5, 2.0


class Examples(nn.Module):
    """A line: example i has the gradient g + noise of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WEIGHTS))
        self.mean = torch.full((WEIGHTS,), GRADIENT / math.sqrt(WEIGHTS))

    def forward(self, examples):
        return (self.mean + examples) @ self.weight


def batch(step, size):
    made = torch.Generator().manual_seed(step)
    return SPREAD / math.sqrt(WEIGHTS) * torch.randn(size, WEIGHTS, generator=made)


@pytest.mark.parametrize("dist", ["gaussian", "rank1"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_it_says_is_what_the_batches_are_made_of(estimator, dist):
    model, size, found = Examples(), 8, []
    opt = zk.ZOSGD(model, lr=0.0, eps=0.1, num_queries=4, estimator=estimator, dist=dist)
    for step in range(400):
        x = batch(step, size)
        opt.step(lambda x=x: model(x))
        assert opt.signal.examples == size
        found.append((opt.signal.gradient, opt.signal.noise))
    found = torch.tensor(found)
    error = found.std(0) / len(found) ** 0.5
    expected = torch.tensor([GRADIENT**2, SPREAD**2 / size])
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    # The interval is narrow enough to tell the two apart.
    assert (4 * error < 0.4 * expected).all()


def test_the_step_is_that_of_the_mean():
    weights = []
    for mean in (False, True):
        model, x = Examples(), batch(0, 5)
        opt = zk.ZOSGD(model, lr=0.1, eps=0.1)
        loss = opt.step(lambda m=model, x=x, mean=mean: m(x).mean() if mean else m(x))
        weights.append(model.weight.detach().clone())
        assert loss.shape == () and (opt.signal is None) is mean
    assert torch.equal(*weights)


@pytest.mark.parametrize("mode", ["on_entry", "paired", "in_place"])
def test_every_mode_reads_it(mode):
    model = nn.Sequential(nn.Linear(WEIGHTS, 4), nn.Tanh(), nn.Linear(4, 1))
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-3, perturb=mode, num_queries=2)
    x = batch(1, 16)
    opt.step(lambda: model(x)[:, 0])
    assert opt.signal.noise > 0 and opt.signal.examples == 16


def test_blocks_add_up():
    model = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))])
    found = []
    for blocks in (None, [[model[0]], [model[1]]]):
        opt = zk.ZOSGD(model, lr=0.0, eps=0.1, num_queries=64, blocks=blocks, perturb="in_place")
        totals = torch.zeros(2)
        for step in range(30):
            x = batch(step, 8) + 1
            opt.step(lambda x=x: x[:, :3] @ model[0] + x[:, 3:] @ model[1])
            totals += torch.tensor([opt.signal.gradient, opt.signal.noise]) / 30
        found.append(totals)
    # 1,920 directions each: an error of some 3 %.
    torch.testing.assert_close(found[1], found[0], rtol=0.2, atol=0.0)


def test_forward_gradients_take_the_mean_and_have_no_meter():
    model, x = Examples(), batch(0, 5)
    opt = zk.ForwardGrad(model, lr=0.1)
    opt.step(lambda: model(x))
    assert opt.signal is None and model.weight.any()


def test_an_example_that_is_not_finite_makes_a_bad_step():
    model, x = Examples(), batch(0, 5)
    x[2, 1] = math.nan
    opt = zk.ZOSGD(model, lr=0.1)
    opt.step(lambda: model(x))
    assert opt.bad_steps == 1 and opt.signal is None and not model.weight.any()

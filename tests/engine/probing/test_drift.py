"""A rate for a run: the curvature where its own noise carries the weights."""

import math

import pytest
import torch
from torch import nn

import zokernels as zk
from zokernels.probing.drift import Drift
from zokernels.probing.ladder import FACTORS

EPS = 1e-2


def test_the_growth_is_the_laplacian_of_a_quartic():
    """L = Σ (a x² / 2 + b x⁴ / 24) has tr H(θ + sz) = N (a + b s² / 2) in the mean."""
    a, b, n = 3.0, 40.0, 50
    rises = [[n * (a * s**2 / 2 + b * 3 * s**4 / 24) for s in (EPS * f for f in FACTORS)]] * 4
    drift = Drift.of(EPS, rises)
    assert drift.at(0.0) == drift.at(EPS) == 0.0
    for near, far in zip(drift.distances, drift.distances[1:], strict=False):
        # Between two rungs it is that in the middle of their squares.
        middle = n * b * (near**2 + far**2) / 2 / 2
        assert drift.at(far) == pytest.approx(middle - n * b * EPS**2 / 4, rel=1e-9)
        assert drift.at(near) < drift.at(math.sqrt(near * far)) < drift.at(far)
    assert drift.at(1e9) == drift.at(drift.distances[-1])


def test_a_loss_that_has_risen_as_far_as_it_can_curves_no_less():
    rises = [[1 - math.exp(-((EPS * f) ** 2) * 500) for f in FACTORS]]
    growth = Drift.of(EPS, rises).growth
    assert list(growth) == sorted(growth) and growth[0] == 0
    lost = [[math.inf if f > 10 else 0.5 * f * f for f in FACTORS]]
    assert Drift.of(EPS, lost).growth[-1] == math.inf and Drift.of(EPS, lost).at(EPS) == 0


class Factors(nn.Module):
    """An adapter: of its two factors one is zero at the start."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Parameter(torch.randn(4, 30) / 30**0.5)
        self.second = nn.Parameter(torch.zeros(30, 4))

    def forward(self, x, y):
        return (x @ self.second @ self.first - y).square().sum(1).mean()


def batches():
    chance = torch.Generator().manual_seed(1)
    true = torch.randn(30, 30, generator=chance) / 6
    while True:
        x = torch.randn(16, 30, generator=chance)
        yield x, x @ true + 0.1 * torch.randn(16, 30, generator=chance)


def found(steps, **options):
    opt = zk.ZOSGD(Factors(), lr=0.0, eps=EPS, seed=2, **options)
    return zk.probe(opt, lambda batch: opt.model(*batch), batches(), directions=48, steps=steps)


def trained(lr, steps=400):
    model, drawn = Factors(), batches()
    opt = zk.ZOSGD(model, lr=lr, eps=EPS, seed=3)
    losses = []
    for _ in range(steps):
        batch = next(drawn)
        losses.append(float(opt.step(lambda batch=batch: model(*batch))))
    return sum(losses[-40:]) / 40


def test_an_adapter_is_trained_by_the_rate_that_its_probe_advises():
    told = found(400)
    assert told.rate is not None, told.why
    before, after = trained(1e-12), trained(told.rate.value)
    # A third of the rate learns less; what is best for the first step destroys the run.
    assert after < trained(told.rate.value / 3) < before
    try:
        assert trained(told.best_rate.value) > 10 * before
    except FloatingPointError:
        pass


def test_a_longer_run_is_given_a_smaller_rate():
    rates = [found(steps).rate.value for steps in (1, 100, 10_000)]
    assert rates[0] > rates[1] > rates[2] > 0
    with pytest.raises(ValueError, match="steps is 0"):
        found(0)


@pytest.mark.parametrize("normalize", ["std", "ema"])
def test_a_divided_step_is_as_far_by_its_own_rate(normalize):
    population = dict(num_queries=16, estimator="population")
    plain, divided = found(400, **population), found(400, normalize=normalize, **population)
    assert 0 < plain.rate.value < 0.7 * plain.best_rate.value
    ratio = divided.best_rate.value / plain.best_rate.value
    assert divided.rate.value / plain.rate.value == pytest.approx(ratio, rel=1e-6)


class Easy(nn.Module):
    """A steep beginning that is soon over, as learning to answer in the form asked for; and chance.

    Along one weight the loss falls from log 2 towards 0; what the others have is a bowl that they
    are at the bottom of, and a slope that is another one in each batch.
    """

    def __init__(self, base=0.0):
        super().__init__()
        self.steep, self.others = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(500))
        self.base = base

    def forward(self, slope):
        bowl = self.others.square().sum() / 2 + slope @ self.others
        return nn.functional.softplus(-20 * self.steep[0]) + bowl + self.base


def slopes():
    chance = torch.Generator().manual_seed(7)
    while True:
        yield torch.randn(500, generator=chance) / 2


def easy(steps, base=0.0, **options):
    opt = zk.ZOSGD(Easy(base), lr=0.0, eps=1e-3, seed=2, **options)
    return zk.probe(opt, lambda batch: opt.model(batch), slopes(), directions=32, steps=steps)


def expected_after(lr, steps, **options):
    """The loss of all data after a run."""
    model, drawn = Easy(), slopes()
    opt = zk.ZOSGD(model, lr=lr, eps=1e-3, seed=3, **options)
    for _ in range(steps):
        batch = next(drawn)
        opt.step(lambda batch=batch: model(batch))
    with torch.no_grad():
        return float(model(torch.zeros(500)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_queries=8, estimator="population"),
        dict(num_queries=8, estimator="population", normalize="std"),
    ],
    ids=["pairs", "population", "std"],
)
def test_a_steep_beginning_does_not_give_a_rate_whose_noise_costs_more_than_there_is(options):
    steps = 300
    told = easy(steps, **options)
    assert told.rate is not None, told.why
    assert told.rate.value < 0.5 * told.best_rate.value
    before = math.log(2)
    assert expected_after(told.rate.value, steps, **options) < 0.7 * before
    assert expected_after(0.7 * told.best_rate.value, steps, **options) > before


def test_what_the_noise_of_a_run_costs_is_at_most_the_loss_there_is():
    told, steps = easy(1000), 1000
    whole = told.whole
    rate = told.rate.value / 0.7
    cost = steps * rate**2 * whole.mean_square.value * whole.curvature.value / 2
    # The curvature is the same at any distance but for the steep part's share, a hundred of 600.
    assert cost == pytest.approx(told.loss.value, rel=0.25)
    # A loss below 0 has a floor that is not known, and one far above it has much to lose.
    below, above = easy(1000, base=-5.0), easy(1000, base=50.0)
    assert below.rate.value == pytest.approx(0.7 * below.best_rate.value, rel=0.05)
    assert above.rate.value > 2 * told.rate.value

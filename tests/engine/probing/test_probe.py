"""A probe measures what is there, with errors that hold, and changes nothing."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from bowl import Bowl, N, batches
from conftest import same_bits
from torch import nn

import zokernels as zk
from zokernels.estimators import PROBE, derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-2


def probed(model=None, seed=0, rule=zk.ZOSGD, more=None, **options):
    model = model or Bowl()
    opt = rule(model, eps=EPS, perturb=options.pop("perturb", None), **(more or {}))
    return zk.probe(opt, model, batches(seed), seed=seed, **options)


def assert_near(number, truth, errors=3.0):
    # Three standard errors: of independent numbers one in 370 is farther off.
    assert abs(number.value - truth) <= errors * number.error, (number, truth)


@pytest.mark.parametrize("dist", ["gaussian", "rademacher", "rank1"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_number_is_within_its_error(dist, seed):
    found = probed(seed=seed, more=dict(dist=dist), directions=32, steps=10)
    signal, square, bend = Bowl().truth()["all"]
    assert_near(found.whole.squared_gradient, signal)
    assert_near(found.whole.mean_square, square)
    assert_near(found.whole.curvature, bend)
    assert_near(found.best_rate, signal / (square * bend))
    assert_near(found.loss, Bowl().expected())
    assert {n.directions for n in (found.loss, found.whole.curvature, found.best_rate)} == {32}
    assert found.forwards == 16 * 40 + 64
    assert found.largest_rate.value == 2 * found.best_rate.value
    # A bowl curves as much everywhere, and what ten steps add up to is little.
    assert found.rate.value == pytest.approx(0.7 * found.best_rate.value, rel=1e-3)
    assert found.mean_square == found.whole.mean_square
    assert f"{found.rate.value:.2g}" in str(found)


def test_groups_add_up_to_the_whole():
    found = probed(groups=lambda name: name)
    truth = Bowl().truth()
    assert [part.label for part in found.parts] == ["first", "second"]
    assert [part.weights for part in found.parts] == [32, 16]
    for part in found.parts:
        signal, square, bend = truth[part.label]
        assert_near(part.squared_gradient, signal)
        assert_near(part.mean_square, square)
        assert_near(part.curvature, bend)
    for name in ("squared_gradient", "mean_square", "curvature"):
        numbers = [getattr(part, name) for part in found.parts]
        total, whole = sum(n.value for n in numbers), getattr(found.whole, name)
        error = sum(n.error**2 for n in [*numbers, whole]) ** 0.5
        assert abs(total - whole.value) <= 3 * error, name


def test_the_largest_rate_is_where_the_engines_own_steps_begin_to_hurt():
    """Four hundred single steps from the same weights, at multiples of the best rate."""
    model, start = Bowl(), copy.deepcopy(Bowl().state_dict())
    found, before = probed(directions=64), Bowl().expected()
    falls = {}
    for factor in (0.25, 1, 4):
        opt = zk.ZOSGD(model, lr=factor * found.best_rate.value, eps=EPS, seed=8)
        total = 0.0
        for batch in itertools.islice(batches(77), 400):
            model.load_state_dict(start)
            opt.step(lambda batch=batch: model(batch))
            total += before - model.expected()
        falls[factor] = total / 400
    # 2x − x² of the best fall at x times the best rate: 0.44, 1 and −8.
    assert falls[4] < 0 < falls[0.25] < falls[1]
    assert found.fall(1, found.best_rate.value).value == pytest.approx(falls[1], rel=0.5)


def test_a_mask_is_looked_through():
    mask = zk.masks.Bits(
        [torch.full((4,), 255, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)]
    )
    found = probed(more=dict(mask=mask))
    signal, square, bend = Bowl().truth()["first"]
    assert_near(found.whole.squared_gradient, signal)
    assert_near(found.whole.mean_square, square)
    assert_near(found.whole.curvature, bend)


def test_a_reward_is_probed_as_its_negative():
    model = Bowl()
    down = probed(model)
    opt = zk.ZOSGD(model, eps=EPS, maximize=True)
    up = zk.probe(opt, lambda batch: -model(batch), batches())
    assert up.plain() == down.plain()


class Busy(nn.Module):
    """Draws from every generator, counts its forwards, and drops out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2000))

    def forward(self, x):
        self.count += 1
        self.mean.add_(x.mean())
        noise = torch.rand(()) + random.random() + np.random.rand()
        return self.inner(x).square().mean() * (1 + 0.1 * noise)


def state_of(model, opt):
    return copy.deepcopy((model.state_dict(), opt.state_dict()))


def assert_as(before, after):
    (weights, settings), (others, other) = before, after
    assert weights.keys() == others.keys()
    assert all(same_bits(weights[n], others[n]) for n in weights)
    assert str(settings) == str(other)


@pytest.mark.parametrize("perturb", ["on_entry", "paired", "in_place"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(perturb, fails):
    model = Busy()
    opt = zk.ZOSGDMomentum(model, lr=1e-2, eps=1e-3, seed=4, perturb=perturb)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    data = torch.randn(400, 7, 6)
    opt.step(lambda: model(data[0]))
    before = state_of(model, opt)
    slopes, timing = list(opt.projected_gradients), opt.timing
    calls = itertools.count()

    def loss(x):
        if fails and next(calls) == 150:
            raise KeyError("stop")
        return model(x)

    python, other, numbers = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]
    drawn = (torch.randn(7, 6) for _ in itertools.count())
    try:
        zk.probe(opt, loss, drawn, directions=8)
        assert not fails
    except KeyError:
        assert fails
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), other)
    assert (np.random.get_state()[1] == numbers).all()
    assert_as(before, state_of(model, opt))
    assert model.training and model.inner[1].training
    assert opt.projected_gradients == slopes and opt.timing is timing

    # And so the next step is that of one that nobody probed.
    opt.step(lambda: model(data[1]))
    twin = Busy()
    fresh = zk.ZOSGDMomentum(twin, lr=1e-2, eps=1e-3, seed=4, perturb=perturb)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.randn(400, 7, 6)
    for step in range(2):
        fresh.step(lambda step=step: twin(data[step]))
    assert_as(state_of(model, opt), state_of(twin, fresh))


def test_batches_that_are_drawn_go_on_between_the_rounds():
    model, seen = Bowl(), []

    def drawn():
        while True:
            seen.append(torch.rand(()).item())
            yield torch.randn(N)

    zk.probe(zk.ZOSGD(model, eps=EPS), model, drawn(), directions=8)
    assert len(seen) == len(set(seen)) == 32


def test_all_forwards_of_a_batch_draw_alike():
    model = Bowl()

    def noisy(batch):
        return model(batch) + 100 * torch.rand(())

    opt = zk.ZOSGD(model, eps=EPS)
    plain, found = (zk.probe(opt, f, batches()) for f in (model, noisy))
    # The losses are some 100 in binary32, whose last place is 7.6e-6, over 2ε and ε².
    near = found.whole.squared_gradient.value
    assert near == pytest.approx(plain.whole.squared_gradient.value, rel=1e-2)
    assert found.whole.curvature.value == pytest.approx(plain.whole.curvature.value, rel=1e-1)


def test_its_directions_are_no_steps():
    seeds = {derive_seed(0, number, k, PROBE) for number in range(50) for k in range(2)}
    steps = {derive_seed(0, t, k, p) for t in range(50) for k in range(2) for p in range(3)}
    assert len(seeds) == 100 and not seeds & steps


@pytest.mark.parametrize("perturb", ["paired", "in_place"])
def test_every_way_of_perturbing_measures_the_same(perturb):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    data = torch.randn(64, 8, 6)

    def loss(x):
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    found = {
        mode: zk.probe(zk.ZOSGD(model, eps=EPS, perturb=mode), loss, data, directions=8)
        for mode in ("on_entry", perturb)
    }
    one, other = found.values()
    assert one.forwards == other.forwards
    for name in ("squared_gradient", "mean_square", "curvature"):
        # Sums of a doubled batch are taken in another order: 1e-6 of a loss of 5, over ε².
        values = [getattr(p.whole, name).value for p in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_progress_counts_up_to_what_was_said():
    told = []
    found = probed(directions=8, groups=lambda n: n, progress=lambda *what: told.append(what))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (found.forwards, found.forwards)
    assert {total for _, total in told} == {found.forwards}


@pytest.mark.parametrize(("forwards", "groups"), [(224, None), (800, None), (1000, lambda n: n)])
def test_a_budget_is_kept_and_used(forwards, groups):
    found = probed(forwards=forwards, groups=groups)
    assert forwards - 40 < found.forwards <= forwards

"""What a direction is compared with, and the scale of a step: against their formulas and theory."""

import math
import statistics
import warnings

import pytest
import torch
from torch import nn

import zokernels as zk
from zokernels.estimators import BETA, ESTIMATORS, derive_seed

SLOPES = torch.tensor([0.7, -1.1, 0.4, 0.2, -0.3, 0.9, 0.05, -0.6], dtype=torch.float64)
MODES = ["on_entry", "paired", "in_place"]


class Line(nn.Module):
    """A loss whose gradient is the same everywhere."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8, dtype=dtype))

    def forward(self):
        return (self.weight * SLOPES.to(self.weight.dtype)).sum()


def along(opt, step=0, dist="gaussian"):
    """The slopes of `Line` along a step's directions, from 0, and the directions."""
    q = opt.param_groups[0]["num_queries"]
    seeds = [derive_seed(opt.param_groups[0]["seed"], step, k) for k in range(q)]
    z = torch.stack([getattr(zk.noise, dist)(8, seed=s).double() for s in seeds])
    return z @ SLOPES, z


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_is_its_formula(estimator):
    model = Line()
    start = model.weight.detach().clone()
    opt = zk.ZOSGD(model, lr=0.1, eps=0.5, num_queries=4, estimator=estimator)
    slopes, z = along(opt)
    base = float(model().detach())
    loss = opt.step(model)
    d = slopes if estimator != "population" else (slopes - slopes.mean()) * 4 / 3
    assert opt.projected_gradients == pytest.approx(d.tolist(), rel=1e-9)
    torch.testing.assert_close(model.weight.detach(), start - 0.1 * d @ z / 4, rtol=0, atol=1e-7)
    mean = base + 0.5 * float(slopes.mean()) if estimator == "population" else base
    assert float(loss) == pytest.approx(mean, rel=1e-9)


def squares_of_errors(estimator, q, runs, dist):
    """ĝ − g of many estimates with their own directions on `Line`, and ‖ĝ − g‖²."""
    found = []
    model = Line(torch.float32)
    opt = zk.ZOSGD(model, lr=1.0, eps=0.25, num_queries=q, estimator=estimator, dist=dist)
    for _ in range(runs):
        with torch.no_grad():
            model.weight.zero_()
        opt.step(model)
        found.append(-model.weight.detach() - SLOPES)
    errors = torch.stack(found)
    return errors, errors.square().sum(1)


# Of ĝ on a linear loss with N weights and normal directions. A pair: (N + 1)‖g‖² / q. A member of a
# population: its baseline is the mean of q − 1 others, of variance ‖g‖² / (q − 1), which stands
# before a z of length² N: N‖g‖² / (q (q − 1)) more.
def theory(estimator, q, dist):
    n, square = len(SLOPES), float(SLOPES.square().sum())
    own = n + 1 if dist == "gaussian" else n - 1
    baseline = n / (q - 1) if estimator == "population" else 0.0
    return (own + baseline) * square / q


@pytest.mark.parametrize(
    ("count", "dist"),
    [(2, "gaussian"), (8, "gaussian"), (8, "rademacher"), (16, "gaussian"), (32, "gaussian")],
)
def test_the_variance_at_equal_forwards_is_theorys(count, dist):
    runs, found = 300, {}
    for estimator, q in (("population", count), ("two_sided", count // 2)):
        errors, squares = squares_of_errors(estimator, q, runs, dist)
        error = float(squares.std()) / math.sqrt(runs)
        found[estimator] = float(squares.mean())
        assert abs(found[estimator] - theory(estimator, q, dist)) < 4 * error, estimator
        # No bias: each element within its own interval.
        bias, spread = errors.mean(0), errors.std(0) / math.sqrt(runs)
        assert (bias.abs() < 4.5 * spread).all(), estimator
    if count == 32:
        # Half the variance of pairs: theory says 0.51 at these sizes, within 4 % of error.
        assert 0.42 < found["population"] / found["two_sided"] < 0.62


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_std_divides_by_the_deviation_of_the_step(estimator, mode):
    found = []
    for factor, eps in ((1.0, 0.5), (1000.0, 0.125)):
        model = Line()
        start = model.weight.detach().clone()
        opt = zk.ZOSGD(
            model, lr=0.01, eps=eps, num_queries=5, estimator=estimator, normalize="std",
            perturb=mode,
        )  # fmt: skip
        opt.step(lambda m=model, f=factor: m() * f)
        found.append(model.weight.detach() - start)
    slopes, z = along(opt)
    d = slopes - slopes.mean() if estimator == "population" else slopes
    expected = -0.01 * (d / slopes.std()) @ z / 5
    # ε and the loss's scale cancel; the sums of a difference lose some of the last bits.
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], expected, rtol=1e-6, atol=1e-9)


def test_ema_divides_by_the_running_root_and_clip_cuts_at_it():
    model = Line()
    options = dict(lr=0.01, eps=0.5, num_queries=2, seed=3)
    opt = zk.ZOSGD(model, normalize="ema", clip=1.2, **options)
    total = weight = 0.0
    for step in range(6):
        factor = 10.0 if step == 4 else 1.0
        start = model.weight.detach().clone()
        opt.step(lambda f=factor: model() * f)
        d, z = along(opt, step)
        d = d * factor
        total, weight = BETA * total + (1 - BETA) * float(d.square().mean()), BETA * weight + 0.1
        root = math.sqrt(total / weight)
        scaled = d.clamp(-1.2 * root, 1.2 * root) / root
        expected = start - 0.01 * scaled @ z / 2
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=1e-9)
        assert opt.projected_gradients == pytest.approx(d.tolist(), rel=1e-6)
    # Plain numbers, as a weights_only load takes them.
    assert opt.param_groups[0]["moments"][0] == pytest.approx([total, weight], rel=1e-6)


@pytest.mark.parametrize("rule", [zk.ZOSGD, zk.ZOSGDSign, zk.ZOSGDMomentum, zk.ZOAdam])
def test_the_final_numbers_enter_every_rule(rule):
    """A step with `clip` is one whose slopes were cut, in the rule's own arithmetic."""
    moved = []
    for clip in (None, 0.5):
        model = Line()
        opt = rule(model, lr=0.01, eps=0.5, clip=clip, maximize=True)
        # One direction: |d| is its own root, and half of it is left.
        opt.step(lambda m=model, f=1.0 if clip else 0.5: m() * f)
        moved.append(model.weight.detach().clone())
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-12)


def test_groups_have_their_own_eps_and_root():
    model = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))])
    groups = [dict(params=[model[0]], eps=0.5), dict(params=[model[1]], eps=0.25)]
    opt = zk.ZOSGD(groups, lr=0.1, normalize="ema", model=model, perturb="in_place")
    opt.step(lambda: (model[0] * 2).sum() + model[1].sum())
    first, second = (g["moments"][0] for g in opt.param_groups)
    # The same difference over half of the ε.
    assert second[0] == pytest.approx(4 * first[0]) and second[1] == first[1]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_every_block_has_a_root_of_its_own(order):
    model = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))])
    blocks = [[model[0]], [model[1]]]
    opt = zk.ZOSGD(
        model, lr=0.1, eps=0.5, normalize="ema", blocks=blocks, block_order=order,
        perturb="in_place",
    )  # fmt: skip
    opt.step(lambda: (model[0] * 100).sum() + model[1].sum())
    moments = opt.param_groups[0]["moments"]
    assert len(moments) == 2
    # Divided by itself, every block's slope is 1 or −1.
    assert [(p.detach() - 1).abs().max() < 0.5 for p in model] == [True, True]
    assert max(t for t, _ in moments.values()) > 100 * min(t for t, _ in moments.values())


def reward(values):
    """A loss that takes the next of some values, whatever the weights are."""
    left = iter(values)
    return lambda: torch.tensor(next(left))


@pytest.mark.parametrize(
    ("options", "losses", "means"),
    [
        (dict(estimator="population", normalize="std", num_queries=3), [1.0] * 3, "deviation"),
        # All slopes alike and none of them 0.
        (dict(normalize="std", num_queries=2), [1.0, 0.5, 1.0, 0.5], "deviation"),
        (dict(normalize="ema"), [1.0, 1.0], "running mean"),
    ],
    ids=["members alike", "slopes alike", "nothing yet"],
)
def test_a_deviation_of_zero_makes_no_step_and_is_said_once(options, losses, means):
    model = Line(torch.float32)
    start = model.weight.detach().clone()
    opt = zk.ZOAdam(model, lr=0.1, weight_decay=0.5, perturb="in_place", **options)
    with pytest.warns(UserWarning, match=means):
        opt.step(reward(losses))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(reward(losses))
    assert torch.equal(model.weight, start)
    assert opt.flat_steps == 2 and opt.bad_steps == 0 and opt.param_groups[0]["step"] == 2
    assert not any(t.any() for s in opt.state.values() for t in s.values())


# Of 1.0 every sum and quotient is exact, and so a test with it saw no fault; these are not.
ALIKE = [(0.1, 8), (0.3, 3), (0.7, 32), (1 / 3, 7), (0.4328188896179199, 8)]


@pytest.mark.parametrize("normalize", ["std", "ema"])
@pytest.mark.parametrize("rule", [zk.ZOSGD, zk.ZOSGDSign, zk.ZOAdam])
@pytest.mark.parametrize(("value", "count"), ALIKE)
def test_members_with_the_same_reward_make_no_step_whatever_it_is(rule, value, count, normalize):
    model = Line(torch.float32)
    start = model.weight.detach().clone()
    options = dict(lr=1e-3, perturb="in_place", normalize=normalize, num_queries=count)
    opt = rule(model, eps=1e-2, estimator="population", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.ask()
        opt.tell([value] * count)
        assert torch.equal(model.weight, start) and opt.flat_steps == 1
        # They agree with each other and not with the base.
        opt = rule(model, eps=3e-3, estimator="one_sided", **options | dict(normalize="std"))
        opt.ask()
        opt.tell([0.9859191179275513, *[value] * count])
    assert torch.equal(model.weight, start) and opt.flat_steps == 1


def test_a_flat_step_is_recorded_and_gone_on_from(tmp_path):
    model = Line(torch.float32)
    opt = zk.ZOSGD(
        model, lr=0.1, num_queries=2, estimator="population", normalize="std", perturb="in_place"
    )
    opt.record(tmp_path / "log")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for losses in ([1.0, 2.0], [1.0, 1.0], [3.0, 1.0], [1.0, 1.0]):
            opt.step(reward(losses))
    opt.trajectory.close()
    twin = Line(torch.float32)
    other = zk.ZOSGD(
        twin, lr=0.1, num_queries=2, estimator="population", normalize="std", perturb="in_place"
    )
    other.resume(tmp_path / "log")
    assert torch.equal(model.weight, twin.weight)
    assert other.param_groups[0]["step"] == 4 and other.bad_steps == 0


@pytest.mark.parametrize("bad", range(4))
def test_one_member_that_is_not_finite_stops_the_step(bad):
    model = Line(torch.float32)
    start = model.weight.detach().clone()
    options = dict(lr=0.1, num_queries=4, perturb="in_place", weight_decay=0.1)
    opt = zk.ZOSGD(model, estimator="population", normalize="ema", **options)
    losses = [1.0, 2.0, 3.0, 4.0]
    opt.step(reward(losses))
    moved, moments = model.weight.detach().clone(), opt.param_groups[0]["moments"]
    assert not torch.equal(moved, start)
    losses[bad] = math.nan
    opt.step(reward(losses))
    assert opt.bad_steps == 1 and opt.flat_steps == 0 and torch.equal(model.weight, moved)
    assert all(map(math.isnan, opt.projected_gradients))
    # What was not a step is not in the running root.
    assert opt.param_groups[0]["moments"] == moments


def test_a_run_is_gone_on_with_from_its_log_and_from_its_state(tmp_path):
    options = dict(lr=0.05, eps=0.1, num_queries=2, normalize="ema", clip=0.9, seed=8)
    straight = Line(torch.float32)
    opt = zk.ZOAdam(straight, **options)
    opt.record(tmp_path / "log")
    for step in range(7):
        opt.step(lambda: straight().square() / 2)
        if step == 3:
            saved = {"opt": opt.state_dict(), "model": straight.state_dict()}
            torch.save(saved, tmp_path / "state.pt")
    opt.trajectory.close()
    by_log, by_state = Line(torch.float32), Line(torch.float32)
    resumed = zk.ZOAdam(by_log, **options)
    resumed.resume(tmp_path / "log", until=4)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    by_state.load_state_dict(loaded["model"])
    other = zk.ZOAdam(by_state, **options)
    other.load_state_dict(loaded["opt"])
    for model, one in ((by_log, resumed), (by_state, other)):
        for _ in range(3):
            one.step(lambda m=model: m().square() / 2)
        assert torch.equal(model.weight, straight.weight)
        assert one.param_groups[0]["moments"] == opt.param_groups[0]["moments"]


def test_a_state_of_before_says_one_side_by_its_old_name():
    model = Line()
    opt = zk.ZOSGD(model, estimator="one_sided")
    saved = opt.state_dict()
    group = saved["param_groups"][0]
    for name in ("estimator", "normalize", "clip", "moments"):
        del group[name]
    group["two_sided"] = False
    other = zk.ZOSGD(model)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["estimator"] == "one_sided" and "two_sided" not in group
    assert (group["normalize"], group["clip"], group["moments"]) == (None, None, {})
    other.step(model)


BAD = [
    (dict(estimator="both"), "estimator is 'both', but it must be one of two_sided, one_sided, po"),
    (dict(estimator="population"), "estimator is 'population', which compares .* num_queries is 1"),
    (dict(normalize="std"), "normalize is 'std', which compares"),
    (dict(normalize="max"), "normalize is 'max', but it must be None, 'std' or 'ema'"),
    (dict(clip=0.0), "clip is 0.0, but it must be None or a finite number above 0"),
    (dict(clip=math.nan), "clip is nan"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=str)
def test_what_no_estimate_can_be_made_of_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        zk.ZOSGD(Line(), **options)


def test_forward_gradients_are_scaled_as_differences_are():
    model = Line()
    start = model.weight.detach().clone()
    opt = zk.ForwardGrad(model, lr=0.1, num_queries=4, normalize="std")
    opt.step(model)
    slopes, z = along(opt)
    expected = start - 0.1 * (slopes / slopes.std()) @ z / 4
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=1e-9)
    assert opt.projected_gradients == pytest.approx(slopes.tolist(), rel=1e-6)


def test_the_conservative_rule_judges_the_step_that_it_takes():
    model = Line()
    start = model.weight.detach().clone()
    opt = zk.ZOSGDConservative(
        model, lr=0.1, num_queries=4, estimator="population", normalize="std", perturb="in_place"
    )
    opt.step(model)
    slopes, z = along(opt)
    step = -0.1 * ((slopes - slopes.mean()) / slopes.std()) @ z / 4
    # On a line one of the two ways goes down.
    assert opt.side == (1 if float(step @ SLOPES) < 0 else -1)
    torch.testing.assert_close(model.weight.detach(), start + opt.side * step, rtol=1e-6, atol=1e-9)


def test_the_mean_is_the_same_on_every_python():
    # `sum` compensates from Python 3.12 on, and would have other last bits than before.
    numbers = [0.1] * 10 + [1e16, 1.0, -1e16]
    expected = 0.0
    for x in numbers:
        expected += x
    assert zk.estimators.mean(numbers) == expected / len(numbers)
    assert statistics.fmean(numbers) != expected / len(numbers)

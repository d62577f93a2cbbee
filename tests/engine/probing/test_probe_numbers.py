"""Errors that hold, rates that are best, and refusals that say what to do."""

import math

import pytest
import torch
from bowl import Bowl, batches
from torch import nn

import zokernels as zk
from zokernels.probing import ladder, numbers
from zokernels.probing.advice import Rule

pytestmark = pytest.mark.usefixtures("one_thread")


def simulated(rounds, generator, gradient, hessian, sigma, eps=1e-2):
    """Rounds along normal directions of a quadratic, in binary64."""
    n, found = len(gradient), []
    for _ in range(rounds):
        z = torch.randn(2, n, generator=generator, dtype=torch.float64)
        g = gradient + sigma * torch.randn(8, n, generator=generator, dtype=torch.float64)
        slope, bend = z @ g.T, ((z @ hessian) * z).sum(1, keepdim=True)
        plus, minus = (s * eps * slope + eps**2 / 2 * bend for s in (1, -1))
        found.append(numbers.moments(plus.tolist(), minus.tolist(), [0.0] * 8, eps))
    return found


@pytest.mark.parametrize("rounds", [4, 16])
def test_the_intervals_hold_as_often_as_they_say(rounds):
    generator = torch.Generator().manual_seed(5)
    n, sigma = 30, 1.0
    gradient = torch.full((n,), 0.3, dtype=torch.float64)
    hessian = torch.diag(torch.linspace(0.1, 2, n, dtype=torch.float64))
    signal, bend = float(gradient @ gradient), float(hessian.trace())
    square = signal + sigma**2 * n
    truth = {
        "signal": (lambda m: m.squared_gradient, signal),
        "square": (lambda m: m.two_sided, square),
        "bend": (lambda m: m.curvature, bend),
        "rate": (
            lambda m: m.squared_gradient / (m.two_sided * m.curvature),
            signal / (square * bend),
        ),
    }
    held = dict.fromkeys(truth, 0)
    for _ in range(200):
        found = simulated(rounds, generator, gradient, hessian, sigma)
        for name, (of, true) in truth.items():
            low, high = numbers.number(found, of).interval
            held[name] += low <= true <= high
    # 95% of 200 is 190 ± 3; products of normals are skewed, which costs some.
    assert all(172 <= count <= 199 for count in held.values()), held


def test_a_signal_that_is_not_there_seldom_stands_out():
    generator = torch.Generator().manual_seed(6)
    nothing = torch.zeros(30, dtype=torch.float64)
    flat = torch.eye(30, dtype=torch.float64)
    found = [simulated(8, generator, nothing, flat, 1.0) for _ in range(300)]
    loud = sum(numbers.number(r, lambda m: m.squared_gradient).stands_out for r in found)
    # One in twenty is 15 ± 4.
    assert 3 <= loud <= 27


def test_of_a_mean_the_jackknife_is_the_standard_error():
    rounds = [numbers.Moments(x, 0, 0, 0, 0, 0) for x in (1.0, 2.0, 4.0, 9.0)]
    found = numbers.number(rounds, lambda m: m.loss)
    assert found.value == 4.0
    assert found.error == pytest.approx(torch.tensor([1.0, 2.0, 4.0, 9.0]).std().item() / 2)


@pytest.mark.parametrize(("freedom", "t"), [(3, 3.182), (7, 2.365), (15, 2.131), (99, 1.984)])
def test_quantiles_are_students(freedom, t):
    assert numbers.quantile(freedom) == pytest.approx(t, rel=0.04)


CASES = [
    ("ZOSGD", 1, "two_sided", None), ("ZOSGD", 8, "two_sided", None),
    ("ZOSGD", 8, "one_sided", None), ("ZOSGD", 8, "population", None),
    ("ZOSGD", 8, "two_sided", "std"), ("ZOSGD", 8, "one_sided", "std"),
    ("ZOSGD", 8, "population", "std"), ("ZOSGD", 1, "two_sided", "ema"),
    ("ZOSGD", 8, "population", "ema"), ("ZOSGDSign", 1, "two_sided", None),
]  # fmt: skip


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_the_best_rate_is_that_of_simulated_steps(case, dist):
    """Steps by the rule's formula on a quadratic whose curvature is spread over 400 weights."""
    name, q, estimator, normalize = case
    generator = torch.Generator().manual_seed(7)
    n, count, eps, sigma = 400, 4000, 1e-2, 1.0
    rule = Rule(name, q, estimator, normalize, 0.0, dist, False)
    gradient = 0.5 * torch.ones(n)
    bends = torch.linspace(0.5, 1.5, n)
    z = torch.randn(count, q, n, generator=generator)
    z = z.sign() if dist == "rademacher" else z
    g = gradient + sigma * torch.randn(count, 1, n, generator=generator)
    slope, bend = (z * g).sum(-1), (z * z * bends).sum(-1)
    plus, minus = (s * eps * slope + eps**2 / 2 * bend for s in (1, -1))
    if estimator == "two_sided":
        d = (plus - minus) / (2 * eps)
    elif estimator == "one_sided":
        d = plus / eps
    else:
        d = (plus - plus.mean(1, keepdim=True)) * q / (q - 1) / eps
    # A mean over all steps stands in for the running one.
    root = {"std": lambda: d.std(1, keepdim=True), "ema": lambda: d.square().mean().sqrt()}
    d = d / root[normalize]() if normalize else d
    step = (d[..., None] * z).mean(1)
    step = step.sign() if name == "ZOSGDSign" else step
    gain, cost = float((step @ gradient).mean()), float((step.square() * bends).sum(1).mean())
    signal, total = float(gradient @ gradient), float(bends.sum())
    square = signal + sigma**2 * n
    # What rounds measure, from the same formulas.
    truth = numbers.Moments(
        0.0,
        signal,
        total,
        square,
        square + (eps * total) ** 2 / 4,
        float(plus.var(0).mean()) / eps**2,
    )
    # Left out are 2gᵀHg beside ‖g‖²h, deviations of eight differences, which are 1/14 too short in
    # the mean, and gᵀHg beside E[d²]h/q; gain is known to 3%.
    assert rule.best(truth) == pytest.approx(gain / cost, rel=0.12)
    assert rule.fall(truth, gain / cost) == pytest.approx(gain**2 / (2 * cost), rel=0.2)


def test_momentum_takes_what_its_sum_leaves():
    truth = numbers.Moments(1.0, 2.0, 3.0, 4.0, 4.0, 4.0)
    plain = Rule("ZOSGD", 1, "two_sided", None, 0.0, "gaussian", False)
    heavy = Rule("ZOSGDMomentum", 1, "two_sided", None, 0.9, "gaussian", False)
    assert heavy.best(truth) == pytest.approx(0.1 * plain.best(truth))
    assert heavy.fall(truth, 0.01) == pytest.approx(plain.fall(truth, 0.1))


def test_a_rule_is_read_from_an_optimizer():
    opt = zk.ZOSGDMomentum(Bowl(), beta=0.8, num_queries=3, estimator="one_sided", dist="rank1")
    assert Rule.of(opt) == Rule("ZOSGDMomentum", 3, "one_sided", None, 0.8, "rank1", False)
    opt.param_groups[0].update(estimator="population", normalize="std")
    assert Rule.of(opt) == Rule("ZOSGDMomentum", 3, "population", "std", 0.8, "rank1", False)


def probe(model, loss=None, rule=zk.ZOSGD, eps=1e-2, data=None, directions=32, **options):
    opt = rule(model, eps=eps, **options)
    return zk.probe(opt, loss or model, data or batches(), directions=directions)


def test_noise_alone_is_refused_with_what_would_tell():
    found = probe(Bowl(centre=1.0))
    assert found.rate is None and "‖g‖² = " in found.why and "does not stand out" in found.why
    assert str(found) == f"No rate is advised: {found.why}"
    assert found.largest_rate is not None
    with pytest.raises(ValueError, match="No rate was advised"):
        found.fall()
    # A signal a little below its error: so many times more forwards as errors' roots say.
    whole = probe(Bowl(centre=0.8))
    reach, value = whole.whole.squared_gradient.reach, whole.whole.squared_gradient.value
    assert 0 < value < reach
    expected = ((reach / value) ** 2 - 1) * whole.forwards
    assert whole.more_forwards == pytest.approx(expected, abs=50)
    assert f"some {whole.more_forwards:,} more forwards" in whole.why


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("ZOAdam's step does not follow", dict(rule=zk.ZOAdam)),
        ("ZOSGDConservative's step", dict(rule=zk.ZOSGDConservative)),
        ("sign of a sum over several", dict(rule=zk.ZOSGDSign, num_queries=2)),
        ("with blocks each block", dict(blocks="module")),
        ("no loss changed", dict(loss=lambda batch: batch.sum() * 0 + 1.0, perturb="in_place")),
        ("is not in the range", dict(eps=3e-7)),
    ],
)
def test_what_no_forward_could_tell_is_refused(words, options):
    found = probe(Bowl(), **options)
    assert found.rate is None and found.more_forwards is None
    assert words in found.why
    if options.get("rule") or options.get("blocks"):
        assert "ZOSGD, ZOSGDMomentum, and ZOSGDSign with one query" in found.why


def test_a_hill_bounds_no_rate():
    model = Bowl()
    found = probe(model, loss=lambda batch: -model(batch))
    assert "negative" in found.why and found.largest_rate is None


BAD = [
    (dict(directions=7), "directions is 7"),
    (dict(directions=6), "at least 8"),
    (dict(forwards=100), "forwards is 100.*224"),
    (dict(groups="colour"), "groups is 'colour'"),
    (dict(groups="layer"), "has none"),
    (dict(batches=[torch.zeros(48)] * 31), "batches ended after 31"),
    (dict(loss_fn=lambda batch: torch.tensor(math.nan)), "not finite at eps 0.01"),
    (dict(loss_fn=lambda batch: None), "returned None"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[b[1] for b in BAD])
def test_bad_input_is_a_sentence(options, words):
    model = Bowl()
    opt = zk.ZOSGD(model, eps=1e-2, perturb="in_place")
    given = dict(loss_fn=model, batches=batches(), directions=8) | options
    with pytest.raises((ValueError, FloatingPointError), match=words):
        zk.probe(opt, **given)


def test_optimizers_that_have_no_differences_are_refused():
    model = Bowl()
    with pytest.raises(ValueError, match="ForwardGrad takes derivatives"):
        zk.probe(zk.ForwardGrad(model), model, batches())
    with pytest.raises(ValueError, match="opt is a SGD"):
        zk.probe(torch.optim.SGD(model.parameters()), model, batches())
    groups = [dict(params=[model.first], eps=1e-2), dict(params=[model.second], eps=1e-3)]
    with pytest.raises(ValueError, match="have eps 0.01, 0.001"):
        zk.probe(zk.ZOSGD(groups, model=model), model, batches())
    with pytest.raises(ValueError, match="needs the module"):
        zk.probe(zk.ZOSGD([model.first], perturb="in_place"), model, batches(), groups="group")


def test_a_probe_inside_of_a_step_is_refused():
    model = Bowl()
    opt = zk.ZOSGD(model, eps=1e-2)
    with pytest.raises(RuntimeError, match="between two steps"):
        opt.step(lambda: zk.probe(opt, model, batches()))


class Net(nn.Module):
    """A network of large weights, so that ε of 16 bits is lost in them."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(2)
        self.inner = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
        self.dtype = dtype

    def forward(self, x):
        return self.inner(x.to(self.dtype)).float().square().mean()


def test_the_range_of_eps_is_narrower_in_16_bits():
    torch.manual_seed(0)
    data = list(torch.randn(64, 16, 24))
    wide, narrow = (
        probe(Net(dtype), data=data, directions=8) for dtype in (torch.float32, torch.bfloat16)
    )
    assert len(wide.ladder) == 9 and wide.ladder[4].eps == pytest.approx(1e-2)
    assert wide.eps_range[0] < narrow.eps_range[0] <= narrow.eps_range[1] <= wide.eps_range[1]
    # Rounding errs by 1/ε.
    assert narrow.ladder[0].deviation > 10 * wide.ladder[0].deviation


def test_a_ladder_finds_the_rungs_between_rounding_and_bending():
    eps = 1e-3
    scales = [eps * f for f in ladder.FACTORS]
    # Slopes 1 and −2 with rounding of 1e-5/ε and a third derivative of 50.
    slopes = [[s + 1e-5 / e + 50 * e**2 for e in scales] for s in (1.0, -2.0)]
    rungs, (low, high) = ladder.judge(eps, slopes)
    assert (low, high) == pytest.approx(
        (1e-4 / math.sqrt(10) * math.sqrt(10), 1e-1 / math.sqrt(10))
    )
    assert [r.deviation <= ladder.TOLERANCE for r in rungs].count(True) == 6
    noise = [[(-1) ** i for i, _ in enumerate(scales)], [math.nan] * 9]
    rungs, none = ladder.judge(eps, noise)
    assert none is None and all(r.deviation == math.inf for r in rungs)

"""The optimizers against the textbook, their states, and that estimates and roundings are fair."""

import math

import pytest
import torch
from conftest import bits
from test_optim import Small, batch, state, unchanged
from textbook import FORWARDS, Conservative, Textbook, adam, momentum, sgd, sign
from torch import nn

import zokernels as zk
from zokernels.estimators import ESTIMATORS


class Odd(nn.Module):
    """Tied, frozen, one-element and empty parameters."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.to(dtype)
        generator = torch.Generator().manual_seed(4)
        self.x, self.y = torch.randint(7, (2, 12), generator=generator)

    def forward(self):
        h = self.frozen(self.hidden(self.embed(self.x)).tanh())
        logits = self.head(h * self.scale)
        # A loss in bfloat16 would be the same on both sides of most perturbations.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(wide, self.y) + self.empty.sum()


BETAS = dict(betas=(0.8, 0.95), adam_eps=1e-6)
RULES = {
    "sgd": (zk.ZOSGD, sgd, {}),
    "sign": (zk.ZOSGDSign, sign, {}),
    "momentum": (zk.ZOSGDMomentum, momentum, dict(beta=0.8)),
    "amsgrad": (zk.ZOAdam, adam, BETAS),
    "adam": (zk.ZOAdam, adam, dict(**BETAS, amsgrad=False, bias_correction=True)),
    "conservative": (zk.ZOSGDConservative, sgd, {}),
}
ALL = [*RULES]


@pytest.mark.parametrize(
    "estimator, dtype",
    [*((kind, torch.float32) for kind in ESTIMATORS), ("two_sided", torch.float64)],
    ids=[*ESTIMATORS, "float64"],
)
@pytest.mark.parametrize("name", ALL)
def test_fifty_steps_equal_the_textbook_to_the_last_bit(name, estimator, dtype):
    make, rule, own = RULES[name]
    kind = Conservative if name == "conservative" else Textbook
    h = dict(lr=0.013, eps=3e-3, weight_decay=0.07, **own)
    common = dict(seed=2**63 + 11, estimator=estimator, dist="rademacher", maximize=False)
    model, twin = Odd(dtype), Odd(dtype)
    named = list(enumerate(twin.parameters()))
    opt = make(
        model, num_queries=2, rounding="stochastic", mask=zk.masks.Random(0.8, 6), **h, **common
    )
    params = [(i, p, h) for i, p in named if p.requires_grad]
    book = kind(rule, params, twin, q=2, masks=lambda t: ([0.8] * len(params), 6), **common)
    check(opt, model, book, twin, 50)


@pytest.mark.parametrize("name", ALL)
def test_groups_with_numbers_of_their_own_equal_the_textbook_too(name):
    make, rule, own = RULES[name]
    kind = Conservative if name == "conservative" else Textbook
    first = dict(lr=0.011, eps=2e-3, weight_decay=0.0, **own)
    second = dict(lr=0.004, eps=7e-3, weight_decay=0.3, **own)
    if name in ("amsgrad", "adam"):
        second |= dict(betas=(0.7, 0.9), adam_eps=1e-4)
    if name == "momentum":
        second |= dict(beta=0.5)
    common = dict(seed=5, estimator="two_sided", dist="gaussian", maximize=True)
    model, twin = Odd(torch.float32), Odd(torch.float32)
    # Streams follow the order of the groups, the frozen ones counted.
    split = [list(m.parameters()) for m in (model, twin)]
    opt = make(
        [{"params": split[0][3:], **first}, {"params": split[0][:3], **second}],
        num_queries=3, **common,
    )  # fmt: skip
    placed = [(p, first) for p in split[1][3:]] + [(p, second) for p in split[1][:3]]
    params = [(i, p, h) for i, (p, h) in enumerate(placed) if p.requires_grad]
    check(opt, model, kind(rule, params, twin, q=3, **common), twin, 20)


def check(opt, model, book, twin, steps):
    start = [p.detach().clone() for p in model.parameters()]
    for t in range(steps):
        opt.step(model)
        book.step(t)
        for (n, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(bits(a), bits(b)), f"{n} differs after step {t + 1}"
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True)]
    assert moved == [p.requires_grad and p.numel() > 0 for p in model.parameters()]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("estimator, queries, calls", FORWARDS, ids=str)
def test_forwards_a_step(name, estimator, queries, calls):
    model, seen = Odd(torch.float32), []
    opt = RULES[name][0](model, num_queries=queries, estimator=estimator)
    opt.step(lambda: seen.append(1) or model())
    assert len(seen) == calls + (name == "conservative") * (2 + (estimator != "one_sided"))


@pytest.mark.parametrize("name", ALL)
def test_all_queries_update_in_one_pass(name, monkeypatch):
    written = []

    def counted(op):
        return lambda params, *args, **kw: (written.append(params), op(params, *args, **kw))

    for op in ("add_noise_", "apply_update_"):
        monkeypatch.setattr(zk.ops, op, counted(getattr(zk.ops, op)))
    model = Odd(torch.float32)
    opt = RULES[name][0](model, lr=1e-3, num_queries=5)
    for _ in range(3):
        opt.step(model)
    trainable = sum(p.requires_grad for p in model.parameters())
    # The conservative rule may also keep θ.
    assert len(written) == 3 if name != "conservative" else 0 < len(written) <= 3
    assert all(len(params) == trainable for params in written)


@pytest.mark.parametrize("mode", ["on_entry", "in_place"])
def test_what_is_written_is_the_candidate_that_was_judged(mode):
    model, (x, y) = Small(torch.bfloat16).eval(), batch()
    opt = zk.ZOSGDConservative(
        model, lr=0.1, eps=0.5, weight_decay=0.1, num_queries=2, rounding="stochastic", perturb=mode
    )
    sides = set()
    for _ in range(25):
        losses = []
        opt.step(lambda losses=losses: losses.append(model(x, y)) or losses[-1])
        # Four of the estimate, then θ, θ − η ĝ and θ + η ĝ.
        base, down, up = (loss.item() for loss in losses[4:])
        assert opt.side == {base: 0, down: 1, up: -1}[min(base, down, up)]
        assert model(x, y).item() == min(base, down, up)
        sides.add(opt.side)
    assert sides == {0, 1, -1}


def test_where_no_move_helps_nothing_is_written():
    model = Odd(torch.float32)
    before = state(model)
    # Once the estimate is made every other point is worse, or not a number at all.
    for worse in (9.0, math.inf, math.nan):
        losses = iter([1.0, 0.5, 0.8, worse, worse])
        opt = zk.ZOSGDConservative(model, lr=0.1, weight_decay=0.5, perturb="in_place")
        opt.step(lambda losses=losses: next(losses))
        assert opt.side == 0 and opt.bad_steps == 0 and unchanged(model, before) == []
    losses = iter([1.0, 0.5, math.nan])
    opt.step(lambda: next(losses))
    assert opt.bad_steps == 1 and unchanged(model, before) == []


def test_the_one_sided_base_loss_is_that_of_theta():
    model = Odd(torch.float32)
    losses = iter([1.0, 0.5, 0.2, 0.1])
    opt = zk.ZOSGDConservative(model, lr=0.1, estimator="one_sided", perturb="in_place")
    assert opt.step(lambda: next(losses)).item() == 1.0 and opt.side == -1


@pytest.mark.parametrize("name", [n for n in ALL if n != "conservative"])
def test_stochastic_rounding_of_bfloat16_weights_is_unbiased(name):
    n, seeds, off, along = 4096, 24, {}, {}
    generator = torch.Generator().manual_seed(1)
    start = (torch.rand(n, generator=generator) + 1).to(torch.bfloat16)
    for rounding in ("stochastic", "nearest"):
        errors, signs = [], []
        for seed in range(seeds):
            ends = []
            for dtype in (torch.bfloat16, torch.float32):
                theta = nn.Parameter(start.to(dtype, copy=True))
                losses = iter([1.5, 1.0])
                opt = RULES[name][0](
                    [theta], lr=2e-4, eps=0.25, seed=seed, rounding=rounding, **RULES[name][2]
                )
                opt.step(lambda losses=losses: next(losses))
                ends.append(theta.detach().double())
            errors.append(ends[0] - ends[1])
            signs.append((ends[1] - start.double()).sign())
        off[rounding] = torch.stack(errors)
        along[rounding] = (off[rounding] * torch.stack(signs)).mean()
    # Between 1 and 2 a step of bfloat16 is 2⁻⁷, hence the deviation of a rounding at most half of
    # it; its grain is 2⁻¹⁶ of a step. Five standard deviations of a mean of all roundings, and 6.5,
    # for there are 4096 of them, of the mean over seeds at a weight.
    ulp, count = 2.0**-7, n * seeds
    bound = ulp * (2.5 / math.sqrt(count) + 2.0**-16)
    assert off["stochastic"].mean().abs() < bound and along["stochastic"].abs() < bound
    assert off["stochastic"].mean(0).abs().max() < ulp * (3.25 / math.sqrt(seeds))
    # To nearest these steps are lost, all of them: the bound can be missed.
    assert along["nearest"] < -1.5 * bound


QUADRATIC = torch.tensor([[3.0, 1.0, -0.5], [1.0, 2.0, 0.25], [-0.5, 0.25, 4.0]])


@pytest.mark.parametrize("estimator, masked, dist", [
    ("two_sided", False, "gaussian"), ("one_sided", True, "gaussian"),
    ("one_sided", False, "rademacher"), ("population", True, "gaussian"),
    ("population", False, "rademacher"),
])  # fmt: skip
def test_the_mean_of_many_estimates_is_the_gradient(estimator, masked, dist):
    # q queries of one step at lr 1 write θ − ĝ, the mean of q estimates; in a block's test as many.
    q, theta = 2_500, nn.Parameter(torch.tensor([0.3, -0.7, 1.1]))
    keep = torch.tensor([True, not masked, True])
    g, start = torch.where(keep, QUADRATIC @ theta.detach(), 0.0), theta.detach().clone()
    opt = zk.ZOSGD(
        [theta], lr=1.0, eps=0.0625, num_queries=q, estimator=estimator, dist=dist,
        mask=zk.masks.Bits([keep]) if masked else None,
    )  # fmt: skip
    opt.step(lambda: theta @ (QUADRATIC @ theta) / 2)
    mean = start - theta.detach()
    # Var ĝᵢ = |g|² + gᵢ² for a Gaussian direction and |g|² − gᵢ² for a Rademacher one; the
    # one-sided term ε (zᵀAz)/2 zᵢ has mean 0 and adds less than (3 · ε · trace A / 2)² < 3. Of so
    # large a population the baseline, which takes away the mean of that term, has no error.
    variance = g @ g + g * g if dist == "gaussian" else g @ g - g * g
    error = ((variance + (0.0 if estimator == "two_sided" else 3.0)) / q).sqrt()
    assert ((mean - g).abs() <= torch.where(keep, 4 * error, 0.0)).all()
    assert ((mean - g).abs() > 0)[keep].all()


ONE = [nn.Parameter(torch.ones(2))]
WIDE = [nn.Parameter(torch.ones(2, dtype=torch.float64))]
BAD = {
    "beta": (lambda: zk.ZOSGDMomentum(ONE, beta=1.5), "beta is 1.5"),
    "betas": (lambda: zk.ZOAdam(ONE, betas=(0.9, -0.1)), r"betas\[1\] is -0.1"),
    "betas corrected": (
        lambda: zk.ZOAdam(ONE, betas=(1.0, 0.9), bias_correction=True),
        "below 1",
    ),
    "adam_eps": (lambda: zk.ZOAdam(ONE, adam_eps=-1e-8), "adam_eps is -1e-08"),
    "window": (lambda: zk.ZOSGDMomentum(ONE, window=0), "window is 0"),
    "window and state": (
        lambda: zk.ZOSGDMomentum(ONE, window=8, state_dtype=torch.bfloat16),
        "no state",
    ),
    "state_dtype": (lambda: zk.ZOAdam(ONE, state_dtype=torch.float16), "bfloat16"),
    "state float64": (lambda: zk.ZOSGDMomentum(WIDE, state_dtype=torch.float32), "float64"),
    "maximize": (
        lambda: zk.ZOSGDConservative(
            [{"params": ONE}, {"params": WIDE, "maximize": True}], maximize=False
        ),
        "same",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()

"""ZO-SGD and the perturbed forward: what a user of the optimizer would notice."""

import math

import pytest
import torch
from conftest import bits
from textbook import FORWARDS
from torch import nn

import zokernels as zk
from zokernels.estimators import ESTIMATORS, derive_seed

MODES = ["on_entry", "paired", "in_place"]
# One forward a point, and a context of one point.
APART = ["on_entry", "in_place"]


class Small(nn.Module):
    """Two equal layers, a tied head, a norm, dropout, a frozen part and one element alone."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.to(dtype)

    def forward(self, x, y):
        h = self.first(self.embed(x)).tanh()
        h = self.dropout(self.norm(self.frozen(self.second(h))))
        return nn.functional.cross_entropy(self.head(h * self.scale).float(), y)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(11, (16,), generator=generator), torch.randint(
        11, (16,), generator=generator
    )


def state(model):
    return {name: bits(t).clone() for name, t in model.state_dict().items()}


def unchanged(model, before):
    return [
        name for name, t in model.state_dict().items() if not torch.equal(bits(t), before[name])
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_200_steps_at_lr_0_leave_every_bit(dtype, mode):
    model, (x, y) = Small(dtype).train(), batch()
    before = state(model)
    opt = zk.ZOSGD(model, lr=0.0, perturb=mode)
    for _ in range(200):
        opt.step(lambda: model(x, y))
    assert unchanged(model, before) == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fail_at", [0, 1, 2, 3])
def test_a_closure_that_raises_leaves_the_weights(mode, fail_at, estimator):
    model, (x, y) = Small().train(), batch()
    before, pointers = state(model), [p.data_ptr() for p in model.parameters()]
    opt = zk.ZOSGD(model, lr=0.1, num_queries=4, estimator=estimator, perturb=mode)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls > fail_at:
            handle = model.head.register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                return model(x, y)
            finally:
                handle.remove()
        return model(x, y)

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert unchanged(model, before) == []
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert model.training and model.dropout.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_both_modes_agree_bit_for_bit(estimator, dtype):
    results = []
    for mode in APART:
        model, (x, y) = Small(dtype).train(), batch()
        opt = zk.ZOSGD(
            model, lr=0.05, num_queries=2, estimator=estimator, perturb=mode, weight_decay=0.1,
            rounding="stochastic", dist="rademacher", mask=zk.masks.Random(0.8, 4), seed=5,
        )  # fmt: skip
        losses = [opt.step(lambda m=model, x=x, y=y: m(x, y)).item() for _ in range(5)]
        results.append((losses, state(model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])


@pytest.mark.parametrize("mode", MODES)
def test_a_step_equals_its_formula(mode):
    # The textbook version, with the library's z: θ ± εz in binary32, one fma a weight.
    model, (x, y) = Small().eval(), batch()
    lr, eps, wd, q, seed = 0.03, 2e-3, 0.2, 3, 2**63 + 1
    twin = Small().eval()
    opt = zk.ZOSGD(model, lr=lr, eps=eps, weight_decay=wd, num_queries=q, seed=seed, perturb=mode)
    for step in range(4):
        loss = opt.step(lambda: model(x, y))
        params = [(i, p) for i, p in enumerate(twin.parameters()) if p.requires_grad]
        stored = [p.detach().clone() for _, p in params]
        seeds = [derive_seed(seed, step, k) for k in range(q)]
        found, losses = [], []
        for s in seeds:
            sides = []
            for side in (eps, -eps):
                for (i, p), w in zip(params, stored, strict=True):
                    z = zk.noise.gaussian(p.numel(), seed=s, stream=i).view_as(p)
                    side32 = torch.tensor(side).double()
                    p.data = (w.double() + side32 * z.double()).float()
                sides.append(twin(x, y).item())
            found.append((sides[0] - sides[1]) / 2 / eps)
            losses += sides
        if mode == "paired":
            # A norm at two points is not rounded as two norms are, and a slope is over 2 ε.
            assert opt.projected_gradients == pytest.approx(found, abs=2e-6 / eps)
            found = opt.projected_gradients
        assert opt.projected_gradients == found
        assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        for (i, p), w in zip(params, stored, strict=True):
            acc = (w * torch.tensor(1 - lr * wd)).double()
            for s, d in zip(seeds, found, strict=True):
                c = torch.tensor(-lr * d / q).double()
                z = zk.noise.gaussian(p.numel(), seed=s, stream=i).view_as(p)
                acc = (acc + c * z.double()).float().double()
            p.data = acc.float()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_tied_weights_once_frozen_never_and_equal_shapes_apart(mode):
    model, (x, y) = Small(), batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = zk.ZOSGD(model, lr=1.0, perturb=mode)
    opt.step(lambda: model(x, y))
    (d,) = opt.projected_gradients
    seed = derive_seed(0, 0, 0)
    for i, (name, p) in enumerate(model.named_parameters()):
        if name.startswith("frozen"):
            assert torch.equal(p, before[name])
            continue
        z = zk.noise.gaussian(p.numel(), seed=seed, stream=i).view_as(p)
        assert torch.allclose(p, before[name] - d * z, atol=1e-5)
    moved = [getattr(model, n).weight - before[f"{n}.weight"] for n in ("first", "second")]
    assert not torch.allclose(*moved, atol=1e-3)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("mode", APART)
@pytest.mark.parametrize("estimator, queries, calls", FORWARDS)
def test_forwards_a_step(mode, estimator, queries, calls):
    model, (x, y) = Small(), batch()
    opt = zk.ZOSGD(model, num_queries=queries, estimator=estimator, perturb=mode)
    for _ in range(2):
        seen = []
        opt.step(lambda seen=seen: seen.append(1) or model(x, y))
        assert len(seen) == calls


def test_one_sided_returns_the_base_loss():
    model, (x, y) = Small().eval(), batch()
    base = model(x, y)
    loss = zk.ZOSGD(model, lr=0.1, estimator="one_sided").step(lambda: model(x, y))
    assert torch.equal(loss, base.detach()) and not loss.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_the_projected_gradient_is_the_directional_derivative(mode):
    model, (x, y) = Small().double().eval(), batch()

    def closure():
        h = model.second(model.first(model.embed(x)).tanh()).tanh() * model.scale
        return nn.functional.cross_entropy(model.head(h), y)

    for n in ("norm", "frozen"):
        getattr(model, n).requires_grad_(False)
    # `scale` belongs to the root, which this closure passes by: in place only for the root's own.
    if mode == "on_entry":
        model.scale.requires_grad_(False)
    closure().backward()
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-5, perturb=mode)
    opt.step(closure)
    expected = sum(
        (
            p.grad * zk.noise.gaussian(p.numel(), seed=derive_seed(0, 0, 0), stream=i).view_as(p)
        ).sum()
        for i, p in enumerate(model.parameters())
        if p.grad is not None and p.requires_grad
    )
    # The central difference's own error is eps²/6 times a third derivative.
    assert opt.projected_gradients[0] == pytest.approx(expected.item(), rel=1e-7)


# E|z|² (z·θ)² is m |θ|²: normals have a fourth moment of 3, and the squares of signs are all 1.
@pytest.mark.parametrize("dist, m", [("gaussian", 22), ("rademacher", 20), ("rank1", 20)])
def test_a_quadratic_converges_at_the_rate_of_theory(dist, m):
    # L = |θ|²/2: E|θ'|² = (1 − 2η + m η²) |θ|², least at η = 1/m, where a step makes it 1 − 1/m.
    # A central difference of a quadratic is exact at any ε, and float32 is faster than float64.
    steps, runs = 80, 60
    logs = []
    for seed in range(runs):
        theta = nn.Parameter(torch.ones(4, 5))
        opt = zk.ZOSGD([theta], lr=1 / m, eps=0.1, seed=seed, dist=dist, perturb="in_place")
        for _ in range(steps):
            opt.step(lambda theta=theta: (theta**2).sum() / 2)
        logs.append((theta.detach().double() ** 2).sum().item() / theta.numel())
    mean = sum(logs) / runs
    spread = (sum((v - mean) ** 2 for v in logs) / runs / runs) ** 0.5
    assert abs(mean - (1 - 1 / m) ** steps) < 5 * spread


def test_a_quadratic_of_few_dimensions_is_solved():
    # 4 dimensions: 5/6 a step, so that 500 steps are 40 decades of |θ|².
    theta = nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = zk.ZOSGD([theta], lr=1 / 6, eps=1e-4)
    for _ in range(500):
        opt.step(lambda: (theta**2).sum() / 2)
    assert theta.abs().max() < 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_dropout_and_buffers_are_held_fixed(mode):
    model, (x, y) = Small().train(), batch()
    before = {n: b.clone() for n, b in model.named_buffers()}
    losses = []
    # The root keeps its training flag; what it draws itself is drawn again by every forward.
    opt = zk.ZOSGD(model, lr=0.0, num_queries=2, perturb=mode)

    def closure():
        assert model.training and not model.dropout.training
        losses.append(torch.rand(()).item())
        return model(x, y)

    opt.step(closure)
    assert len(set(losses)) == 1
    assert model.dropout.training and model.norm.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    opt.step(closure)
    assert len(set(losses)) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [0, 1])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(mode, bad, at):
    model, (x, y) = Small(), batch()
    before = state(model)
    opt = zk.ZOSGD(model, lr=0.1, perturb=mode, max_bad_steps=3, weight_decay=0.5)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return torch.tensor(bad) if calls % 2 == at or calls == 1 else model(x, y)

    opt.step(closure)
    opt.step(closure)
    assert opt.bad_steps == 2
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        opt.step(closure)
    assert unchanged(model, before) == []
    opt.step(lambda: model(x, y))
    assert opt.bad_steps == 0 and unchanged(model, before) != []


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_round_trip_resumes_bit_for_bit(mode, tmp_path):
    (x, y), kw = batch(), dict(lr=0.05, seed=9, num_queries=2, mask=zk.masks.Random(0.5, 2))
    straight = Small()
    opt = zk.ZOSGD(straight, perturb=mode, **kw)
    for _ in range(6):
        opt.step(lambda: straight(x, y))
    half = Small()
    opt = zk.ZOSGD(half, perturb=mode, **kw)
    for _ in range(3):
        opt.step(lambda: half(x, y))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    torch.rand(17)
    resumed = Small()
    resumed.load_state_dict(half.state_dict())
    opt = zk.ZOSGD(resumed, lr=1.0, perturb=mode)
    opt.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for _ in range(3):
        opt.step(lambda: resumed(x, y))
    assert all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True)
    )


def test_groups_have_their_own_lr_and_eps_and_streams_follow_the_order():
    a, b, c = (nn.Parameter(torch.zeros(5)) for _ in range(3))
    opt = zk.ZOSGD([{"params": [a]}, {"params": [b], "lr": 0.5, "eps": 0.1}], lr=0.25, eps=0.2)
    opt.add_param_group({"params": [c], "lr": 0.0})
    assert [g["streams"] for g in opt.param_groups] == [[0], [1], [2]]
    target = torch.arange(5.0)
    opt.step(lambda: (a + b + c) @ target)
    seed = derive_seed(0, 0, 0)
    z = [zk.noise.gaussian(5, seed=seed, stream=i) for i in range(3)]
    difference = sum(e * (zi @ target) for e, zi in zip((0.2, 0.1, 0.2), z, strict=True))
    assert torch.allclose(a, -0.25 * difference / 0.2 * z[0], rtol=1e-4)
    assert torch.allclose(b, -0.5 * difference / 0.1 * z[1], rtol=1e-4)
    assert torch.equal(c, torch.zeros(5))


def test_a_module_counts_frozen_parameters_and_accepts_a_scheduler():
    model, (x, y) = Small(), batch()
    opt = zk.ZOSGD(model, lr=1.0)
    names = [n for n, _ in model.named_parameters()]
    trainable = [i for i, n in enumerate(names) if not n.startswith("frozen")]
    assert opt.param_groups[0]["streams"] == trainable
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.5, total_iters=2)
    for _ in range(2):
        opt.step(lambda: model(x, y))
        schedule.step()
    assert opt.param_groups[0]["lr"] == 0.5


def test_maximize_climbs():
    theta = nn.Parameter(torch.zeros(3))
    opt = zk.ZOSGD([theta], lr=0.05, maximize=True)
    for _ in range(200):
        opt.step(lambda: -((theta - 1) ** 2).sum())
    assert (theta - 1).abs().max() < 0.1


BAD = {
    "no closure": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))]).step(), "no closure"),
    "vector loss": (
        lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))]).step(lambda: torch.ones(2, 2)),
        "scalar",
    ),
    "eps 0": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], eps=0.0), "eps is 0"),
    "eps NaN": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], eps=math.nan), "eps is nan"),
    "lr negative": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], lr=-1), "lr is -1"),
    "lr NaN": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], lr=math.nan), "lr is nan"),
    "q 0": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], num_queries=0), "at least 1"),
    "dist": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], dist="uniform"), "rademacher"),
    "rounding": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], rounding="up"), "stochastic"),
    "seed": (lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], seed=-3), "-3"),
    "perturb": (lambda: zk.ZOSGD(nn.Linear(1, 1), perturb="both"), "on_entry"),
    "list on entry": (
        lambda: zk.ZOSGD([nn.Parameter(torch.ones(2))], perturb="on_entry"),
        "module",
    ),
    "all frozen": (lambda: zk.ZOSGD(nn.Linear(1, 1).requires_grad_(False)), "trainable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()

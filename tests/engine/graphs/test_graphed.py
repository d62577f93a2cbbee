"""A captured step without its graph: the same numbers in memory, bit for bit those of opt.step."""

import copy
import math

import pytest
import torch
from anywhere import There
from conftest import same_bits
from torch import nn

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["in_place", "on_entry", "paired"]


class Model(nn.Module):
    """An embedding, a norm, a layer that is large, one that no operation is known of, dropout."""

    def __init__(self, dtype=torch.float32, conv=True, width=72):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(300, width)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=1) if conv else None
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 5)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.dropout = nn.Dropout(0.5)
        self.to(dtype)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        if self.conv is not None:
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.down(torch.relu(self.up(self.dropout(x))))
        return self.head(self.frozen(x).mean(1))


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "ids": torch.randint(0, 300, (4, 7), generator=generator),
            "labels": torch.randint(0, 5, (4,), generator=generator),
            "weight": torch.ones(()),
        }
        for _ in range(count)
    ]


def loss_fn(model):
    def loss(batch):
        # A loss of each row, so that both sides may share a forward.
        losses = nn.functional.cross_entropy(
            model(batch["ids"]).float(), batch["labels"], reduction="none"
        )
        return losses.mean() * batch["weight"]

    return loss


def pair(rule=zk.ZOSGD, dtype=torch.float32, width=72, **options):
    """The same model and optimizer twice: one for opt.step, one for a captured step."""
    if options.get("perturb") != "paired":
        options.pop("points", None)  # they share a forward in that mode only
    # A convolution is not known how to share a forward of two points.
    base = Model(dtype, options.get("perturb") != "paired", width)
    found = []
    for _ in range(2):
        model = copy.deepcopy(base)
        options = {"lr": 1e-2, "eps": 3e-3, "seed": 7, **options}
        found.append((model, rule(model, lazy_logits=False, **options)))
    return found


def states(opt):
    return [t for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]


def assert_same(one, other):
    (model, opt), (twin, graphed) = one, other
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(p, q)
    for s, t in zip(states(opt), states(graphed), strict=True):
        assert same_bits(s, t)
    assert opt.param_groups[0]["step"] == graphed.param_groups[0]["step"]


CASES = {
    "plain": {},
    "one-sided": dict(estimator="one_sided", num_queries=3, normalize="ema", clip=0.9),
    "population": dict(estimator="population", num_queries=4, normalize="std", clip=1.1),
    "queries": dict(num_queries=3, weight_decay=0.1, dist="rademacher", maximize=True),
    "rank one": dict(num_queries=3, weight_decay=0.1, dist="rank1"),
    "rank one, all points": dict(dist="rank1", num_queries=2, points="all", estimator="one_sided"),
    "rank one, rounding": dict(dtype=torch.bfloat16, dist="rank1", rounding="stochastic"),
    "rank one, sign": dict(rule=zk.ZOSGDSign, lr=1e-4, dist="rank1"),
    "rounding": dict(dtype=torch.bfloat16, rounding="stochastic", weight_decay=0.2),
    "half": dict(dtype=torch.float16, num_queries=2, rounding="stochastic"),
    "mask": dict(mask=zk.masks.Random(0.6, 5)),
    "sparsity": dict(sparsity=0.3),
    "sign": dict(rule=zk.ZOSGDSign, lr=1e-4, num_queries=2, maximize=True),
    "momentum": dict(rule=zk.ZOSGDMomentum, beta=0.7, weight_decay=0.1, estimator="one_sided"),
    "adam": dict(rule=zk.ZOAdam, lr=1e-4, weight_decay=0.1, state_dtype=torch.bfloat16),
    "adam without amsgrad": dict(rule=zk.ZOAdam, lr=1e-4, amsgrad=False, num_queries=2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_optimizers_step_bit_for_bit(case, mode):
    one, other = pair(perturb=mode, **CASES[case])
    (model, opt), (twin, twin_opt) = one, other
    first, *rest = batches(5)
    step = zk.GraphedStep(twin_opt, loss_fn(twin), first, capture=False)
    before = [p.clone() for p in model.parameters()]
    assert_same(one, other) if not states(twin_opt) else None
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3) for o in (opt, twin_opt)]
    for batch in [first, *rest]:
        expected = opt.step(lambda b=batch: loss_fn(model)(b))
        got = step(batch)
        assert (got.dtype, got.requires_grad) == (torch.float32, False)
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
        step.read()
        assert twin_opt.projected_gradients == opt.projected_gradients
        for schedule in schedules:
            schedule.step()
    assert_same(one, other)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert sum(moved) >= 8 and twin.training and twin.dropout.training


def test_it_is_that_of_the_reference_too():
    one, other = pair(width=8, dtype=torch.bfloat16, rounding="stochastic", backend="reference")
    (model, opt), (twin, twin_opt) = one, other
    many = batches(3)
    step = zk.GraphedStep(twin_opt, loss_fn(twin), many[0], capture=False)
    for batch in many:
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch)
    assert_same(one, other)


def test_both_run_in_one_forward_where_that_was_asked_for():
    (_, _), (model, opt) = pair(perturb="paired")
    calls = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)
    calls.clear()
    step(batches(1)[0])
    assert len(calls) == 1


def test_every_group_has_its_own_numbers():
    results = []
    for graphed in (False, True):
        model = Model()
        head = list(model.head.parameters())
        rest = [p for n, p in model.named_parameters() if p.requires_grad and "head" not in n]
        groups = [
            dict(params=rest, lr=1e-2, weight_decay=0.1),
            dict(params=head, lr=3e-3, eps=1e-2, maximize=True, rounding="stochastic"),
        ]
        opt = zk.ZOSGD(groups, eps=1e-3, model=model, perturb="on_entry", lazy_logits=False)
        fn, many = loss_fn(model), batches(4)
        step = zk.GraphedStep(opt, fn, many[0], capture=False) if graphed else None
        for number, batch in enumerate(many):
            # Both may be annealed: they are written before every step.
            opt.param_groups[1]["eps"] = 1e-2 / (number + 1)
            opt.param_groups[0]["weight_decay"] = 0.1 * number
            step(batch) if step else opt.step(lambda b=batch, fn=fn: fn(b))
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("rule", [zk.ZOSGD, zk.ZOSGDSign, zk.ZOSGDMomentum, zk.ZOAdam])
def test_a_loss_that_is_not_finite_reaches_no_weight(rule):
    one, other = pair(rule, perturb="on_entry", weight_decay=0.1)
    (model, opt), (twin, twin_opt) = one, other
    for m in (model, twin):
        m.head.bias.data[0] = -0.0
    many = batches(6)
    for i in (2, 3):
        many[i] = many[i] | {"weight": torch.tensor(math.nan if i == 2 else math.inf)}
    step = zk.GraphedStep(twin_opt, loss_fn(twin), many[0], capture=False)
    for number, batch in enumerate(many):
        before = [t.clone() for t in (*twin.parameters(), *states(twin_opt))]
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch)
        step.read()
        assert twin_opt.bad_steps == opt.bad_steps == {2: 1, 3: 2}.get(number, 0)
        after = [*twin.parameters(), *states(twin_opt)]
        unchanged = all(same_bits(a, b) for a, b in zip(before, after, strict=True))
        assert unchanged == (number in (2, 3))
        if unchanged:
            assert all(map(math.isnan, twin_opt.projected_gradients))
    assert_same(one, other)


def test_a_step_that_changes_nothing_leaves_the_sign_of_a_zero():
    (_, _), (model, opt) = pair(perturb="on_entry", lr=0.0)
    model.head.weight.data[0] = -0.0
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)
    step(batches(1)[0])
    assert model.head.weight[0].signbit().all()


def test_too_many_bad_steps_raise_one_step_late_or_when_read():
    (_, _), (model, opt) = pair(max_bad_steps=2)
    good = batches(1)[0]
    bad = good | {"weight": torch.tensor(math.nan)}
    step = zk.GraphedStep(opt, loss_fn(model), good, capture=False)
    step(bad)
    step(bad)
    assert opt.bad_steps == 1
    with pytest.raises(FloatingPointError, match="not finite in 2 steps in a row.*no weight"):
        step.read()
    step(bad)
    with pytest.raises(FloatingPointError, match="3 steps"):
        step(good)
    step(good)
    step.read()
    assert opt.bad_steps == 0 and opt.param_groups[0]["step"] == 5


def test_a_coefficient_beyond_binary32_writes_no_weight():
    (_, _), (model, opt) = pair(lr=1e38, eps=1e-3)
    before = [p.clone() for p in model.parameters()]
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)
    step(batches(1)[0] | {"weight": torch.tensor(1e3)})
    step.read()
    assert opt.bad_steps == 1
    assert all(map(same_bits, before, model.parameters()))


@pytest.mark.parametrize("rule", [zk.ZOSGD, zk.ZOSGDMomentum])
def test_a_trajectory_of_it_is_that_of_the_optimizer(rule, tmp_path):
    one, other = pair(
        rule, dtype=torch.bfloat16, num_queries=2, rounding="stochastic", weight_decay=0.1
    )
    many = batches(6)
    many[3] = many[3] | {"weight": torch.tensor(math.nan)}
    base = copy.deepcopy(one[0])
    for (model, opt), name in ((one, "plain"), (other, "graphed")):
        log = opt.record(tmp_path / name)
        fn = loss_fn(model)
        step = zk.GraphedStep(opt, fn, many[0], capture=False) if name == "graphed" else None
        for batch in many:
            step(batch) if step else opt.step(lambda b=batch, fn=fn: fn(b))
        log.close()
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "graphed").read_bytes()
    zk.replay(base, tmp_path / "graphed")
    assert all(map(same_bits, base.parameters(), other[0].parameters()))


def test_it_goes_on_from_a_state_dict_and_beside_plain_steps():
    one, other = pair(zk.ZOAdam, perturb="on_entry")
    (model, opt), (twin, twin_opt) = one, other
    many = batches(6)
    step = zk.GraphedStep(twin_opt, loss_fn(twin), many[0], capture=False)
    for batch in many[:3]:
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch)
    again = copy.deepcopy(twin)
    resumed = zk.ZOAdam(again, lr=1.0, lazy_logits=False)
    resumed.load_state_dict(copy.deepcopy(twin_opt.state_dict()))
    step = zk.GraphedStep(resumed, loss_fn(again), many[0], capture=False)
    for i, batch in enumerate(many[3:]):
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch) if i != 1 else resumed.step(lambda b=batch: loss_fn(again)(b))
    assert_same(one, (again, resumed))


def test_a_batch_of_another_shape_is_refused_before_anything_runs():
    (_, _), (model, opt) = pair()
    good = batches(1)[0]
    step = zk.GraphedStep(opt, loss_fn(model), good, capture=False)
    before = [p.clone() for p in model.parameters()]
    for batch, message in (
        (good | {"ids": good["ids"][:, :5]}, r"batch\['ids'\] is .* shape \(4, 5\).*\(4, 7\).*pad"),
        (good | {"weight": torch.ones((), dtype=torch.float64)}, "float64.*float32"),
        ({"ids": good["ids"]}, r"batch\['labels'\].*same entries"),
        (good | {"weight": 1.0}, "is 1.0, but the step was made for a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            step(batch)
    assert opt.param_groups[0]["step"] == 0
    assert all(map(same_bits, before, model.parameters()))


REFUSED = {
    "conservative": (lambda m: zk.ZOSGDConservative(m), "compares losses on the host"),
    "forward-grad": (lambda m: zk.ForwardGrad(m), "derivatives"),
    "hybrid": (
        lambda m: zk.HybridZO(
            m, lambda name: "head" not in name, lambda ps: torch.optim.SGD(ps, lr=0.1)
        ),
        "backpropagation",
    ),
    "blocks": (lambda m: zk.ZOSGD(m, blocks="module"), "blocks"),
    "resampled": (lambda m: zk.ZOSGD(m, sparsity=0.2, resample_every=3), "resample_every"),
    "window": (lambda m: zk.ZOSGDMomentum(m, window=4), "window"),
    "bias correction": (lambda m: zk.ZOAdam(m, bias_correction=True), "bias_correction"),
    "float64": (lambda m: zk.ZOSGD(m.double()), "float64"),
    "layout": (lambda m: zk.ZOSGD(transposed(m)), "not contiguous"),
    "devices": (lambda m: zk.ZOSGD(halved(m)), "on cpu, cpu:1, but a graph is .* one device"),
}


def transposed(model):
    model.head.weight.data = model.head.weight.data.t().contiguous().t()
    return model


def halved(model):
    model.head.weight = torch.nn.Parameter(model.head.weight.data.as_subclass(There))
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_refused_by_a_sentence(case):
    make, message = REFUSED[case]
    model = Model()
    opt = make(model)
    with pytest.raises((TypeError, ValueError), match=rf"{message}.*opt\.step"):
        zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)


def test_a_rule_of_ones_own_is_refused():
    class Mine(zk.ZOSGD):
        pass

    with pytest.raises(TypeError, match="Mine can't be captured.*isn't known"):
        zk.GraphedStep(Mine(model := Model()), loss_fn(model), batches(1)[0], capture=False)


def test_a_graph_needs_cuda():
    (_, _), (model, opt) = pair()
    with pytest.raises(ValueError, match="on cpu, but a graph is captured on CUDA.*capture=False"):
        zk.GraphedStep(opt, loss_fn(model), batches(1)[0])


LOSSES = {
    "a number": (lambda m, b: float(loss_fn(m)(b)), TypeError, "returned a float.*a tensor of one"),
    "many": (lambda m, b: m(b["ids"]), TypeError, r"shape \(4, 5\)"),
    "random": (lambda m, b: loss_fn(m)(b) + torch.rand(()), RuntimeError, "draws random numbers"),
    "infinite": (lambda m, b: loss_fn(m)(b) / 0, ValueError, "must be finite"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_cannot_be_captured_is_refused(case):
    fn, error, message = LOSSES[case]
    (_, _), (model, opt) = pair()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        zk.GraphedStep(opt, lambda b: fn(model, b), batches(1)[0], capture=False)
    assert all(map(same_bits, before, model.parameters()))
    assert model.training


def test_a_model_that_writes_its_buffers_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x).mean()

    counting = Counting()
    with pytest.raises(RuntimeError, match="writes buffers"):
        zk.GraphedStep(zk.ZOSGD(counting), counting, torch.ones(5, 3), capture=False)
    assert counting.calls == 0


def test_what_the_graph_has_fixed_may_not_change():
    changes = {
        "num_queries": lambda m, o: o.param_groups[0].update(num_queries=2),
        "rounding": lambda m, o: o.param_groups[0].update(rounding="stochastic"),
        "params": lambda m, o: m.head.requires_grad_(False),
        "where they are": lambda m, o: setattr(m.head.weight, "data", m.head.weight.clone()),
        "make a new GraphedStep": lambda m, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    }
    for message, change in changes.items():
        (_, _), (model, opt) = pair(zk.ZOSGDMomentum)
        step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)
        step(batches(1)[0])
        change(model, opt)
        with pytest.raises(RuntimeError, match=message):
            step(batches(1)[0])
        assert opt.param_groups[0]["step"] == 1

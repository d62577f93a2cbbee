"""Ask and tell: the step that a closure would have made, from numbers that somebody else found."""

import math
import warnings

import pytest
import torch
from torch import nn

import zokernels as zk
from zokernels.estimators import ESTIMATORS
from zokernels.optim.fitness import centered_rank

MODES = ["on_entry", "paired", "in_place"]


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.to(dtype)

    def forward(self, x):
        self.seen += 1
        return self.last(self.drop(self.first(x).tanh()))


X = torch.linspace(-1, 1, 20).view(4, 5)


def loss_of(model):
    return model(X).square().mean()


def rounded_loss_of(model):
    """How many rows share a product decides, on some processors, about its last bits."""
    return (loss_of(model) * 256).round() / 256


def steps(model, opt, told, count=4, loss_of=loss_of, **how):
    for _ in range(count):
        if not told:
            opt.step(lambda: loss_of(model))
            continue
        losses = []
        for member in opt.ask():
            with member:
                losses.append(loss_of(model))
        opt.tell(torch.stack(losses) if told == "tensor" else list(map(float, losses)), **how)


RULES = {
    "sgd": (zk.ZOSGD, {}),
    "sign": (zk.ZOSGDSign, dict(dist="rademacher")),
    "momentum": (zk.ZOSGDMomentum, dict(dist="rank1")),
    "adam": (zk.ZOAdam, dict(bias_correction=True, normalize="ema", clip=1.5)),
    "deviation": (zk.ZOSGD, dict(normalize="std", maximize=True, weight_decay=0.1)),
    "sparse": (zk.ZOSGD, dict(sparsity=0.4, resample_every=2)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", RULES)
def test_it_is_the_step_of_a_closure_bit_for_bit(name, estimator, mode, tmp_path):
    rule, own = RULES[name]
    found = []
    for told in (None, "list", "tensor"):
        model = Net()
        opt = rule(
            model, lr=0.02, eps=1e-2, num_queries=3, estimator=estimator, perturb=mode, seed=6,
            **own,
        )  # fmt: skip
        opt.record(tmp_path / f"{told}")
        steps(model, opt, told, loss_of=rounded_loss_of if mode == "paired" else loss_of)
        opt.trajectory.close()
        replayed = zk.replay(Net(), tmp_path / f"{told}")
        assert all(map(torch.equal, replayed.parameters(), model.parameters()))
        states = [t for s in opt.state.values() for t in s.values() if torch.is_tensor(t)]
        found.append([*model.parameters(), *states, torch.tensor(opt.projected_gradients)])
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))
    assert (tmp_path / "list").read_bytes() == (tmp_path / "None").read_bytes()


def test_a_members_forward_is_that_of_a_step_and_leaves_nothing():
    model = Net().train()
    opt = zk.ZOSGD(model, lr=0.1, eps=0.1, num_queries=2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    drawn = []
    for member in opt.ask():
        with member:
            assert not model.drop.training and not torch.is_grad_enabled()
            drawn.append(torch.rand(3))
            assert float(model.seen) == 0
            loss_of(model)
        assert model.drop.training and torch.is_grad_enabled()
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    # The same numbers for every member.
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    with pytest.raises(ZeroDivisionError), opt.ask()[1]:
        raise ZeroDivisionError
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_members_are_the_points_of_the_estimator():
    model = Net()
    sides = {
        "two_sided": [1, -1, 1, -1], "one_sided": [0, 1, 1], "population": [1, 1],
    }  # fmt: skip
    for estimator, expected in sides.items():
        opt = zk.ZOSGD(model, num_queries=2, estimator=estimator)
        asked = opt.ask()
        assert [m.side for m in asked] == expected and len(asked) == len(expected)
        assert [m.index for m in asked] == list(range(len(expected)))
        # Asked again, nothing has happened.
        assert [m.seed for m in opt.ask()] == [m.seed for m in asked]
        assert opt.param_groups[0]["step"] == 0
        with pytest.raises(RuntimeError, match="asked for again"), asked[0]:
            pass


def test_what_is_told_need_not_be_a_loss():
    """A reward that has no gradient: how many outputs are above zero."""
    model = Net()
    opt = zk.ZOSGD(
        model, lr=0.05, eps=0.05, num_queries=16, estimator="population", normalize="std",
        maximize=True,
    )  # fmt: skip

    def reward():
        return float((model(X) > 0).float().mean())

    before = reward()
    with warnings.catch_warnings():
        # Where no member has another reward than the rest there is no step.
        warnings.simplefilter("ignore")
        for _ in range(60):
            found = []
            for member in opt.ask():
                with member:
                    found.append(reward())
            opt.tell(found, fitness="centered_rank")
    assert reward() > before + 0.2


def test_a_fitness_stands_for_the_numbers():
    found = {}
    numbers = [3.0, -1.0, 100.0, 3.0]
    ranks = [0.0, -0.5, 0.5, 0.0]
    assert centered_rank(numbers) == ranks
    for how in ("centered_rank", "function", "told"):
        model = Net()
        opt = zk.ZOSGD(model, lr=0.1, eps=0.1, num_queries=4, estimator="population")
        opt.ask()
        fitness = {"centered_rank": "centered_rank", "function": centered_rank, "told": None}[how]
        loss = opt.tell(ranks if how == "told" else numbers, fitness=fitness)
        # What it gives is the mean of what was told.
        assert float(loss) == (0.0 if how == "told" else 26.25)
        found[how] = [p.detach().clone() for p in model.parameters()]
    assert all(map(torch.equal, found["function"], found["told"]))
    assert all(map(torch.equal, found["centered_rank"], found["told"]))


def test_a_number_that_is_not_finite_makes_no_step():
    model = Net()
    opt = zk.ZOSGD(model, lr=0.1, num_queries=2, max_bad_steps=2)
    before = [p.detach().clone() for p in model.parameters()]
    opt.ask()
    loss = opt.tell([1.0, math.nan, 2.0, 3.0], fitness="centered_rank")
    assert math.isnan(loss) and opt.bad_steps == 1 and opt.param_groups[0]["step"] == 1
    opt.ask()
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        opt.tell([1.0, 2.0, math.inf, 3.0])
    assert all(map(torch.equal, before, model.parameters()))


def test_a_schedule_of_torch_takes_it_for_a_step():
    opt = zk.ZOSGD(Net(), lr=0.1)
    falling = torch.optim.lr_scheduler.LinearLR(opt)
    opt.ask()
    opt.tell([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        falling.step()


def test_parameters_without_a_module_are_asked_for_too():
    w = nn.Parameter(torch.ones(4))
    opt = zk.ZOSGD([w], lr=0.1, eps=0.1, perturb="in_place")
    seen = []
    for member in opt.ask():
        with member:
            seen.append(w.detach().clone())
    z = zk.noise.gaussian(4, seed=opt.ask()[0].seed)
    torch.testing.assert_close(seen[0] - seen[1], 0.2 * z)
    assert torch.equal(w, torch.ones(4))
    with pytest.raises(ValueError, match="All members at once need a model"), opt.ask():
        pass


def two(opt):
    opt.ask()
    return opt


def changed(opt, **settings):
    opt.ask()
    for group in opt.param_groups:
        group.update(settings)
    opt.tell([1.0, 2.0])


def gone_back(opt):
    state = opt.state_dict()
    two(opt).tell([1.0, 2.0])
    opt.ask()
    opt.load_state_dict(state)
    opt.tell([1.0, 2.0])


REFUSED = {
    "nothing asked": (lambda m: zk.ZOSGD(m).tell([1.0, 2.0]), RuntimeError, "nothing asked for"),
    "too few": (lambda m: two(zk.ZOSGD(m)).tell([1.0]), ValueError, "got 1 numbers for 2 members"),
    "rows": (
        lambda m: two(zk.ZOSGD(m)).tell([torch.ones(3), torch.ones(3)]), ValueError,
        r"list of Tensor of shape \(3,\), but it must be .* one real number a member",
    ),
    "one number": (lambda m: two(zk.ZOSGD(m)).tell(1.0), ValueError, "got a float, but it must be"),
    "no fitness": (
        lambda m: two(zk.ZOSGD(m)).tell([1.0, 2.0], fitness=lambda x: None), ValueError,
        "fitness gave a NoneType, but it must be",
    ),
    "another eps": (
        lambda m: changed(zk.ZOSGD(m, eps=1e-2), eps=1e-3), RuntimeError,
        r"eps is \[0.001\] and was \[0.01\] when these members were asked for",
    ),
    "another seed": (lambda m: changed(zk.ZOSGD(m), seed=5), RuntimeError, "seed is 5"),
    "more queries": (lambda m: changed(zk.ZOSGD(m), num_queries=2), RuntimeError, "num_queries"),
    "a matrix": (lambda m: two(zk.ZOSGD(m)).tell(torch.ones(2, 1)), ValueError, r"shape \(2, 1\)"),
    "fitness": (
        lambda m: two(zk.ZOSGD(m)).tell([1.0, 2.0], fitness="rank"), ValueError,
        "fitness is 'rank', but it must be None, 'centered_rank'",
    ),
    "short fitness": (
        lambda m: two(zk.ZOSGD(m)).tell([1.0, 2.0], fitness=lambda x: x[:1]), ValueError,
        "fitness gave 1 numbers for 2 members",
    ),
    "conservative": (lambda m: zk.ZOSGDConservative(m).ask(), TypeError, "can't ask and be told"),
    "forward": (lambda m: zk.ForwardGrad(m).ask(), TypeError, "can't ask and be told"),
    "blocks": (lambda m: zk.ZOSGD(m, blocks="module").ask(), ValueError, "called with blocks"),
    "repeat": (lambda m: zk.ZOSGD(m).ask().repeat(X), RuntimeError, "outside of its block"),
    "split": (lambda m: zk.ZOSGD(m).ask().split(torch.ones(3)), ValueError, "3 rows for 2 members"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_is_a_sentence(what):
    make, error, words = REFUSED[what]
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=words):
        make(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_state_that_was_loaded_is_of_another_step():
    model = Net()
    opt = zk.ZOSGD(model, lr=0.1)
    with pytest.raises(RuntimeError, match="step is 0 and was 1 when .* load a state, before"):
        gone_back(opt)
    # The rate is no part of a point.
    opt.ask()
    opt.param_groups[0]["lr"] = 0.01
    opt.tell([1.0, 2.0])


def test_a_refused_answer_can_be_given_again():
    model = Net()
    opt = zk.ZOSGD(model, lr=0.1)
    opt.ask()
    with pytest.raises(ValueError):
        opt.tell([1.0])
    opt.tell([1.0, 2.0])
    assert opt.param_groups[0]["step"] == 1


def test_they_take_turns():
    model = Net()
    opt = zk.ZOSGD(model, lr=0.1)
    asked = opt.ask()
    with asked[0]:
        for call in (opt.ask, lambda: opt.tell([1.0, 2.0]), lambda: asked[1].__enter__()):
            with pytest.raises(RuntimeError, match="take turns"):
                call()
        with pytest.raises(RuntimeError, match="take turns"):
            opt.step(lambda: loss_of(model))
    with pytest.raises(RuntimeError, match="step's closure"):
        opt.step(lambda: opt.ask() and loss_of(model))
    # The step took the place of what was asked for.
    with pytest.raises(RuntimeError, match="nothing asked for"):
        opt.tell([1.0, 2.0])


def test_an_error_in_a_members_block_is_the_users_own():
    """Also where a parameter was not perturbed, of which alone else is told."""
    model = Net()
    model.unused = nn.Parameter(torch.ones(2))
    opt = zk.ZOSGD(model, lr=0.1)
    with pytest.raises(ZeroDivisionError), opt.ask()[0]:
        loss_of(model)
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="'unused' was not perturbed"), opt.ask()[0]:
        loss_of(model)

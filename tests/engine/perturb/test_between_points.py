"""Every point of a step sees the same world, whatever a forward leaves behind."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_optim import MODES
from torch import nn

import zokernels as zk
from zokernels.estimators import derive_seed

X = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model, closure, before=lambda: None, step=0, eps=1e-2):
    """The loss and the slope of weights moved by hand, each point begun by ``before()``."""
    params = [(i, p, p.detach().clone()) for i, p in enumerate(model.parameters())]
    seed, found = derive_seed(3, step, 0), []
    for side in (1, -1):
        before()
        with torch.no_grad():
            for i, p, w in params:
                z = zk.noise.gaussian(p.numel(), seed=seed, stream=i).view_as(p)
                p.copy_(w + side * eps * z)
            found.append(float(closure()))
    with torch.no_grad():
        for _, p, w in params:
            p.copy_(w)
    return sum(found) / 2, (found[0] - found[1]) / (2 * eps)


def taken(model, closure, mode, steps=1, **options):
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=3, perturb=mode, **options)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            found.append((float(opt.step(closure)), opt.projected_gradients[0]))
    return found if steps > 1 else found[0]


class Keeps(nn.Linear):
    """Writes, or gives a name, what it has seen: to a buffer, or an attribute."""

    def __init__(self, how):
        torch.manual_seed(0)
        super().__init__(4, 4, dtype=torch.float64)
        self.how = how
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        y = super().forward(x)
        if self.how == "written":
            self.seen.lerp_(x.mean(0), 0.5)
        elif self.how == "counted":
            self.seen += 1
        elif self.how == "written with weights":
            self.seen.lerp_(y.mean(0), 0.5)
        elif self.how == "another":
            self.seen = 0.5 * self.seen + 0.5 * y.mean(0)
        return y * (1 + self.seen)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["written", "counted", "written with weights", "another"])
def test_a_buffer_that_a_forward_changes_is_as_before_at_each_point(how, mode):
    model = Keeps(how)
    first = model.seen

    def rest():
        model.seen = first.zero_()

    expected = by_hand(model, lambda: model(X).square().mean(), rest)
    rest()
    for _ in range(2):
        found = taken(model, lambda: model(X).square().mean(), mode)
        assert found == pytest.approx(expected, rel=1e-6)
        assert model.seen is first and not first.any()
    copy.deepcopy(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["torch", "python", "numpy", "closure", "all"])
def test_every_point_draws_the_same_and_every_step_anew(source, mode):
    class Draws(nn.Linear):
        def forward(self, x):
            if source in ("torch", "closure", "all"):
                x = x + torch.randn_like(x)
            if source in ("python", "all"):
                x = x * (1 + random.random())
            if source in ("numpy", "all"):
                x = x * (1 + np.random.rand())
            return super().forward(x)

    torch.manual_seed(0)
    model = Draws(4, 4).double()

    def closure():
        loss = model(X).square()
        return (loss * torch.randn_like(loss) if source in ("closure", "all") else loss).mean()

    def start():
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)

    expected = by_hand(model, closure, start)
    start()
    found = taken(model, closure, mode, steps=3)
    assert found[0] == pytest.approx(expected, rel=1e-6)
    # At rate 0 only what is drawn differs.
    assert len({round(loss, 9) for loss, _ in found}) == 3


class Holds(nn.Linear):
    def forward(self, x):
        self.last, self.all = super().forward(x), {"here": [super().forward(x)]}
        return self.last


@pytest.mark.parametrize("mode", MODES)
def test_what_a_model_holds_after_a_step_is_tensors(mode):
    torch.manual_seed(0)
    model = Holds(4, 4).double()
    taken(model, lambda: model(X).square().mean(), mode, steps=2)
    for kept in (model.last, model.all["here"][0]):
        assert kept.shape == (4, 4) and float(kept.sum()) == pytest.approx(
            float(kept.numpy().sum())
        )
    copy.deepcopy(model)


class Tries(nn.Linear):
    """Goes on by another way where an operation fails."""

    def forward(self, x):
        y = super().forward(x)
        try:
            return y / y.norm().item()
        except RuntimeError:
            return y * 0.1


def root_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


class Writes(nn.Linear):
    def forward(self, x):
        return super().forward(x.add_(0.1))


def scaled(model):
    with torch.no_grad():
        model.weight.div_(model.weight.norm(dim=1, keepdim=True))
    return model(X).square().mean()


def by_input(model):
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x)[0].square().mean()


def given(model, how):
    weights = {name: how(p) for name, p in model.named_parameters()}
    return torch.func.functional_call(model, weights, (X,)).square().mean()


def caught(model):
    try:
        return model(X).square().mean()
    except RuntimeError:
        return torch.zeros((), dtype=torch.float64)


CASES = {
    "other weights": (lambda: nn.Linear(4, 4), lambda m: given(m, lambda p: 0.5 * p)),
    "copies of weights": (lambda: nn.Linear(4, 4), lambda m: given(m, torch.clone)),
    "detached weights": (lambda: nn.Linear(4, 4), lambda m: given(m, torch.detach)),
    "a derivative by the input": (lambda: nn.Linear(4, 4), by_input),
    "func.grad of the model": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        lambda m: m(X).mean() + torch.func.grad(lambda x: m(x).sum())(X).square().mean(),
    ),
    "func.jvp of the model": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        lambda m: torch.func.jvp(lambda x: m(x).sum(), (X,), (X,))[1],
    ),
    "vmap over a weight": (
        lambda: nn.Linear(4, 4),
        lambda m: m(X).mean() + torch.vmap(lambda w: (w > 0).sum() + w.norm())(m.weight).sum(),
    ),
    "func.grad by a weight": (
        lambda: nn.Linear(4, 4),
        lambda m: (
            torch.func.grad(lambda w: F.linear(X, w).square().mean())(m.weight).square().sum()
        ),
    ),
    "func.vjp by a weight": (
        lambda: nn.Linear(4, 4),
        lambda m: torch.func.vjp(lambda w: F.linear(X, w), m.weight)[1](X)[0].square().sum(),
    ),
    "a storage": (
        lambda: nn.Linear(4, 4),
        lambda m: m(X).mean() + sum(m.weight.untyped_storage().tolist()) * 1e-3,
    ),
    "a hook before the root": (root_norm, lambda m: m(X).square().mean()),
    "a model that goes on": (lambda: Tries(4, 4), lambda m: m(X).square().mean()),
    "a closure that goes on": (lambda: Tries(4, 4), caught),
    "a closure that writes": (lambda: nn.Linear(4, 4), scaled),
}


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
@pytest.mark.parametrize("name", list(CASES))
def test_it_is_what_weights_in_place_give(name, mode):
    make, closure = CASES[name]
    found = []
    for each in ("in_place", mode):
        torch.manual_seed(0)
        model = make().double()
        found += taken(model, lambda m=model: closure(m), each, steps=2)
    assert found[2:] == [pytest.approx(one, rel=1e-7, abs=1e-9) for one in found[:2]]


def test_a_batch_that_the_model_writes_is_not_shared():
    torch.manual_seed(0)
    model = Writes(4, 4).double()
    found = {}
    for mode in MODES:
        x = X.clone()
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[mode] = [float(opt.step(lambda x=x: model(x).square().mean())) for _ in range(2)]
    assert found["on_entry"] == pytest.approx(found["in_place"], rel=1e-9)
    # The attempt to share has written, too, and the next step shares nothing.
    assert len(found["paired"]) == 2


@pytest.mark.parametrize("options", [{"perturb": "in_place"}, {"blocks": "module"}], ids=str)
def test_autocast_around_a_step_is_autocast_in_its_closure(options):
    found = []
    for around in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        opt = zk.ZOSGD(model, lr=0.0, eps=5e-2, **options)

        def closure(model=model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(X.float()).float().square().mean()

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            opt.step(closure)
        found.append(opt.projected_gradients)
    assert found[0] == found[1] and any(found[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_step_inside_of_its_closure_is_a_sentence(mode):
    torch.manual_seed(0)
    model = nn.Linear(4, 4).double()
    before = model.weight.detach().clone()
    opt = zk.ZOSGD(model, lr=0.0, perturb=mode)

    def closure():
        opt.step(lambda: model(X).mean())
        return model(X).mean()

    with pytest.raises(RuntimeError, match="inside of its own closure"):
        opt.step(closure)
    assert torch.equal(model.weight, before)
    opt.step(lambda: model(X).mean())


@pytest.mark.parametrize("kind", ["frozen parameter", "buffer"])
def test_a_tie_by_memory_with_what_is_not_trained_is_refused(kind):
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    if kind == "buffer":
        model.register_buffer("head", model[0].weight.data[1:])
    else:
        model[1].weight.data = model[0].weight.data
        model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'0.weight' shares memory with .*in_place"):
        zk.ZOSGD(model)
    zk.ZOSGD(model, perturb="in_place").step(lambda: model(torch.arange(4)).mean())


@pytest.mark.hf
def test_blocks_beside_a_cache_run_whole():
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.2,
    )  # fmt: skip
    ids, found = torch.randint(3, 96, (2, 10)), {}

    def closure(model):
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        return model(input_ids=ids[:, 5:], past_key_values=cache).logits.logsumexp(-1).mean()

    for mode in MODES:
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config).double()
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, blocks="layer", perturb=mode)
        with pytest.warns(UserWarning, match="run whole.*from a cache"):
            opt.step(lambda m=model: closure(m))
        found[mode] = opt.projected_gradients
    assert found["on_entry"] == pytest.approx(found["in_place"], rel=1e-7)

"""A parameter wherever it is kept, and whatever a forward does with it."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_optim import MODES
from test_points import assert_all_modes_agree
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import zokernels as zk
from zokernels.estimators import derive_seed


class Tied(nn.Module):
    """A head that is the embedding, found by another way than a module's attribute."""

    def __init__(self, way):
        super().__init__()
        self.words, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)
        weight, name = self.words.weight, "a list"
        ways = {
            name: [weight],
            "a lambda": lambda h: h @ weight.t(),
            "a dict in a tuple": ({"head": weight},),
            "the module itself": lambda h: F.linear(h, self.words.weight),
        }
        object.__setattr__(self, "kept", ways[way])

    def forward(self, x):
        h = self.body(self.words(x))
        if callable(self.kept):
            return self.kept(h)
        return F.linear(h, self.kept[0] if isinstance(self.kept, list) else self.kept[0]["head"])


@pytest.mark.parametrize("way", ["a list", "a lambda", "a dict in a tuple", "the module itself"])
def test_a_weight_kept_elsewhere(way):
    torch.manual_seed(0)
    model, x = Tied(way), torch.randint(20, (4, 5))
    assert_all_modes_agree(model, lambda: F.cross_entropy(model(x).flatten(0, 1), x.flatten()))


@pytest.mark.parametrize("way", ["a list", "a lambda", "a dict in a tuple", "the module itself"])
@pytest.mark.parametrize("kind", ["module", "parameters"])
def test_a_derivative_goes_through_a_weight_kept_elsewhere(way, kind):
    torch.manual_seed(0)
    model, x = Tied(way).double(), torch.randint(20, (4, 5))
    params = list(model.parameters())

    def closure():
        penalty = sum(p.square().sum() for p in params)
        return F.cross_entropy(model(x).flatten(0, 1), x.flatten()) + 0.1 * penalty

    closure().backward()
    seed = derive_seed(3, 0, 0)
    noise = [zk.noise.gaussian(p.numel(), seed=seed, stream=i) for i, p in enumerate(params)]
    expected = sum(float((p.grad.flatten() * z).sum()) for p, z in zip(params, noise, strict=True))
    opt = zk.ForwardGrad(model if kind == "module" else params, lr=0.0, seed=3)
    opt.step(closure)
    assert opt.projected_gradients == pytest.approx([expected], rel=1e-9)


@pytest.mark.parametrize("norm", ["squares", "distance", "foreach", "stack"])
def test_a_penalty_on_parameters_that_the_closure_keeps(norm):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 8)
    params = list(model.parameters())
    start = [p.detach() + 0.1 for p in params]

    def penalty():
        if norm == "squares":
            return sum(p.square().sum() for p in params)
        if norm == "distance":
            return sum((p - p0).abs().sum() for p, p0 in zip(params, start, strict=True))
        if norm == "foreach":
            return torch.stack(torch._foreach_norm(params)).sum()
        return torch.cat([p.flatten() for p in params]).norm()

    assert_all_modes_agree(model, lambda: model(x).square().mean() + 0.3 * penalty())


class Every(nn.Module):
    """A parameter under vmap, in parametrizations, iterated over, and with an attribute."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(8, 8)
        self.stack = nn.Parameter(torch.randn(3, 8, 8))
        if kind == "weight norm":
            self.inner = weight_norm(self.inner)
        if kind == "spectral norm":
            self.inner = spectral_norm(self.inner)
        self.stack.scale = 0.5

    def forward(self, x):
        h = self.inner(x)
        if self.kind == "vmap":
            return torch.vmap(lambda w: F.linear(h, w))(self.stack).mean(0)
        if self.kind == "functional call":
            h = torch.func.functional_call(self.inner, dict(self.inner.named_parameters()), h)
        if self.kind == "iterated":
            return sum(h @ w for w in self.stack)
        return h @ self.stack[1] * self.stack.scale


KINDS = ["vmap", "weight norm", "spectral norm", "functional call", "iterated", "attribute"]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_takes_a_parameter_gets_the_perturbed_one(kind):
    torch.manual_seed(0)
    model, x = Every(kind).eval(), torch.randn(4, 8)
    shares = kind not in ("vmap", "spectral norm")
    if shares:
        assert_all_modes_agree(model, lambda: model(x).square().mean())
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slopes = []
            for mode in MODES:
                opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode)
                opt.step(lambda: model(x).square().mean())
                slopes += opt.projected_gradients
        assert slopes[1:] == pytest.approx(slopes[:1] * 2, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_flags_and_hooks_that_a_forward_sets_are_the_parameters_own(mode):
    class Sets(nn.Linear):
        def forward(self, x):
            self.bias.requires_grad_(False)
            self.weight.requires_grad = True
            self.weight.note = "mine"
            return super().forward(x)

    model = Sets(8, 8)
    zk.ZOSGD(model, lr=0.0, perturb=mode).step(lambda: model(torch.ones(2, 8)).mean())
    assert not model.bias.requires_grad and model.weight.requires_grad
    assert model.weight.note == "mine"
    assert type(model.weight) is nn.Parameter


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
def test_a_parameter_that_a_forward_replaces_stays_replaced(mode):
    class Replaces(nn.Linear):
        def forward(self, x):
            if self.weight is first:
                self.weight = second
            return super().forward(x)

    model = Replaces(8, 8)
    first, second = model.weight, nn.Parameter(torch.zeros(8, 8), requires_grad=False)
    stored = first.detach().clone()
    zk.ZOSGD(model, lr=0.0, perturb=mode).step(lambda: model(torch.ones(2, 8)).mean())
    assert model.weight is second
    assert torch.equal(first, stored) and torch.equal(second, torch.zeros(8, 8))


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
@pytest.mark.parametrize("how", ["clamp_", "data", "item", "augmented"])
def test_a_write_into_a_weight_is_said_and_thrown_away(how, mode):
    class Writes(nn.Linear):
        def forward(self, x):
            if how == "clamp_":
                self.weight.clamp_(-0.1, 0.1)
            elif how == "data":
                self.weight.data.clamp_(-0.1, 0.1)
            elif how == "item":
                self.weight[0] = 0.5
            else:
                weight = self.weight
                weight *= 0.5
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Writes(8, 8), torch.randn(4, 8)
    before = copy.deepcopy(model.state_dict())
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode)
    if how == "data":
        loss = float(opt.step(lambda: model(x).square().mean()))
    else:
        with pytest.warns(UserWarning, match="writes into the trainable parameter 'weight'"):
            loss = float(opt.step(lambda: model(x).square().mean()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # The rest of the forward sees what was written, as it does in place.
    twin = Writes(8, 8)
    twin.load_state_dict(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = zk.ZOSGD(twin, lr=0.0, eps=1e-2, perturb="in_place").step(
            lambda: twin(x).square().mean()
        )
    assert loss == pytest.approx(float(expected), abs=1e-6)


def loaded(state):
    model = nn.Linear(8, 8)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("mode", ["on_entry", "in_place"])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: loaded(pickle.loads(pickle.dumps(m.state_dict()))),
        lambda m: m.__class__(8, 8).requires_grad_(False),
    ],
    ids=["deepcopy", "saved", "another"],
)
def test_a_copy_that_a_closure_makes_is_a_module_of_its_own(copied, mode):
    torch.manual_seed(0)
    model, x, copies = nn.Linear(8, 8), torch.randn(4, 8), []

    def closure():
        twin = copied(model)
        twin.load_state_dict(model.state_dict())
        copies.append(twin)
        return model(x).square().mean() + 0.1 * twin(x).square().mean()

    zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode).step(closure)
    for twin in copies[-2:]:
        assert [type(p) for p in twin.parameters()] == [nn.Parameter] * 2
        moved = (twin.weight - model.weight).abs().max()
        assert 0 < moved < 0.1
        zk.ZOSGD(twin.requires_grad_(), lr=1e-3).step(lambda twin=twin: twin(x).square().mean())


@pytest.mark.parametrize("mode", MODES)
def test_an_embedding_that_scales_its_rows_is_named(mode):
    model, x = nn.Embedding(7, 4, max_norm=0.5), torch.arange(3)
    before = model.weight.detach().clone()
    with pytest.warns(UserWarning, match="writes (in)?to the trainable parameter 'weight'"):
        zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode).step(lambda: model(x).sum())
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_data_for_a_weight_are_refused_by_name(mode, dtype):
    class Moves(nn.Linear):
        def forward(self, x):
            self.weight.data = self.weight.data.to(dtype) * 2
            return super().forward(x.to(dtype)) if dtype is torch.float32 else x

    model = Moves(8, 8)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="'weight' other data.*outside of the closure"):
        zk.ZOSGD(model, perturb=mode).step(lambda: model(torch.ones(2, 8)).mean())
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
def test_a_perturbed_forward_inside_of_another_is_a_sentence(mode):
    model, x = nn.Linear(8, 8), torch.ones(2, 8)
    opt = zk.ZOSGD(model, perturb=mode)

    def closure():
        with zk.perturbed(model, 1, 1e-3):
            return model(x).mean()

    with pytest.raises(RuntimeError, match="inside of another one"):
        opt.step(closure)
    opt.step(lambda: model(x).mean())


class Particular(nn.Linear):
    """Wants its weight to be of a class, or to lie where it lay when the model was made."""

    def __init__(self, what):
        super().__init__(8, 8)
        self.what, self.pointer = what, self.weight.data_ptr()

    def forward(self, x):
        if self.what == "class" and type(self.weight) is not nn.Parameter:
            raise TypeError("no such weight")
        if self.what == "place" and self.weight.data_ptr() != self.pointer:
            raise RuntimeError("the weight has moved")
        return super().forward(x)


def test_a_module_that_takes_parameters_only_gets_one():
    torch.manual_seed(0)
    model, x = Particular("class"), torch.randn(4, 8)
    slopes = []
    for mode in ("in_place", "on_entry"):
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode)
        opt.step(lambda: model(x).square().mean())
        slopes += opt.projected_gradients
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)


def test_a_forward_that_only_works_with_plain_weights_is_a_sentence():
    model = Particular("place")
    with pytest.raises(RuntimeError, match="plain weights.*has moved.*perturb='in_place'"):
        zk.ZOSGD(model).step(lambda: model(torch.ones(2, 8)).mean())
    zk.ZOSGD(model, perturb="in_place").step(lambda: model(torch.ones(2, 8)).mean())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
def test_every_forward_of_a_step_takes_the_path_that_training_takes(padded, estimator):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(4, 6, 8)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, 3:] = padded
    closure = lambda: model(x, src_key_padding_mask=mask).square().mean()  # noqa: E731
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = float(closure())
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    for mode in MODES:
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-6, perturb=mode, estimator=estimator)
        assert float(opt.step(closure)) == pytest.approx(expected, rel=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()

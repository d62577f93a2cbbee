"""Operations along directions of rank one that know a structure, and those that know none."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokernels as zk
from zokernels.estimators import ESTIMATORS, derive_seed, forwards_of


def slopes(model, closure, mode, **options):
    options = dict(eps=1e-3, dist="rank1") | options
    opt = zk.ZOSGD(model, lr=0.0, seed=5, perturb=mode, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
    (perturber,) = opt._perturbers.all()
    assert getattr(perturber, "off", None) is None
    return opt


def assert_as_in_place(model, closure, whole=0, lanes=2, modes=("on_entry", "paired"), **options):
    """Every mode has the slopes of weights that are written, and makes so many matrices whole."""
    model = model.double()
    expected = slopes(model, closure, "in_place", **options).projected_gradients
    assert abs(expected[0]) > 1e-6
    for mode in modes:
        opt = slopes(model, closure, mode, **options)
        assert opt.projected_gradients == pytest.approx(expected, rel=1e-8, abs=1e-9)
        # Of a first step in paired, the first point has a forward of its own besides.
        assert opt.timing.matrices == whole * (lanes + (mode == "paired"))


class Of(nn.Module):
    """One weight, and an operation on it."""

    def __init__(self, shape, operation, bias=None):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))
        self.operation = operation

    def forward(self, x):
        return self.operation(x, self.weight, self.bias)


def inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CONVOLUTIONS = {
    "1d": ((6, 4, 3), (2, 4, 9), dict(padding=1), F.conv1d),
    "1d-strided": ((6, 4, 3), (2, 4, 9), dict(stride=2, dilation=2), F.conv1d),
    "1d-depthwise": ((4, 1, 3), (2, 4, 9), dict(groups=4, padding=2), F.conv1d),
    "1d-groups": ((6, 2, 3), (2, 4, 9), dict(groups=2), F.conv1d),
    "1d-same": ((6, 4, 3), (2, 4, 9), dict(padding="same"), F.conv1d),
    "1d-unbatched": ((6, 4, 3), (4, 9), dict(), F.conv1d),
    "2d": ((6, 4, 3, 2), (2, 4, 7, 8), dict(padding=(1, 0)), F.conv2d),
    "2d-patches": ((6, 3, 4, 4), (2, 3, 8, 8), dict(stride=4), F.conv2d),
    "2d-groups": ((6, 2, 3, 3), (2, 4, 7, 8), dict(groups=2, stride=2), F.conv2d),
    "2d-depthwise": ((8, 1, 3, 3), (2, 4, 7, 8), dict(groups=4, dilation=2), F.conv2d),
    "2d-unbatched": ((6, 4, 3, 2), (4, 7, 8), dict(), F.conv2d),
    "3d": ((6, 4, 2, 3, 2), (2, 4, 4, 5, 6), dict(padding=1), F.conv3d),
    "3d-groups": ((6, 2, 2, 2, 2), (1, 4, 4, 5, 6), dict(groups=2), F.conv3d),
}


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, has_bias):
    shape, given, place, operation = CONVOLUTIONS[kind]
    bias = shape[0] if has_bias else None
    model = Of(shape, lambda x, w, b: operation(x, w, b, **place), bias)
    x = inputs(*given)
    assert_as_in_place(model, lambda: model(x).tanh().sum())
    # And where what comes in belongs to a point.
    embedded = nn.Sequential(nn.Linear(given[-1], given[-1]), model)
    assert_as_in_place(embedded, lambda: embedded(x).tanh().sum())


PRODUCTS = {
    "linear": ((5, 7), lambda x, w, b: F.linear(x, w, b), 5),
    "linear-plain": ((5, 7), lambda x, w, b: F.linear(x, w), None),
    "matmul": ((7, 5), lambda x, w, b: x @ w + b, 5),
    "matmul-method": ((7, 5), lambda x, w, b: x.matmul(w), None),
    "addmm": ((7, 5), lambda x, w, b: torch.addmm(b, x.reshape(-1, 7), w), 5),
}


@pytest.mark.parametrize("given", [(7,), (3, 7), (2, 3, 7), (2, 2, 3, 7)], ids=str)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products(kind, given):
    shape, operation, bias = PRODUCTS[kind]
    model, x = Of(shape, operation, bias), inputs(*given)
    assert_as_in_place(model, lambda: model(x).tanh().sum())
    first = nn.Sequential(nn.Linear(7, 7), model)
    assert_as_in_place(first, lambda: first(x).tanh().sum())


def test_tables():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(20, 6, padding_idx=0)
            self.gate = nn.Linear(6, 1)
            self.table = nn.Embedding(3, 6)

        def forward(self, ids):
            x = self.words(ids)
            # Which rows are looked up here belongs to a point.
            return x + self.table((self.gate(x) > 0).long().squeeze(-1))

    torch.manual_seed(0)
    model, ids = Tables(), torch.randint(0, 20, (3, 5))
    assert_as_in_place(model, lambda: model(ids).tanh().sum())


def test_what_has_no_structure_is_made_whole_and_counted():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.mixed = nn.Parameter(torch.randn(4, 4))
            self.experts = nn.Parameter(torch.randn(3, 4, 4))
            self.bilinear = nn.Bilinear(4, 4, 2)
            self.line = nn.Parameter(torch.randn(4))

        def forward(self, x):
            x = x @ self.mixed.exp() + self.line
            x = x @ self.experts[1] + torch.einsum("bi,eij->bj", x, self.experts)
            return self.bilinear(x, x)

    model, x = Others(), inputs(5, 4)
    # An expert, then all of them, the table, and the bilinear form.
    assert_as_in_place(model, lambda: model(x).tanh().sum(), whole=4)


def test_a_mask_makes_whole_weights():
    model, x = nn.Linear(8, 8), inputs(3, 8)
    mask = zk.masks.Random(0.5, seed=3)
    assert_as_in_place(model, lambda: model(x).tanh().sum(), whole=1, mask=mask)


def test_signs_of_vectors_and_scales_of_groups():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double(), inputs(4, 7)
    groups = [
        dict(params=list(model[0].parameters()), eps=2e-3),
        dict(params=list(model[2].parameters()), eps=5e-4),
    ]
    found = {}
    for mode in ("in_place", "on_entry", "paired"):
        opt = zk.ZOSGD(
            [dict(g) for g in groups], lr=0.0, dist="rank1", seed=5, perturb=mode, model=model
        )
        opt.step(lambda: model(x).tanh().sum())
        found[mode] = opt.projected_gradients
    assert found["on_entry"] == pytest.approx(found["in_place"], rel=1e-8)
    assert found["paired"] == pytest.approx(found["in_place"], rel=1e-8)


@pytest.mark.parametrize("dist", ["gaussian", "rank1"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("points", [2, 3, 5, "all"])
def test_any_number_of_points_shares_a_forward(points, estimator, dist):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, ran = inputs(4, 7), []
    model[0].register_forward_hook(lambda *_: ran.append(1))
    options = dict(dist=dist, num_queries=4, estimator=estimator)

    def closure():
        return model(x).tanh().sum()

    expected = slopes(model, closure, "in_place", **options)
    opt = slopes(model, closure, "paired", points=points, **options)
    assert opt.projected_gradients == pytest.approx(expected.projected_gradients, rel=1e-8)
    ran.clear()
    opt.step(closure)
    count = forwards_of(estimator, 4)
    assert len(ran) == (1 if points == "all" else -(-count // points))


@pytest.mark.parametrize("bad", [1, 0, -2, 2.0, True, "every", None], ids=repr)
def test_so_many_points_there_are_not(bad):
    with pytest.raises(ValueError, match="at least 2, or 'all'"):
        zk.ZOSGD(nn.Linear(2, 2), perturb="paired", points=bad)


def test_points_belong_to_paired():
    with pytest.raises(ValueError, match="only perturb='paired'"):
        zk.ZOSGD(nn.Linear(2, 2), points=4)


def test_candidates_are_judged_as_they_would_be_written():
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    # A step that no bfloat16 weight would notice leaves the loss where it is, and so the weights.
    opt = zk.ZOSGDConservative(model, lr=1e-9, dist="rank1", perturb="on_entry")
    opt.step(lambda: model(x).float().pow(2).mean())
    assert opt.side == 0
    assert opt.timing.matrices == 2


def test_forward_gradients_have_whole_tangents():
    torch.manual_seed(0)
    model, x = nn.Linear(7, 5).double(), inputs(4, 7)
    model(x).tanh().sum().backward()
    seed = derive_seed(0, 0, 0)
    expected = sum(
        (p.grad * zk.noise.rank1(p.shape, seed=seed, stream=i)).sum().item()
        for i, p in enumerate(model.parameters())
    )
    opt = zk.ForwardGrad(model, lr=0.0, dist="rank1")
    opt.step(lambda: model(x).tanh().sum())
    assert opt.projected_gradients == pytest.approx([expected])


def test_a_context_has_vectors_too():
    torch.manual_seed(0)
    model, x = nn.Linear(7, 5).double(), inputs(4, 7)
    z = zk.noise.rank1((5, 7), seed=3, stream=0).double()
    line = zk.noise.rank1((5,), seed=3, stream=1).double()
    with torch.no_grad(), zk.perturbed(model, 3, 0.1, dist="rank1"):
        found = model(x)
    expected = F.linear(x, model.weight + 0.1 * z, model.bias + 0.1 * line)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_added_to_16_bits_is_not_lost_in_their_last_place():
    """A small ε moves an output by less than half a place: on average it is still there."""
    torch.manual_seed(0)
    model, x = nn.Linear(256, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    z = zk.noise.rank1((256, 256), seed=3, stream=0).double()
    with torch.no_grad():
        before = model(x)
        with zk.perturbed(model, 3, 1e-4, dist="rank1"):
            moved = (model(x) - before).double()
    wanted = 1e-4 * (x.double() @ z.t())
    # Its share in what was moved; a sum that rounds twice has some 0.6 of it.
    gain = (moved * wanted).sum() / wanted.pow(2).sum()
    assert gain == pytest.approx(1.0, abs=0.1)


def test_a_derivative_by_the_input_goes_through():
    torch.manual_seed(0)
    layers = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Conv1d(6, 6, 3)
    model = nn.ModuleList(layers).double()
    x = inputs(2, 6, 8)

    def closure():
        with torch.enable_grad():
            given = x.clone().requires_grad_()
            h = model[2](given) + model[0](torch.tensor([1])).unsqueeze(-1)
            y = model[1](h.transpose(1, 2)).tanh().sum()
            (slope,) = torch.autograd.grad(y, given)
        return slope.pow(2).sum()

    assert_as_in_place(model, closure, modes=("on_entry",))


# What torch.addmm and linear add beside a vector: a matrix, one number a row, one for all.
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (1, 3), (1,), (3,)], ids=str)
@pytest.mark.parametrize("mode", ["on_entry", "paired"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "given"])
def test_what_is_added_has_any_shape_that_torch_takes(shape, mode, trained):
    # In float32, which native kernels take. The loss is linear, so that eps may be large.
    model = Of((5, 3), lambda x, w, b: torch.addmm(b, x, w), shape)
    model.bias.requires_grad_(trained)
    x, y = inputs(4, 5).float(), inputs(4, 3).float()

    def closure():
        return (model(x) * y).sum()

    expected = slopes(model, closure, "in_place", eps=0.5).projected_gradients
    got = slopes(model, closure, mode, eps=0.5).projected_gradients
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_an_input_of_another_width_is_refused_as_torch_does():
    model = Of((6, 5), F.linear)
    opt = zk.ZOSGD(model, lr=0.0, dist="rank1")
    with pytest.raises(RuntimeError, match="size|shape"):
        opt.step(lambda: model(torch.ones(4, 3)).sum())

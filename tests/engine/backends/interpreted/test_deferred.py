"""Passes that read their numbers in memory, by the Triton kernels in Triton's interpreter."""

import math

import pytest
import torch
from anywhere import There
from conftest import same_bits, varied
from test_graphed import batches, loss_fn, pair
from test_ops import mask_of
from test_update import RULES, flat, states_of

import zokernels as zk
from zokernels.backends import deferred
from zokernels.backends.triton import launch
from zokernels.perturb import DeferredDirection, Direction, Move, filling
from zokernels.perturb.deferred import words

SIZES = [1, 103]
# Of the tiles that `small_groups` makes two whole ones and one that is not; and a vector.
SHAPES = [(9, 128), (5,)]


def tensors(dtype, dist):
    shapes = SHAPES if dist == "rank1" else [(n,) for n in SIZES]
    return [varied(math.prod(s), dtype, i).view(s) for i, s in enumerate(shapes)]


@pytest.fixture
def small_groups():
    """Groups of 512 elements, tiles of four rows: their interpreted programs are quick."""
    with launch.shaped(launch.Shape(64, 1)):
        yield


def prepare(call):
    """The pass that ``call`` makes, unrun, and its numbers, which are zeros."""
    found = []

    def take(backend, plan):
        numbers = torch.zeros(deferred.size(plan), dtype=torch.int64)
        found.append((deferred.Deferred(backend, plan, numbers), plan, numbers))

    with zk.ops.taking(take):
        call()
    (one,) = found
    return one


CASES = [
    (torch.float32, "gaussian", "nearest", "none"),
    (torch.bfloat16, "gaussian", "stochastic", "random"),
    (torch.bfloat16, "rademacher", "nearest", "bits"),
    (torch.float16, "gaussian", "nearest", "none"),
    (torch.float32, "rademacher", "nearest", "random"),
    (torch.float16, "rademacher", "stochastic", "none"),
    (torch.float32, "rank1", "nearest", "none"),
    (torch.bfloat16, "rank1", "stochastic", "random"),
    (torch.float16, "rank1", "nearest", "bits"),
]


@pytest.mark.parametrize("dtype, dist, rounding, mask", CASES, ids=str)
def test_one_prepared_pass_takes_one_set_of_numbers_after_another(
    dtype, dist, rounding, mask, small_groups
):
    expected = tensors(dtype, dist)
    got = [t.clone() for t in expected]
    how = dict(streams=[5, 2**32 - 1], dist=dist, mask=mask_of(mask, expected), rounding=rounding)
    one, plan, numbers = prepare(
        lambda: zk.ops.add_noise_(got, [0, 1], [1.0, 1.0], decay=0.5, backend="triton", **how)
    )
    for seeds, coeffs, decay, seed in (
        ([3, 2**64 - 1], [1e-3, -0.5], 0.75, 2**63 + 5),
        ([4, 5], [2e-38, 0.0], 1.0, 6),
    ):
        numbers.copy_(torch.tensor(deferred.words(plan, seeds, coeffs, decay, seed)))
        one.run()
        numbers[-1] = 0
        one.run()
        zk.ops.add_noise_(
            expected, seeds, coeffs, decay=decay, rounding_seed=seed, backend="reference", **how
        )
        assert all(map(same_bits, expected, got))


@pytest.mark.parametrize("dist", zk.noise.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_sides_of_a_direction_come_from_one_draw(dtype, dist):
    # A tensor of an unaligned start, one of whole groups, and ragged ends.
    p = [varied(n, dtype, i)[i:] for i, n in enumerate((103, 4097 + 512))]
    if dist == "rank1":
        p = [p[0], varied(71 * 136 + 1, dtype)[1:].view(71, 136), varied(9600, dtype).view(75, 128)]
    streams, seeds, coeffs = [5, 2**32 - 1, 0][: len(p)], [3, 2**64 - 1], [1e-3, -0.5]
    sides = [[torch.full_like(t, 7) for t in p] for _ in range(2)]
    like = Direction(p, streams, [Move((1.0, 1.0))] * len(p), seeds, dist, backend="triton")
    numbers = torch.tensor(words(seeds, coeffs))
    direction = DeferredDirection(like, [numbers], [0] * len(p))
    assert direction.can_mirror
    direction.fill(p, sides[0], range(len(p)), mirror=sides[1])
    for side, got in zip((1, -1), sides, strict=True):
        expected = [torch.empty_like(t) for t in p]
        scaled = [side * c for c in coeffs]
        zk.ops.add_noise(
            p, expected, seeds, scaled, streams=streams, dist=dist, backend="reference"
        )
        assert all(map(same_bits, expected, got))


@pytest.fixture
def few_are_small(monkeypatch):
    """Matrices of 12 × 12 are made by themselves or in windows; an interpreted program is slow."""
    monkeypatch.setattr(filling, "SMALL", 100)


class Small(torch.nn.Module):
    """A matrix, and a norm."""

    def __init__(self):
        super().__init__()
        self.matrix, self.norm = torch.nn.Linear(12, 12), torch.nn.LayerNorm(12)

    def forward(self, input_ids):
        return self.norm(self.matrix(input_ids)).square().mean(-1)


@pytest.mark.parametrize("mode", ["on_entry", "paired", "in_place"])
@pytest.mark.parametrize("mask", [None, zk.masks.Random(0.5, seed=3)], ids=["", "mask"])
def test_steps_whose_passes_were_prepared_are_those_of_the_reference(mode, mask, few_are_small):
    batch = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    weights = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = Small()
        opt = zk.ZOSGD(model, lr=0.1, perturb=mode, backend=backend, mask=mask)
        for eps, lr in ((1e-3, 0.1), (1e-2, 0.2), (1e-2, 0.05)):
            for group in opt.param_groups:
                group["eps"], group["lr"] = eps, lr
            opt.step(lambda model=model: model(input_ids=batch).mean())
        assert all(getattr(p, "off", None) is None for p in opt._perturbers.all())
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(same_bits, *weights))


def halved(model):
    model.norm.weight = torch.nn.Parameter(model.norm.weight.data.as_subclass(There))
    model.norm.bias = torch.nn.Parameter(model.norm.bias.data.as_subclass(There))
    return model


@pytest.mark.parametrize("mode", ["on_entry", "in_place"])
def test_passes_on_several_devices_are_prepared_on_each(mode, few_are_small):
    batch = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    weights = []
    for place, backend in ((lambda m: m, "reference"), (halved, "triton")):
        torch.manual_seed(0)
        model = place(Small())
        opt = zk.ZOSGD(model, lr=0.1, perturb=mode, backend=backend)
        for _ in range(2):
            losses = iter([1.5, 1.0])
            opt.step(lambda m=model, losses=losses: (m(input_ids=batch), next(losses))[1])
        weights.append([p.detach().as_subclass(torch.Tensor) for p in model.parameters()])
    assert all(map(same_bits, *weights))


class Wandering(torch.nn.Module):
    """Matrices that forwards ask for in one order or another, and one of them twice."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(3))
        self.order = [0, 1, 2, 0]

    def forward(self, input_ids):
        for i in self.order:
            input_ids = self.layers[i](input_ids).relu()
        return input_ids.square().mean(-1)


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
def test_weights_are_those_of_the_reference_in_any_order(mode, few_are_small):
    batch = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = Wandering()
        opt = zk.ZOSGD(model, lr=0.1, perturb=mode, backend=backend)
        for order in ([0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0], [2, 1, 0], [2, 0, 1, 1]):
            model.order = order
            opt.step(lambda model=model: model(input_ids=batch).mean())
        assert all(getattr(p, "off", None) is None for p in opt._perturbers.all())
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("dist", ["gaussian", "rank1"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_its_rate_from_memory(name, dist, small_groups):
    p = tensors(torch.bfloat16, dist)
    expected, states = [t.clone() for t in p], states_of(name, p, torch.bfloat16)
    wanted = [{k: t.clone() for k, t in s.items()} for s in states]
    rule = {k: v for k, v in RULES[name].items() if k != "step"}
    one, plan, numbers = prepare(
        lambda: zk.ops.apply_update_(
            p, states, seeds=[0], coeffs=[1.0], lr=1.0, dist=dist, backend="triton", **rule
        )
    )
    for seed, coeff, lr, decay in ((3, 0.5, 0.01, 0.99), (2**63, -2.0, 0.02, 1.0)):
        tail = deferred.tail(plan, decay, seed + 1, -lr)
        given = [deferred.signed(seed), deferred.bits32(coeff), *tail, 1]
        numbers.copy_(torch.tensor(given))
        one.run()
        numbers[-1] = 0
        one.run()
        zk.ops.apply_update_(
            expected, wanted, seeds=[seed], coeffs=[coeff], lr=lr, decay=decay,
            rounding_seed=seed + 1, dist=dist, backend="reference", **rule,
        )  # fmt: skip
        assert all(map(same_bits, flat(expected, wanted), flat(p, states)))


@pytest.mark.parametrize(
    "mode", ["on_entry", *(pytest.param(m, marks=pytest.mark.slow) for m in ("in_place", "paired"))]
)
def test_a_whole_step_is_the_optimizers(mode):
    one, other = pair(
        perturb=mode, width=8, dtype=torch.bfloat16, weight_decay=0.1, rounding="stochastic"
    )
    (model, opt), (twin, twin_opt) = one, other
    twin_opt.backend = "triton"
    many = batches(2)
    many[0] = many[0] | {"weight": torch.tensor(float("nan"))}
    step = zk.GraphedStep(twin_opt, loss_fn(twin), many[1], capture=False)
    for batch in many:
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch)
    step.read()
    assert all(map(same_bits, model.parameters(), twin.parameters()))
    assert opt.projected_gradients == twin_opt.projected_gradients

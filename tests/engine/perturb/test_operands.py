"""Operations as models write them: by keyword, on no rows or sparse ones, derived, in autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")

DISTS = ("gaussian", "rademacher", "rank1")


def assert_alike(model, closure, rel=1e-3, **options):
    """Every mode has the slope of weights written in place, quietly, and leaves each bit."""
    found = {}
    for mode in ("in_place", "on_entry", "paired"):
        own = copy.deepcopy(model)
        opt = zk.ZOSGD(own, lr=0.0, eps=1e-2, seed=3, perturb=mode, **options)
        opt.step(lambda own=own: closure(own))
        found[mode] = opt.projected_gradients[0]
        assert all(map(torch.equal, model.parameters(), own.parameters()))
    assert found["in_place"] != 0
    # Differences of losses that were rounded in another order.
    expected = pytest.approx(found["in_place"], rel=rel, abs=1e-4)
    assert found["on_entry"] == expected and found["paired"] == expected


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 600)


@pytest.fixture
def wide():
    """Layers that have no room for each other's weights in scratch memory."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(600, 600), nn.LayerNorm(600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(),
        nn.RMSNorm(600), nn.Linear(600, 1),
    )  # fmt: skip


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("how", ["grad", "backward", "jacobian", "sparse"])
def test_a_derivative_by_the_input_is_that_of_the_perturbed_weights(wide, x, how, dist):
    def closure(model):
        def energy(at):
            return model(at).square().sum()

        with torch.enable_grad():
            at = x.clone().requires_grad_()
            if how == "backward":
                energy(at).backward(inputs=[at])
                force = at.grad
            elif how == "jacobian":
                force = torch.autograd.functional.jacobian(energy, at)
            else:
                (force,) = torch.autograd.grad(energy(at), at)
        return 100 * force.detach().square().sum()

    assert_alike(wide, closure, dist=dist, sparsity=0.5 if how == "sparse" else None)


@pytest.mark.parametrize("dist", DISTS)
def test_a_tangent_of_the_input_goes_through_every_layer(wide, x, dist):
    def closure(model):
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(x, torch.ones_like(x)))
            return forward_ad.unpack_dual(out).tangent.square().sum()

    assert_alike(wide, closure, dist=dist)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.rand(8))
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.shift = nn.Parameter(torch.randn(8))
        self.filter = nn.Parameter(torch.randn(8, 8, 1))

    def forward(self, ids):
        h = F.embedding(input=ids, weight=self.table.weight)
        h = F.layer_norm(
            input=h, normalized_shape=(8,), weight=self.norm.weight, bias=self.norm.bias
        )
        h = F.rms_norm(input=torch.mul(input=h, other=self.scale), normalized_shape=(8,))
        h = torch.add(input=torch.matmul(input=h, other=self.mix), other=self.shift)
        h = torch.addmm(input=self.shift, mat1=h.flatten(0, 1), mat2=self.mix).view_as(h)
        h = F.conv1d(input=h.transpose(1, 2), weight=self.filter, bias=self.shift).transpose(1, 2)
        return h.tanh()


@pytest.mark.parametrize("dist", DISTS)
def test_operands_may_be_given_by_their_names(dist):
    torch.manual_seed(0)
    model, ids = Keywords(), torch.randint(0, 30, (3, 5))

    def closure(own):
        # The head is outside of the model's forward, and tied.
        logits = F.linear(input=own(ids), weight=own.table.weight)
        return F.cross_entropy(input=logits.flatten(0, 1), target=ids.flatten())

    assert_alike(model, closure, dist=dist)


class Experts(nn.Module):
    """Two experts, of which one has no rows."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, x):
        parts = [x[:0], x]
        return torch.cat([e(part) for e, part in zip(self.experts, parts, strict=True)])


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 6)])
def test_a_layer_may_get_no_rows(shape, dist):
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert_alike(Experts(), lambda own: own(x).square().mean(), dist=dist)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_inputs_are_multiplied(layout, dist):
    torch.manual_seed(0)
    dense = torch.randn(5, 12) * (torch.rand(5, 12) < 0.3)
    x = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 2))
    assert_alike(model, lambda own: own(x).square().mean(), dist=dist)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dist", DISTS)
def test_autocast_on_a_cpu_takes_every_direction(wide, x, dist, dtype):
    def closure(own):
        with torch.autocast("cpu", dtype=dtype):
            return 100 * own(x).float().square().mean()

    # Products are rounded to 16 bits, and along rank one in two parts.
    assert_alike(wide, closure, rel=0.3, dist=dist)

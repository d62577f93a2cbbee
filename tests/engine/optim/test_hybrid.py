"""Hybrid: shallow layers by zeroth order, deep layers by backpropagation."""

import functools

import pytest
import torch
from conftest import bits
from torch import nn

import zokernels as zk
from zokernels.estimators import derive_seed


class Deep(nn.Module):
    """An embedding, six equal layers, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.head = nn.Linear(8, 11)
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, x, y):
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return nn.functional.cross_entropy(self.head(h), y)


X, Y = torch.arange(22) % 11, (torch.arange(22) * 3 + 1) % 11


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def shallow_names(model, split):
    return [
        n for n, _ in model.named_parameters()
        if n.startswith("embed") or any(n.startswith(f"layers.{i}.") for i in range(split))
    ]  # fmt: skip


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("reuse", [False, True], ids=["own forward", "reused"])
def test_steps_equal_the_two_rules_side_by_side(reuse, estimator):
    model, twin, eps, lr = Deep(), Deep(), 1e-2, 0.02
    two_sided = estimator == "two_sided"
    opt = zk.HybridZO(
        model, 2, sgd, lr=lr, eps=eps, reuse_forward=reuse, estimator=estimator, seed=3
    )
    names = shallow_names(twin, 2)
    named = dict(twin.named_parameters())
    fo = sgd([p for n, p in named.items() if n not in names])
    for step in range(50):
        calls = []
        opt.step(lambda calls=calls: calls.append(1) or model(X, Y))
        assert len(calls) == (2 if reuse else 3)
        seed, stored = derive_seed(3, step, 0), {n: named[n].detach().clone() for n in names}
        z = {
            n: zk.noise.gaussian(p.numel(), seed=seed, stream=i).view_as(p)
            for i, (n, p) in enumerate(named.items())
        }

        def at(side, z=z, stored=stored):
            for n in names:
                c = torch.tensor(side * eps).double()
                named[n].data = (stored[n].double() + c * z[n].double()).float()
            return twin(X, Y)

        plus = at(1.0)
        if reuse and two_sided:
            plus.backward()
        other = at(-1.0 if two_sided else 0.0)
        if not (reuse and two_sided):
            at(0.0).backward()
        d = (plus.item() - other.item()) / (2 if two_sided else 1) / eps
        for n in names:
            c = torch.tensor(-lr * d).double()
            named[n].data = (stored[n].double() + c * z[n].double()).float()
            named[n].grad = None
        fo.step()
        fo.zero_grad()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


def test_activations_are_stored_for_the_deep_part_only():
    def stored(run):
        total = 0

        def pack(t):
            nonlocal total
            # Weights are there anyway; what backpropagation adds are activations.
            if not isinstance(t, nn.Parameter):
                total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run()
        return total

    model = Deep()
    whole = stored(lambda: model(X, Y).backward())
    model.zero_grad()
    opt = zk.HybridZO(model, 4, sgd)
    half = stored(lambda: opt.step(lambda: model(X, Y)))
    # Two of six layers, and the head.
    assert half < 0.62 * whole
    assert all(p.grad is None for p in model.parameters())


def test_a_state_dict_holds_both_parts(tmp_path):
    def run(model, opt, steps):
        for _ in range(steps):
            opt.step(lambda: model(X, Y))

    straight = Deep()
    run(straight, zk.HybridZO(straight, 3, sgd, lr=0.02, seed=4), 6)
    half = Deep()
    first = zk.HybridZO(half, 3, sgd, lr=0.02, seed=4)
    run(half, first, 3)
    torch.save(first.state_dict(), tmp_path / "opt.pt")
    second = zk.HybridZO(half, 3, sgd)
    second.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    run(half, second, 3)
    for a, b in zip(straight.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


# A reused forward makes two of the three.
@pytest.mark.parametrize(
    ("at", "reuse"), [(1, False), (2, False), (3, False), (1, True), (2, True)]
)
def test_an_exception_or_a_bad_loss_leaves_both_parts(at, reuse):
    model = Deep()
    before = {n: bits(p).clone() for n, p in model.named_parameters()}
    opt, calls = zk.HybridZO(model, 3, sgd, lr=0.1, reuse_forward=reuse), 0

    def closure(error):
        nonlocal calls
        calls += 1
        if calls == at:
            if error:
                raise KeyError
            return model(X, Y) * float("nan")
        return model(X, Y)

    with pytest.raises(KeyError):
        opt.step(lambda: closure(True))
    calls = 0
    opt.step(lambda: closure(False))
    assert opt.bad_steps == 1
    assert all(torch.equal(bits(p), before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_with_blocks_the_deep_part_takes_one_step_at_the_gradient_of_the_start(order):
    model, twin = Deep(), Deep()
    names = shallow_names(twin, 2)
    deep = [p for n, p in twin.named_parameters() if n not in names]
    opt = zk.HybridZO(
        model, 2, lambda params: torch.optim.SGD(params, lr=0.05), lr=0.3, blocks="layer",
        block_order=order,
    )  # fmt: skip
    opt.step(lambda: model(X, Y))
    assert len(opt.projected_gradients) == 3
    twin(X, Y).backward()
    torch.optim.SGD(deep, lr=0.05).step()
    for (n, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b) == (n not in names)


def test_a_gradient_that_is_not_finite_makes_a_bad_step():
    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    for reuse in (False, True):
        model = Deep()
        before = {n: bits(p).clone() for n, p in model.named_parameters()}
        opt = zk.HybridZO(model, 2, sgd, lr=0.1, reuse_forward=reuse)
        opt.step(lambda model=model: Overflowing.apply(model(X, Y)))
        assert opt.bad_steps == 1
        assert all(torch.equal(bits(p), before[n]) for n, p in model.named_parameters())


def test_the_deep_optimizer_may_be_made_already():
    model = Deep()
    names = shallow_names(model, 2)
    deep = [p for n, p in model.named_parameters() if n not in names]
    ready = sgd(deep)
    assert zk.HybridZO(model, 2, ready).fo_optimizer is ready
    for wrong, words in (
        (sgd(deep[1:]), "lacks parameter"),
        (sgd([*deep, model.embed.weight]), "holds parameter 'embed.weight'"),
        (sgd([*deep, nn.Parameter(torch.ones(1))]), "not the model's"),
    ):
        with pytest.raises(ValueError, match=words):
            zk.HybridZO(model, 2, wrong)


def test_a_predicate_splits_by_name_and_nonsense_is_refused():
    model = Deep()
    opt = zk.HybridZO(model, lambda name: "layers" in name, sgd)
    assert {id(p) for p in opt.param_groups[0]["params"]} == {
        id(p) for p in model.layers.parameters()
    }
    for split, words in ((9, "0 to 6"), (True, "0 to 6"), (lambda n: True, "deep part")):
        with pytest.raises(ValueError, match=words):
            zk.HybridZO(model, split, sgd)
    with pytest.raises(TypeError, match="needs the module"):
        zk.HybridZO(list(model.parameters()), 2, sgd)
    with pytest.raises(ValueError, match="reuse_forward"):
        zk.HybridZO(model, 2, sgd, reuse_forward=True, perturb="on_entry")
    with pytest.raises(ValueError, match="blocks and reuse_forward"):
        zk.HybridZO(model, 2, sgd, reuse_forward=True, blocks="layer")
    with pytest.raises(ValueError, match="no 'fo_optimizer'"):
        zk.HybridZO(model, 2, sgd).load_state_dict(zk.ZOSGD(model).state_dict())


def test_a_trajectory_of_it_is_not_replayed(tmp_path):
    model = Deep()
    opt = zk.HybridZO(model, 2, sgd)
    recorder = opt.record(tmp_path / "run.zk")
    opt.step(lambda: model(X, Y))
    recorder.close()
    with pytest.raises(zk.TrajectoryError, match="HybridZO"):
        zk.replay(Deep(), tmp_path / "run.zk")


@pytest.mark.parametrize("reuse", [False, True], ids=["own forward", "reused"])
def test_the_shallow_part_goes_by_any_estimate(reuse):
    model, twin = Deep(), Deep()
    options = dict(
        lr=0.02, eps=1e-2, seed=3, num_queries=3, estimator="population", normalize="std",
    )  # fmt: skip
    still = functools.partial(torch.optim.SGD, lr=0.0)
    opt = zk.HybridZO(model, 2, still, reuse_forward=reuse, **options)
    shallow = [p for n, p in twin.named_parameters() if n in shallow_names(twin, 2)]
    plain = zk.ZOSGD(shallow, model=twin, perturb="in_place" if reuse else None, **options)
    for _ in range(5):
        opt.step(lambda: model(X, Y))
        plain.step(lambda: twin(X, Y))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert not torch.equal(shallow[0], next(Deep().parameters()))

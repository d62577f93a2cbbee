"""Buffers: as they were before a step, and none is copied that no forward writes."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    "on_entry": lambda model: zk.ZOSGD(model, lr=1e-3, eps=1e-2),
    "paired": lambda model: zk.ZOSGD(model, lr=1e-3, eps=1e-2, perturb="paired"),
    "in_place": lambda model: zk.ZOSGD(model, lr=1e-3, eps=1e-2, perturb="in_place"),
    "blocks": lambda model: zk.ZOSGD(model, lr=1e-3, eps=1e-2, blocks="module"),
    "forward gradient": lambda model: zk.ForwardGrad(model, lr=1e-3),
}


class Quantised(nn.Module):
    """A frozen base in buffers, and a low-rank adapter that is trained."""

    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("packed", torch.randint(-127, 127, (width, width), dtype=torch.int8))
        self.register_buffer("scales", torch.full((width, 1), 1e-3))
        self.A = nn.Parameter(torch.randn(2, width) * 0.02)
        self.B = nn.Parameter(torch.zeros(width, 2))

    def forward(self, x):
        return F.linear(x, self.packed.float() * self.scales) + x @ self.A.T @ self.B.T


class Writing(nn.Module):
    """Writes large buffers in several ways; one of them only once it is told to."""

    def __init__(self, size=1500):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(size)
        for name in ("counted", "by_a_view", "hidden", "later", "small"):
            self.register_buffer(name, torch.zeros(3 if name == "small" else size))
        self.writes_later = False

    def forward(self, x):
        self.counted += 1
        self.small += 1
        self.by_a_view.view(30, 50)[3].add_(2)
        self.hidden.data.add_(1)
        if self.writes_later:
            torch.add(self.later, 1, out=self.later)
        # What the root's own training flag would do: statistics of each forward.
        wide = x.new_ones(len(x), self.counted.numel())
        kept = self.norm.running_mean
        F.batch_norm(wide, kept, self.norm.running_var, training=True)
        return self.layer(x).square().mean() + self.counted.mean() + self.hidden.mean()


class Copied(TorchDispatchMode):
    """Counts the bytes of packed weights that are cloned."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default and args[0].dtype is torch.int8:
            self.total += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
def test_a_base_in_buffers_is_not_copied(rule):
    torch.manual_seed(0)
    model, x = nn.Sequential(Quantised(), Quantised()), torch.randn(2, 128)
    opt = RULES[rule](model)
    with Copied() as copied:
        for _ in range(3):
            opt.step(lambda: model(x).square().mean())
    assert copied.total == 0


@pytest.mark.parametrize("rule", [r for r in RULES if r != "blocks"])
def test_what_forwards_write_is_put_back(rule):
    torch.manual_seed(0)
    model, x = Writing(), torch.randn(4, 4)
    opt, before = RULES[rule](model), {n: b.clone() for n, b in model.named_buffers()}
    for _ in range(3):
        opt.step(lambda: model(x))
        for name, b in model.named_buffers():
            assert torch.equal(b, before[name]), name


def test_a_write_that_the_first_step_did_not_see_is_named_once_and_put_back_from_then_on():
    torch.manual_seed(0)
    model, x = Writing(), torch.randn(4, 4)
    opt = zk.ZOSGD(model, lr=1e-3)
    opt.step(lambda: model(x))
    model.writes_later = True
    with pytest.warns(UserWarning, match=r"the buffer 'later' \(6000 bytes\).*stays"):
        opt.step(lambda: model(x))
    left = model.later.clone()
    assert left[0] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: model(x))
    assert torch.equal(model.later, left)


def test_a_buffer_that_joins_is_looked_at():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(4, 4)
    opt = zk.ZOSGD(model, lr=1e-3)
    opt.step(lambda: model(x).mean())
    model.append(Writing())
    model[1].writes_later = True
    model[1].requires_grad_(False)
    opt.step(lambda: model(x))
    assert all(not b.any() for n, b in model.named_buffers() if n.endswith(("later", "counted")))


class Growing(nn.Linear):
    """Writes a buffer, once it has one."""

    def forward(self, x):
        if "late" in self._buffers:
            self.late += 1
        return super().forward(x)


@pytest.mark.parametrize("rule", RULES)
def test_a_buffer_of_a_module_that_was_there_is_looked_at(rule):
    torch.manual_seed(0)
    model, x = nn.Sequential(Growing(4, 4), nn.Linear(4, 4)), torch.randn(4, 4)
    opt = RULES[rule](model)
    opt.step(lambda: model(x).square().mean())
    model[0].register_buffer("late", torch.zeros(1500))
    opt.step(lambda: model(x).square().mean())
    assert not model[0].late.any()


def test_buffers_are_put_back_when_a_forward_fails():
    torch.manual_seed(0)
    model, x = Writing(), torch.randn(4, 4)
    opt = zk.ZOSGD(model, lr=1e-3)

    def closure():
        model(x)
        raise KeyError("the batch")

    for _ in range(2):
        with pytest.raises(KeyError):
            opt.step(closure)
        assert not model.counted.any() and not model.hidden.any() and not model.small.any()


class Normed(nn.Module):
    """The root itself takes a batch's statistics, which no version of its buffers tells."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(8, size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))

    def forward(self, x):
        return F.batch_norm(self.layer(x), self.mean, self.var, training=self.training)


@pytest.mark.parametrize("size", [6, 1024, 1025])
@pytest.mark.parametrize("rule", ["on_entry", "paired", "in_place"])
def test_statistics_of_a_batch_are_put_back_whatever_their_size(rule, size):
    torch.manual_seed(0)
    model, x = Normed(size), torch.randn(4, 8)
    opt = RULES[rule](model)
    for _ in range(2):
        opt.step(lambda: (model(x) ** 3).mean())
        assert not model.mean.any() and torch.equal(model.var, torch.ones(size))


def test_a_closure_that_trains_batch_norm_leaves_its_statistics():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), torch.randn(4, 8)
    opt = zk.ZOSGD(model, lr=1e-3, eps=1e-2)

    def closure():
        model.train()
        return model(x).pow(3).mean()

    opt.step(closure)
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()


def test_a_buffer_whose_elements_share_memory_is_left_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 2)), torch.randn(4, 8)
    model.register_buffer("spread", torch.ones(1).expand(7))
    zk.ZOSGD(model, lr=1e-3, eps=1e-2).step(lambda: (model(x) * model.spread[0]).square().mean())
    assert torch.equal(model.spread, torch.ones(7))


class Making(nn.Module):
    """Its inner module makes another one in its first forward, as BigBird does."""

    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        if not hasattr(self, "made"):
            self.made = nn.Sequential(nn.Dropout(0.5)).train(self.training)
        return self.made(self.layer(x))


def test_a_module_that_a_forward_makes_trains_as_the_one_around_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(Making(), Making()), torch.randn(3, 4)
    model[1].eval()
    zk.ZOSGD(model, lr=0.0).step(lambda: model(x).square().mean())
    assert all(m.training for m in model[0].modules())
    assert not any(m.training for m in model[1].modules())

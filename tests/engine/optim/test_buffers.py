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

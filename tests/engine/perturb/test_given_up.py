"""A forward at several points that is given up halfway leaves the model as it found it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")


class Restoring(nn.Module):
    """A forward that changes the model, reads a value on the host, and takes the change back."""

    def __init__(self, change, undo):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.depth, self.stack, self.facts = 0, [], {"depth": 0}
        self.change, self.undo = change, undo

    def forward(self, x):
        self.change(self)
        h = self.first(x)
        float(h.mean())
        out = self.last(h) * (1 + self.depth + len(self.stack) + self.facts["depth"])
        self.undo(self)
        return out + len(self.last._forward_hooks)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def halve(module, _args, out):
    return out / 2


def _deeper(by):
    def change(module):
        module.depth += by
        module.facts["depth"] += by

    return change


CHANGES = {
    "attributes": (_deeper(1), _deeper(-1)),
    "a list": (lambda m: m.stack.append(1), lambda m: m.stack.pop()),
    "a module": (lambda m: m.add_module("new", nn.Linear(2, 2)), lambda m: delattr(m, "new")),
    "a hook": (
        lambda m: setattr(m, "handle", m.last.register_forward_hook(halve)),
        lambda m: m.handle.remove(),
    ),
    "a parametrization": (
        lambda m: nn.utils.parametrize.register_parametrization(m.first, "bias", Doubled()),
        lambda m: nn.utils.parametrize.remove_parametrizations(
            m.first, "bias", leave_parametrized=False
        ),
    ),
}


def step(opt, closure, told):
    """A step, and its slopes; in pairs it is told why each point has its own forward."""
    said = pytest.warns(UserWarning, match=told) if opt.perturb == "paired" else nullcontext()
    with said:
        opt.step(closure)
    return opt.projected_gradients


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_forward_would_have_taken_back_is_taken_back(change):
    torch.manual_seed(0)
    model, x = Restoring(*CHANGES[change]), torch.randn(5, 8)
    names = [name for name, _ in model.named_parameters()]
    before = model(x)
    slopes = {}
    for mode in ("on_entry", "paired"):
        own = copy.deepcopy(model)
        opt = zk.ZOSGD(own, lr=0.0, eps=1e-2, perturb=mode, num_queries=2)

        def loss(own=own):
            return own(x).square().mean()

        slopes[mode] = step(opt, loss, "goes on as 'on_entry'")
        opt.step(loss)
        slopes[mode] = slopes[mode] + opt.projected_gradients
        assert [name for name, _ in own.named_parameters()] == names
        assert type(own.first) is nn.Linear and not own.last._forward_hooks
        assert torch.equal(own(x), before)
    assert slopes["paired"] == slopes["on_entry"]


def test_a_closure_that_copies_the_model_has_one_forward_a_point():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 8)
    in_place, paired = (
        step(
            zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode),
            lambda: (model(x) * copy.deepcopy(model)(x)).mean(),
            "one forward a point: the closure copies the",
        )
        for mode in ("in_place", "paired")
    )
    assert paired == pytest.approx(in_place, rel=1e-4)

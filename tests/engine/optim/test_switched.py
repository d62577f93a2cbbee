"""A closure that switches what is trainable while it runs, as adapters are switched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    "sgd": zk.ZOSGD,
    "conservative": zk.ZOSGDConservative,
    "adam": zk.ZOAdam,
    "blocks": lambda model, **how: zk.ZOSGD(model, blocks="module", **how),
}


class Switching(nn.Module):
    """Two adapters on one layer; each forward uses both, and leaves one of them trainable."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.adapters = nn.ModuleList([nn.Linear(6, 3, bias=False) for _ in range(2)])

    def switch(self, chosen):
        for i, adapter in enumerate(self.adapters):
            adapter.requires_grad_(i == chosen)

    def forward(self, x):
        self.switch(0)
        out = self.base(x) + self.adapters[0](x)
        self.switch(1)
        return out + self.adapters[1](x).tanh()


def stepped(rule, mode):
    """Slopes, flags after each step, and whether each adapter moved in it."""
    model, x, y = Switching(), torch.linspace(-1, 1, 48).view(8, 6), torch.arange(8) % 3
    opt = RULES[rule](model, lr=1e-2, eps=1e-2, perturb=mode)
    found = []
    for _ in range(2):
        before = [a.weight.detach().clone() for a in model.adapters]
        opt.step(lambda: F.cross_entropy(model(x), y))
        moved = [not torch.equal(w, a.weight) for w, a in zip(before, model.adapters, strict=True)]
        flags = [a.weight.requires_grad for a in model.adapters]
        found.append(([round(d, 2) for d in opt.projected_gradients], moved, flags))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_what_is_trainable_as_a_step_begins_is_trained_in_it(rule):
    (_, moved, flags), (_, then, _) = stepped(rule, "in_place")
    assert moved == [True, True] and flags == [False, True]
    # The flags that the closure left are those of the next step.
    assert then == [False, True]


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_so_in_every_mode(rule, mode):
    assert stepped(rule, mode) == stepped(rule, "in_place")

"""What is said once: gradient hooks, losses that nothing changes, and passes without kernels."""

import copy
import math
import warnings

import pytest
import torch
from conftest import needs_native
from torch import nn

import zokernels as zk
from zokernels.backends import native

X, Y = torch.arange(12).reshape(4, 3) % 9, torch.arange(4) % 2


class Classifier(nn.Module):
    """Words, of which the first pads, and a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(9, 4, padding_idx=0), nn.Linear(12, 2)

    def forward(self):
        return nn.functional.cross_entropy(self.last(self.words(X).flatten(1)), Y)


def said(act):
    """What `act` warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in found if w.category is UserWarning]


def steps(opt, closure, count):
    return said(lambda: [opt.step(closure) for _ in range(count)])


HOOKS = {
    "register_hook": lambda p: p.register_hook(lambda gradient: gradient * 0),
    "register_post_accumulate_grad_hook": lambda p: p.register_post_accumulate_grad_hook(
        lambda p: p.grad.zero_()
    ),
}
KINDS = {
    "sgd": zk.ZOSGD,
    "in place": lambda m: zk.ZOSGD(m, perturb="in_place"),
    "adam": zk.ZOAdam,
    "forward gradient": zk.ForwardGrad,
    "blocks": lambda m: zk.ZOSGD(m, blocks="module"),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_hook_is_named_once(kind, hook):
    model = Classifier()
    HOOKS[hook](model.words.weight)
    opt = KINDS[kind](model)
    (message,) = [m for m in steps(opt, model, 3) if "hook" in m]
    assert "Parameter 'words.weight' has a gradient hook" in message
    assert "masks.Bits" in message and "trainable_token_indices" in message


def test_of_several_the_first_is_named_and_of_a_list_its_place():
    model = Classifier()
    for p in model.last.parameters():
        HOOKS["register_hook"](p)
    (message,) = steps(zk.ZOSGD(model), model, 1)
    assert "Parameter 'last.weight' and 1 more have a gradient hook" in message
    opt = zk.ZOSGD(list(model.parameters()), perturb="in_place")
    (message,) = steps(opt, model, 1)
    assert "Parameter 1 and 1 more" in message


def test_a_hook_that_is_gone_or_frozen_or_another_parameters_is_not_told_of():
    model = Classifier()
    HOOKS["register_hook"](model.words.weight).remove()
    HOOKS["register_hook"](model.last.bias)
    model.last.bias.requires_grad_(False)
    assert steps(zk.ZOSGD(model), model, 2) == []


def test_the_way_that_the_message_names_holds_rows_still():
    model = Classifier()
    rows = torch.zeros(9, 4, dtype=torch.bool)
    rows[6:] = True
    whole = [torch.ones_like(p, dtype=torch.bool) for p in model.last.parameters()]
    before = model.words.weight.detach().clone()
    zk.ZOSGD(model, lr=0.1, mask=zk.masks.Bits([rows, *whole])).step(model)
    moved = (model.words.weight != before).any(1)
    assert moved.tolist() == [False] * 6 + [True] * 3


def surrogate(model):
    """Always the same value; autograd finds a gradient all the same."""

    def closure():
        logp = -model()
        return -(logp - logp.detach()).exp()

    return closure


FLAT = {
    "a surrogate": surrogate,
    "a number from elsewhere": lambda model: lambda: 0.25,
    "a loss of another model": lambda model: copy.deepcopy(model),
}


@pytest.mark.parametrize("mode", ["on_entry", "paired", "in_place"])
def test_a_loss_that_only_has_a_gradient_is_told_of_at_the_fifth_step(mode):
    model = Classifier()
    closure = surrogate(model)
    closure().backward()
    assert model.words.weight.grad.abs().max() > 0
    before = [p.detach().clone() for p in model.parameters()]
    opt = zk.ZOSGD(model, lr=0.1, perturb=mode)
    quiet = [m for m in steps(opt, closure, 4) if "exactly 0" in m]
    (message,) = steps(opt, closure, 1)
    assert quiet == [] and "5 steps in a row" in message
    assert "logp - logp.detach()" in message and "eps=0.001" in message
    assert steps(opt, closure, 10) == []
    assert opt.flat_steps == 15
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("options", [{}, dict(estimator="one_sided", num_queries=3)], ids=str)
def test_every_such_loss_is_told_of(name, options):
    model = Classifier()
    opt = zk.ZOSGDMomentum(model, perturb="in_place", **options)
    (message,) = steps(opt, FLAT[name](model), 7)
    assert "trained weights" in message and opt.flat_steps == 7


def test_steps_that_move_are_not_counted_and_break_a_row():
    model = Classifier()
    opt = zk.ZOSGD(model, lr=0.1, eps=1e-2)
    for flat in (3, 4):
        assert steps(opt, surrogate(model), flat) == []
        assert steps(opt, model, 1) == []
    assert opt.flat_steps == 7
    # One query that changed the loss, and a loss that is not finite, are no flat step.
    losses = iter([1.0, 1.0, 2.0, 1.0, math.nan, math.nan])
    opt = zk.ZOSGD(model, num_queries=2)
    opt.step(lambda: model() * 0 + next(losses))
    opt.step(lambda: model() * 0 + next(losses))
    assert opt.flat_steps == 0 and opt.bad_steps == 1


def test_flat_steps_of_blocks_and_of_a_graphed_step_are_counted():
    model = Classifier()
    opt = zk.ZOSGD(model, blocks="module")
    (message,) = [m for m in steps(opt, surrogate(model), 6) if "exactly 0" in m]
    assert opt.flat_steps == 6
    opt = zk.ZOSGD(model)
    step = zk.GraphedStep(opt, lambda batch: model() * 0 + batch, torch.ones(()), capture=False)
    (message,) = said(lambda: [step(torch.ones(())) for _ in range(6)] + [step.read()])
    assert "5 steps in a row" in message and opt.flat_steps == 6


@pytest.fixture
def no_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "nowhere.so")


def test_a_step_without_native_kernels_says_why_once(no_kernels):
    model = Classifier()
    opt = zk.ZOSGD(model)
    (message,) = steps(opt, model, 3)
    assert zk.backends()["native"].reason in message
    assert "on cpu" in message and "backend='reference'" in message


def test_who_asked_for_the_reference_hears_nothing(no_kernels):
    model = Classifier()
    assert steps(zk.ZOSGD(model, backend="reference"), model, 1) == []
    # Of float64 there are no kernels at all.
    assert steps(zk.ZOSGD(model.double()), model, 1) == []


@needs_native
def test_with_native_kernels_a_step_says_nothing():
    model = Classifier()
    assert steps(zk.ZOSGD(model), model, 2) == []

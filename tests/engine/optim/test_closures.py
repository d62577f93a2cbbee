"""What a closure may return and do, and the sentence for what it may not."""

import numpy as np
import pytest
import torch
from torch import nn

import zokernels as zk

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model):
    return nn.functional.cross_entropy(model(X), Y)


class ModelOutput:
    """As a model of transformers returns it."""

    def __init__(self, loss):
        self.loss = loss


RETURNED = {
    "nothing": (lambda loss: None, "None.*`return loss`"),
    "loss and logits": (lambda loss: (loss, loss), "a tuple.*not `loss, logits`"),
    "a list": (lambda loss: [loss], "a list.*alone"),
    "a dict": (lambda loss: {"loss": loss}, r"a dict.*output\['loss'\]"),
    "a dict of others": (lambda loss: {"nll": loss}, "a dict.*the loss alone"),
    "an output": (ModelOutput, "a ModelOutput.*return output.loss"),
    "a text": (lambda loss: "0.5", "a str.*the loss alone"),
    "losses": (lambda loss: loss.expand(4, 1), r"a tensor of shape \(4, 1\).*mean"),
    "losses of numpy": (lambda loss: np.ones(4), r"a ndarray of shape \(4,\).*mean"),
    "a complex number": (lambda loss: loss * 1j, "a complex.*real part"),
}


@pytest.mark.parametrize("mode", ["on_entry", "paired", "in_place"])
@pytest.mark.parametrize("name", RETURNED)
def test_what_is_no_loss_is_refused_and_changes_nothing(name, mode):
    make, words = RETURNED[name]
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    opt = zk.ZOSGD(model, lr=0.1, perturb=mode)
    with pytest.raises(ValueError, match=f"closure returned {words}"):
        opt.step(lambda: make(loss_of(model)))
    assert all(map(torch.equal, before, model.parameters()))
    opt.step(lambda: loss_of(model))
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("kind", [zk.ForwardGrad, zk.ZOAdam, zk.ZOSGDConservative])
@pytest.mark.parametrize("returned", [None, ()], ids=str)
def test_every_rule_refuses_it(kind, returned):
    with pytest.raises(ValueError, match="The closure returned"):
        kind(net()).step(lambda: returned)


NUMBERS = {
    "float": float,
    "float32 of numpy": lambda loss: np.float32(loss.item()),
    "array of one": lambda loss: loss.detach().numpy(),
    "tensor of one element": lambda loss: loss.reshape(1, 1),
    "int": lambda loss: int(100 * loss),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_any_one_number_is_a_loss(name):
    model = net()
    opt = zk.ZOSGD(model, lr=1e-3, eps=0.1)
    assert opt.step(lambda: NUMBERS[name](loss_of(model))).item() > 0


@pytest.mark.parametrize("given", [torch.ones(()), 0.5, "loss"], ids=["tensor", "number", "text"])
def test_a_loss_in_place_of_its_closure_is_refused(given):
    kind = type(given).__name__
    with pytest.raises(TypeError, match=f"step.. got a {kind}.*the closure.*lambda"):
        zk.ZOSGD(net()).step(given)


def by_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


KINDS = {
    "sgd": zk.ZOSGD,
    "paired": lambda m: zk.ZOSGD(m, perturb="paired"),
    "in place": lambda m: zk.ZOSGD(m, perturb="in_place"),
    "forward gradient": zk.ForwardGrad,
    "hybrid": lambda m: zk.HybridZO(m, 1, by_sgd),
    "hybrid, reused": lambda m: zk.HybridZO(m, 1, by_sgd, reuse_forward=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_closure_that_calls_backward_is_told_to_leave_it_out(name):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"take backward\(\) and zero_grad\(\) out") as told:
        KINDS[name](model).step(closure)
    # torch's own words are kept, for whoever has to find the place.
    assert isinstance(told.value.__cause__, RuntimeError)
    assert all(map(torch.equal, before, model.parameters()))


def test_an_error_of_the_model_comes_through_as_it_is():
    model = net()
    with pytest.raises(RuntimeError, match="mat1 and mat2") as told:
        zk.ZOSGD(model).step(lambda: model(torch.ones(2, 7)).mean())
    assert told.value.__cause__ is None


def test_a_loss_with_a_derivative_in_it_can_be_lowered():
    # The force is the energy's gradient with respect to the input, not to a weight.
    model = net()

    def closure():
        x = X.clone().requires_grad_()
        with torch.enable_grad():
            (force,) = torch.autograd.grad(model(x).square().sum(), x)
        return (force - 1).square().mean()

    opt = zk.ZOSGD(model, lr=1e-3, eps=1e-3)
    opt.step(closure)
    assert opt.projected_gradients[0] != 0

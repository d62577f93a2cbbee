"""Models under torch.compile: in place, and the same step as without."""

import copy
import shutil

import pytest
import torch
from test_graphed import Model, batches, loss_fn

import zokernels as zk

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))),
        reason="torch.compile needs a C++ compiler on a CPU",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HOW = {
    "default": {},
    "fullgraph": dict(fullgraph=True),
    # On a CPU it compiles the same code; on CUDA it captures graphs of the model alone.
    "reduce-overhead": dict(mode="reduce-overhead"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_compiled_models_step_is_that_of_the_model(how):
    plain, many = Model().eval(), batches(4)
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, **HOW[how])
    opt = zk.ZOSGD(plain, lr=1e-2, eps=1e-2, seed=5, weight_decay=0.1, perturb="in_place")
    with pytest.warns(UserWarning, match="compiled.*in place"):
        other = zk.ZOSGD(compiled, lr=1e-2, eps=1e-2, seed=5, weight_decay=0.1)
    before = [p.clone() for p in inner.parameters()]
    for batch in many:
        expected = opt.step(lambda b=batch: loss_fn(plain)(b))
        loss = other.step(lambda b=batch: loss_fn(compiled)(b))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        # The compiler sums in another order: a loss of about 1.6 differs by some units of 2⁻²³,
        # and a slope by that over 2 ε.
        assert other.projected_gradients == pytest.approx(opt.projected_gradients, abs=1e-4)
    # The weights stay apart by lr · |d − d'| · |z| a step.
    for p, q in zip(plain.parameters(), inner.parameters(), strict=True):
        assert torch.allclose(p, q, atol=4 * 1e-2 * 1e-4 * 6)
    assert not all(map(torch.equal, before, inner.parameters()))
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew_at_each_point():
    compiled = torch.compile(Model().eval(), fullgraph=True)
    with pytest.warns(UserWarning, match="compiled"):
        opt = zk.ZOSGD(compiled, num_queries=2)
    torch._dynamo.utils.counters.clear()
    for batch in batches(3):
        opt.step(lambda b=batch: loss_fn(compiled)(b))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_in_a_captured_step():
    compiled = torch.compile(Model().eval())
    with pytest.warns(UserWarning, match="compiled"):
        opt = zk.ZOSGD(compiled, lr=1e-2, seed=5)
    twin = copy.deepcopy(compiled._orig_mod)
    same = zk.ZOSGD(torch.compile(twin), lr=1e-2, seed=5, perturb="in_place")
    step = zk.GraphedStep(opt, loss_fn(compiled), batches(1)[0], capture=False)
    for batch in batches(3):
        step(batch)
        same.step(lambda b=batch: loss_fn(same.model)(b))
    # One code, compiled from one model: the losses are the same bits.
    assert all(map(torch.equal, twin.parameters(), compiled.parameters()))
    torch._dynamo.reset()

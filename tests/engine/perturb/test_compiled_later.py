"""What torch.compile made after the optimizer, or beside the model: right numbers, and a word."""

import warnings

import pytest
import torch
from test_graphed import Model, batches, loss_fn
from torch import nn

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")


def compiled(function):
    # What is compiled is Python only: no C++ compiler is needed, and it takes no time.
    return torch.compile(function, backend="eager")


def wrapped(model):
    return loss_fn(compiled(model))


def function(model):
    return compiled(loss_fn(model))


def in_itself(model):
    model.compile(backend="eager")
    return loss_fn(model)


def one_layer(model):
    next(m for m in model.modules() if isinstance(m, nn.Linear)).compile(backend="eager")
    return loss_fn(model)


# That a model is compiled shows when a step begins, or only when the closure runs.
SHOWN = [in_itself, one_layer]
WAYS = [wrapped, function, *SHOWN]
OPTIMIZERS = {
    "sgd": zk.ZOSGD,
    "blocks": lambda model, **how: zk.ZOSGD(model, blocks="module", **how),
    "conservative": zk.ZOSGDConservative,
    "forward gradient": zk.ForwardGrad,
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def steps(way, make=zk.ZOSGD, first=0, count=3, **how):
    """Slopes, the mode after each step, and what was said."""
    model = Model().eval()
    opt = make(model, lr=1e-2, eps=1e-2, seed=5, **how)
    loss_of, slopes, modes = loss_fn(model), [], []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n, batch in enumerate(batches(count)):
            if n == first and way is not None:
                loss_of = way(model)
            opt.step(lambda b=batch, loss_of=loss_of: loss_of(b))
            slopes += opt.projected_gradients
            modes.append(opt.perturb)
    return slopes, modes, [str(w.message) for w in said if "compiled" in str(w.message)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_model_compiled_after_the_optimizer_was_made(way, rule, first):
    make = OPTIMIZERS[rule]
    expected, *_ = steps(None, make)
    slopes, modes, said = steps(way, make, first=first)
    # The backend "eager" runs the same operations; in place a product may be another than on entry.
    assert slopes == pytest.approx(expected, abs=1e-4)
    if rule != "forward gradient" or way in SHOWN:
        noticed = first if way in SHOWN else first + 1
        assert modes == ["on_entry"] * noticed + ["in_place"] * (3 - noticed)
        assert len([s for s in said if "perturbing in place" in s]) == 1


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_mode_that_was_asked_for(way, mode):
    if way in SHOWN:
        with pytest.raises(ValueError, match=f"{mode}.*compiled.*in_place"):
            steps(way, perturb=mode)
        return
    expected, *_ = steps(None, perturb=mode)
    slopes, modes, said = steps(way, perturb=mode)
    assert slopes == expected and modes == [mode] * 3
    (message,) = said
    assert "runs eagerly" in message and mode in message


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_in_place_it_stays_compiled(way):
    model, ran = Model().eval(), []

    def backend(graph, _example):
        return lambda *args: ran.append(1) or graph.forward(*args)

    call = torch.compile(model, backend=backend)
    opt = zk.ZOSGD(model, perturb="in_place")
    opt.step(lambda: loss_fn(call)(batches(1)[0]))
    assert len(ran) == 2


def test_blocks_in_place_do_not_return_layers_from_memory_to_what_is_compiled():
    found = []
    for call_of in (lambda model: model, compiled):
        torch.manual_seed(0)
        model, x = nn.Sequential(*[nn.Linear(5, 5) for _ in range(3)]), torch.linspace(0, 1, 5)
        opt = zk.ZOSGD(model, lr=1e-2, eps=1e-2, blocks="layer", perturb="in_place")
        call, slopes = call_of(model), []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                opt.step(lambda call=call, x=x: call(x).square().mean())
                slopes += opt.projected_gradients
        found.append((slopes, len([w for w in said if "run whole" in str(w.message)])))
    (expected, none), (slopes, one) = found
    assert slopes == pytest.approx(expected, abs=1e-4) and (none, one) == (0, 1)


def test_a_context_runs_what_is_compiled_eagerly():
    model, (batch,) = Model().eval(), batches(1)
    call = compiled(model)
    plain = loss_fn(call)(batch)
    with zk.perturbed(model, seed=3, scale=0.1):
        expected, found = loss_fn(model)(batch), loss_fn(call)(batch)
    assert torch.equal(found, expected) and not torch.equal(found, plain)
    assert torch.equal(loss_fn(call)(batch), plain)


def test_a_step_inside_of_a_compiled_function():
    (batch,) = batches(1)
    models = [Model().eval() for _ in range(3)]
    opts = [zk.ZOSGD(m, lr=1e-2, eps=1e-2, seed=5) for m in models]
    steps = [opts[0].step, compiled(opts[1].step), compiled(lambda c: opts[2].step(c))]
    losses = [
        float(step(lambda m=model: loss_fn(m)(batch)))
        for step, model in zip(steps, models, strict=True)
    ]
    assert losses == [losses[0]] * 3
    for model in models[1:]:
        assert all(map(torch.equal, model.parameters(), models[0].parameters()))
    assert [opt.perturb for opt in opts] == ["on_entry"] * 3


def test_an_op_inside_of_a_compiled_function():
    def noisy(w):
        w = w * 2
        zk.ops.add_noise_([w], [1], [0.5])
        return w + 1

    w = torch.linspace(-1, 1, 77)
    expected, call = noisy(w), compiled(noisy)
    assert torch.equal(call(w), expected) and torch.equal(call(w), expected)
    torch.compiler.reset()
    whole = torch.compile(noisy, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="no operation of a graph"):
        whole(w)


def test_a_captured_step_without_a_graph():
    many, models = batches(3), [Model().eval(), Model().eval()]
    calls = [models[0], compiled(models[1])]
    for model, call in zip(models, calls, strict=True):
        opt = zk.ZOSGD(model, lr=1e-2, eps=1e-2, seed=5)
        step = zk.GraphedStep(opt, loss_fn(call), many[0], capture=False)
        for batch in many:
            step(batch)
    assert all(map(torch.equal, *(m.parameters() for m in models)))

"""Forward gradients: autograd's directional derivative, from one forward."""

import weakref

import pytest
import torch
from test_on_entry import PassedBy
from test_optim import Small, batch, state, unchanged
from torch import nn

import zokernels as zk
from zokernels.estimators import derive_seed
from zokernels.perturb import tangents

SOURCES = {"module": lambda m: m, "parameters": lambda m: list(m.parameters())}


def derivative(model, closure, seed, keep=None):
    """∇L·z by backpropagation."""
    closure().backward()
    total = 0.0
    for i, p in enumerate(model.parameters()):
        if p.grad is not None:
            z = zk.noise.gaussian(p.numel(), seed=seed, stream=i).view_as(p)
            total += float((p.grad * z * (1 if keep is None else keep(p))).sum())
        p.grad = None
    return total


def families():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    small = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2)
    return {
        "opt": transformers.OPTConfig(
            num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32,
            **small,
        ),
        "llama": transformers.LlamaConfig(
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, **small
        ),
        "roberta": transformers.RobertaConfig(
            num_attention_heads=2, intermediate_size=32, max_position_embeddings=40, **small
        ),
    }  # fmt: skip


@pytest.mark.hf
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["opt", "llama", "roberta"])
def test_it_is_the_directional_derivative_of_each_family(name, source):
    import transformers

    torch.manual_seed(0)
    kind = "AutoModelForMaskedLM" if name == "roberta" else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_config(families()[name]).eval()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))

    def closure():
        return model(input_ids=ids, labels=ids).loss

    expected = [derivative(model, closure, derive_seed(7, 0, k)) for k in range(2)]
    before = state(model)
    opt = zk.ForwardGrad(SOURCES[source](model), lr=0.0, num_queries=2, seed=7)
    opt.step(closure)
    # Two ways of summing a derivative in float32: their errors are some 1e-6 of its parts.
    assert opt.projected_gradients == pytest.approx(expected, rel=1e-4)
    assert unchanged(model, before) == []


@pytest.mark.parametrize("mask", [None, zk.masks.Magnitude(0.3)], ids=["whole", "magnitude"])
@pytest.mark.parametrize("source", SOURCES)
def test_steps_equal_a_textbook_version(source, mask):
    # Tied, frozen and one-element parameters; backpropagation and the library's z, in float64.
    def make():
        return Small().double().eval()

    (x, y), (model, twin) = batch(), (make(), make())
    lr, wd, q, seed = 0.05, 0.1, 2, 11

    def loss_of(m):
        return m(x, y)

    opt = zk.ForwardGrad(
        SOURCES[source](model), lr=lr, weight_decay=wd, num_queries=q, seed=seed, mask=mask
    )
    for step in range(50):
        opt.step(lambda: loss_of(model))
        seeds = [derive_seed(seed, step, k) for k in range(q)]
        keep = None if mask is None else lambda p: p.detach().abs() <= 0.3
        slopes = [derivative(twin, lambda: loss_of(twin), s, keep) for s in seeds]
        for i, p in enumerate(twin.parameters()):
            if p.requires_grad:
                z = [zk.noise.gaussian(p.numel(), seed=s, stream=i).view_as(p) for s in seeds]
                moved = (1 - lr * wd) * p.detach() - lr * sum(
                    d * zk_ for d, zk_ in zip(slopes, z, strict=True)
                ) / q
                p.data = moved if keep is None else torch.where(keep(p), moved, p.data)
        # The model takes its loss in float32, hence slopes right to some 1e-6.
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_module_that_is_passed_by_counts():
    model, x = PassedBy(), torch.randn(2, 4, 8)
    expected = derivative(model, lambda: model(x), derive_seed(0, 0, 0))
    opt = zk.ForwardGrad(model, lr=0.0)
    opt.step(lambda: model(x))
    assert opt.projected_gradients[0] == pytest.approx(expected, rel=1e-4)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="'1.weight' is trainable"):
        zk.ForwardGrad(other, lr=0.1).step(lambda: other[0](torch.ones(3)).sum())


def test_a_tangent_lives_only_while_its_operation_runs(monkeypatch):
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(12)])
    made, most = [], 0
    directions = tangents.directions

    def noted(*args):
        found = directions(*args)
        made.extend(map(weakref.ref, found))
        return found

    def note(_module, _args, _output):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))

    monkeypatch.setattr(tangents, "directions", noted)
    for layer in model:
        layer.register_forward_hook(note)
    zk.ForwardGrad(model, lr=0.0).step(lambda: model(torch.ones(32)).sum())
    assert len(made) == 24 and most == 0


@pytest.mark.parametrize("source", SOURCES)
def test_an_exception_leaves_the_weights(source):
    # In evaluation mode, since of given parameters no module is known whose buffers to keep.
    model, (x, y) = Small().eval(), batch()
    before = state(model)

    def closure():
        model(x, y)
        raise KeyError

    opt = zk.ForwardGrad(SOURCES[source](model), lr=0.1)
    with pytest.raises(KeyError):
        opt.step(closure)
    assert unchanged(model, before) == []
    held = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    assert all(isinstance(p, nn.Parameter) for p in held)
    opt.step(lambda: model(x, y))
    assert unchanged(model, before) != []


def test_what_differences_need_changes_nothing():
    slopes, (x, y) = [], batch()
    for options in ({}, dict(eps=1e-3, estimator="two_sided"), dict(perturb="in_place")):
        model = Small().eval()
        opt = zk.ForwardGrad(model, lr=0.1, **options)
        opt.step(lambda m=model: m(x, y))
        slopes.append(opt.projected_gradients)
    assert slopes[0] == slopes[1]
    # Whole tangents enter the same products in the same order.
    assert slopes[2] == pytest.approx(slopes[0], rel=1e-6)


def test_what_cannot_work_is_said():
    model, (x, y) = Small(), batch()
    opt = zk.ForwardGrad(model, lr=0.1)
    with pytest.raises(TypeError, match="return the tensor"):
        opt.step(lambda: model(x, y).item())
    with pytest.raises(RuntimeError, match="no tangent"):
        opt.step(lambda: model(x, y).detach() * 0 + torch.ones(()))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        opt.step(lambda: model(x, y))


def test_an_operation_without_a_rule_is_named():
    class NoRule(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    layer = nn.Linear(4, 1)
    with pytest.raises(RuntimeError, match="no forward-mode derivative.*eager"):
        zk.ForwardGrad(layer, lr=0.1).step(lambda: NoRule.apply(layer(torch.ones(4))).sum())
    # A recurrent layer's CPU kernel has none either; the setting named avoids it.
    rnn, x = nn.LSTM(4, 4), torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(3))
    opt = zk.ForwardGrad(rnn, lr=0.0)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(RuntimeError, match="mkldnn.flags"):
            opt.step(lambda: rnn(x)[0].sum())
    with torch.backends.mkldnn.flags(enabled=False):
        opt.step(lambda: rnn(x)[0].sum())
    expected = derivative(
        rnn, lambda: rnn(x)[0].sum(), derive_seed(0, opt.param_groups[0]["step"] - 1, 0)
    )
    assert opt.projected_gradients[0] == pytest.approx(expected, rel=1e-4)


def test_a_compiled_model_gets_whole_tangents():
    plain, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(3)
    compiled = torch.compile(plain, backend="eager")
    with pytest.warns(UserWarning, match="compiled"):
        opt = zk.ForwardGrad(compiled, lr=0.0, seed=4)
    opt.step(lambda: compiled(x).sum())
    expected = derivative(plain, lambda: plain(x).sum(), derive_seed(4, 0, 0))
    assert opt.projected_gradients[0] == pytest.approx(expected, rel=1e-5)

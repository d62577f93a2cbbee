"""Weights that share memory are refused by name when the optimizer is made; others are not."""

import pytest
import torch
from conftest import same_bits
from torch import nn

import zokernels as zk
from zokernels import passes


def model_of(**weights):
    model = nn.Module()
    for name, w in weights.items():
        model.register_parameter(name, nn.Parameter(w))
    return model


def frozen(model, name):
    model._parameters[name].requires_grad_(False)
    return model


BASE = torch.arange(24.0).reshape(4, 6)
SHARED = {
    "expanded": (lambda: model_of(a=BASE, b=torch.ones(4, 1).expand(4, 5)), "'b' of shape"),
    "windows": (lambda: model_of(a=torch.ones(9).unfold(0, 4, 2)), "'a' of shape"),
    "transposed": (lambda: model_of(a=(w := BASE.clone()), b=w.t()), "'a' and Parameter 'b'"),
    "a row twice": (lambda: model_of(a=(w := BASE.clone())[:2], c=w[2:], b=w[1]), "'a' and .* 'b'"),
    "columns": (lambda: model_of(a=(w := BASE.clone())[:, :4], b=w[:, 3:]), "'a' and .* 'b'"),
    "another type": (
        lambda: model_of(a=(w := BASE.clone()), b=w.view(torch.bfloat16)), "'a' and .* 'b'",
    ),
}  # fmt: skip
APART = {
    "columns": lambda: model_of(a=(w := BASE.clone())[:, :4], b=w[:, 4:]),
    "every second": lambda: model_of(a=(w := BASE.clone())[:, ::2], b=w[:, 1::2], c=BASE.clone()),
    "rows": lambda: model_of(a=(w := BASE.clone())[:2], b=w[2:].t()),
    "a frozen copy": lambda: frozen(model_of(a=(w := BASE.clone()), b=w.t()), "b"),
    "frozen, expanded": lambda: frozen(model_of(a=BASE.clone(), b=torch.ones(1).expand(5)), "b"),
    "empty": lambda: model_of(a=torch.ones(0, 4), b=torch.ones(4, 0).t(), c=torch.ones(1)),
}


@pytest.mark.parametrize("case", SHARED)
def test_weights_that_share_memory_are_refused_by_name(case):
    make, message = SHARED[case]
    model = make()
    for groups in (model, [dict(params=[p]) for p in model.parameters()]):
        named = dict(model=model) if isinstance(groups, list) else {}
        with pytest.raises(
            ValueError, match=rf"Parameter {message}.*share memory.*p\.data = p\.data"
        ):
            zk.ZOSGD(groups, **named)
    with pytest.raises(ValueError, match=r"params\[\d\].*share memory"):
        zk.ZOSGD(list(model.parameters()))


@pytest.mark.parametrize("case", APART)
def test_weights_of_one_memory_that_share_no_element_are_trained(case):
    model, twin = APART[case](), APART[case]()
    for p in twin.parameters():
        p.data = p.data.contiguous().clone()
    for m in (model, twin):
        losses = iter([1.5, 1.0])
        zk.ZOSGD(m, lr=0.1, perturb="in_place").step(lambda losses=losses: next(losses))
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    trained = [(p, q) for p, q in pairs if p.requires_grad]
    assert all(same_bits(p, q) for p, q in trained)


def test_a_pass_refuses_before_it_writes_anything():
    a, b = torch.ones(4, 6).t(), torch.ones(5)
    short = zk.masks.Bits([torch.ones(6, 4).bool(), torch.ones(3).bool()])
    with pytest.raises(ValueError, match="Bits: mask"):
        passes.add_noise_([a, b], [1], [0.5], mask=short)
    with pytest.raises(ValueError, match=r"params\[1\].*strides.*share memory"):
        passes.add_noise_([a, torch.ones(1).expand(3)], [1], [0.5])
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        passes.apply_update_([a, a.t()], None, "sign", [1], [0.5], lr=0.1)
    assert bool((a == 1).all()) and bool((b == 1).all())


@pytest.mark.parametrize("mode", ["on_entry", "in_place"])
def test_weights_without_memory_are_named_before_anything_is_run(mode):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    opt = zk.ZOSGD(model, lr=0.1, perturb=mode)
    model[1].to("meta")
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'1\.weight' is trainable, but on the meta device"):
        opt.step(lambda: pytest.fail("ran a forward"))
    with pytest.raises(ValueError, match=r"'1\.weight' is trainable, but on the meta device"):
        zk.ZOSGD(model)
    # What is offloaded and frozen its own hooks bring.
    model[1].requires_grad_(False)
    opt.step(lambda losses=[1.0, 2.0]: (model[0](torch.ones(1, 3)), losses.pop())[1])
    assert not torch.equal(model[0].weight, before)

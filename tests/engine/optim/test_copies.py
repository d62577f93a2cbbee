"""Copies of an optimizer, alone and with its model: each steps as the original would, and apart."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import bits
from torch import nn

import zokernels as zk

X = torch.arange(21) % 7


class Layers(nn.Module):
    """An embedding, two layers, a frozen one, and a head that is tied."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.extra = nn.Linear(6, 6)

    def forward(self, x):
        h = self.embed(x)
        for layer in [*self.layers, self.frozen, self.extra]:
            h = h + layer(h).tanh()
        return nn.functional.cross_entropy(self.head(h), (3 * x + 1) % 7)


def through_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": through_file,
}


def by_adam(params):
    return torch.optim.AdamW(params, lr=0.01)


def some_bits(model):
    generator = torch.Generator().manual_seed(8)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    return zk.masks.Bits([torch.rand(s, generator=generator) < 0.7 for s in shapes])


MADE = {
    "sgd": lambda m, **kw: zk.ZOSGD(m, **kw),
    "paired": lambda m, **kw: zk.ZOSGD(m, perturb="paired", **kw),
    "in place, of a list": lambda m, **kw: zk.ZOSGD(list(m.parameters()), perturb="in_place", **kw),
    "bits": lambda m, **kw: zk.ZOSGD(m, mask=some_bits(m), **kw),
    "sparse": lambda m, **kw: zk.ZOSGD(m, sparsity=0.3, resample_every=2, **kw),
    "blocks": lambda m, **kw: zk.ZOSGD(m, blocks=lambda name: name.split(".")[0], **kw),
    "layers": lambda m, **kw: zk.ZOSGD(m, blocks="layer", **kw),
    "sign": lambda m, **kw: zk.ZOSGDSign(m, rounding="stochastic", **kw),
    "momentum": lambda m, **kw: zk.ZOSGDMomentum(m, **kw),
    "window": lambda m, **kw: zk.ZOSGDMomentum(m, window=3, **kw),
    "conservative": lambda m, **kw: zk.ZOSGDConservative(m, **kw),
    "adam": lambda m, **kw: zk.ZOAdam(m, amsgrad=False, bias_correction=True, **kw),
    "half states": lambda m, **kw: zk.ZOAdam(m, state_dtype=torch.bfloat16, **kw),
    "forward gradient": lambda m, **kw: zk.ForwardGrad(m, **kw),
    "hybrid": lambda m, **kw: zk.HybridZO(m, 1, by_adam, **kw),
}


def run(opt, model, steps):
    """The losses, and all that the steps wrote."""
    losses = [opt.step(lambda: model(X)).item() for _ in range(steps)]
    return losses, [bits(p).clone() for p in model.parameters()]


def same(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MADE)
def test_a_copy_with_its_model_steps_as_the_original_and_leaves_it_alone(name, way):
    model = Layers()
    opt = MADE[name](model, lr=0.02, eps=1e-2, num_queries=2, seed=3)
    run(opt, model, 2)
    twin, copied = WAYS[way]((model, opt))
    held = {id(p) for p in twin.parameters()}
    assert all(id(p) in held for g in copied.param_groups for p in g["params"])
    assert twin.head.weight is twin.embed.weight
    before = [bits(p).clone() for p in model.parameters()]
    ahead = run(copied, twin, 3)
    assert all(map(torch.equal, before, map(bits, model.parameters())))
    assert not all(map(torch.equal, before, ahead[1]))
    assert same(run(opt, model, 3), ahead)
    assert copied.projected_gradients == opt.projected_gradients


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_alone_brings_its_model(way):
    model = Layers()
    opt = zk.ZOAdam(model, lr=0.02)
    run(opt, model, 1)
    copied = WAYS[way](opt)
    assert copied.model is not model
    assert same(run(copied, copied.model, 2), run(opt, model, 2))


def test_a_copy_of_a_scheduled_optimizer_steps_itself():
    model = Layers()
    opt = zk.ZOSGD(model, lr=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.5, total_iters=4)
    opt.step(lambda: model(X))
    schedule.step()
    twin, copied = copy.deepcopy((model, opt))
    before = [bits(p).clone() for p in model.parameters()]
    ahead = run(copied, twin, 2)
    assert all(map(torch.equal, before, map(bits, model.parameters())))
    assert same(run(opt, model, 2), ahead)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_join_a_copy_as_they_would_join_the_original(way):
    model = Layers()
    model.extra.requires_grad_(False)
    late = dict(lr=0.03, blocks=[0, 0])
    opt = zk.ZOSGD(model, lr=0.02, blocks=lambda name: name.split(".")[0])
    twin, copied = WAYS[way]((model, opt))
    for m, o in ((model, opt), (twin, copied)):
        m.extra.requires_grad_(True)
        o.add_param_group({"params": list(m.extra.parameters()), **late})
    assert opt.param_groups[1]["streams"] == copied.param_groups[1]["streams"] == [7, 8]
    assert same(run(copied, twin, 2), run(opt, model, 2))


def test_a_copy_loads_and_gives_a_state_dict_as_its_original_does():
    model = Layers()
    opt = zk.ZOAdam(model, lr=0.02)
    run(opt, model, 1)
    twin, copied = copy.deepcopy((model, opt))
    assert copied.state_dict().keys() == opt.state_dict().keys()
    names = [set(g) for g in opt.param_groups]
    copied.load_state_dict(opt.state_dict())
    assert [set(g) for g in copied.param_groups] == names
    assert same(run(copied, twin, 2), run(opt, model, 2))


def test_a_copy_does_not_write_to_the_log_and_says_so(tmp_path):
    model = Layers()
    base = copy.deepcopy(model)
    opt = zk.ZOSGD(model, lr=0.02)
    opt.record(tmp_path / "run")
    opt.step(lambda: model(X))
    with pytest.warns(UserWarning, match="does not record.*copy.record"):
        twin, copied = copy.deepcopy((model, opt))
    assert copied.trajectory is None
    run(copied, twin, 2)
    end = run(opt, model, 2)
    opt.trajectory.close()
    replayed = zk.replay(base, tmp_path / "run")
    assert all(map(torch.equal, end[1], map(bits, replayed.parameters())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(copied)


def test_processes_are_shared_by_a_copy_and_refused_by_a_file():
    model = Layers()
    opt = zk.ZOSGD(model)
    # What `Distributed` is in a run of two processes, but for the group that connects them.
    opt.parallel._set(0, 2, 2, 1, None, 0)
    assert copy.deepcopy(opt).parallel is opt.parallel
    with pytest.raises(TypeError, match="2 processes.*state_dict"):
        pickle.dumps(opt)

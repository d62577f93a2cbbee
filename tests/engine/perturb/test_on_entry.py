"""What a forward sees on entry: modules passed by, compiled ones, and the scratch it needs."""

import warnings

import pytest
import torch
from test_optim import APART, MODES, Small, batch, state, unchanged
from torch import nn

import zokernels as zk


class PassedBy(nn.Module):
    """Uses a child's weights without entering the child, as MultiheadAttention does."""

    def __init__(self):
        super().__init__()
        self.block = nn.MultiheadAttention(8, 2, batch_first=True)
        self.view = nn.Parameter(torch.randn(4, 8))
        self.pick = Pick()

    def forward(self, x):
        h = self.block(x, x, x, need_weights=False)[0]
        return ((h + self.view[: x.shape[1]]) * self.pick()[: x.shape[1]]).square().mean()


class Pick(nn.Module):
    """Returns a view of its own parameter, which outlives the module's forward."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self):
        return self.table[:5]


def test_modules_passed_by_and_views_of_weights_are_perturbed_on_entry():
    x, results = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2)), []
    for mode in MODES:
        torch.manual_seed(0)
        model = PassedBy().train()
        opt = zk.ZOSGD(model, lr=0.01, perturb=mode)
        losses = [opt.step(lambda m=model: m(x)).item() for _ in range(3)]
        results.append((losses, state(model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])


def test_a_module_never_entered_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = zk.ZOSGD(model, lr=0.1, perturb="on_entry")
    before = state(model)
    with pytest.raises(RuntimeError, match="'1.weight'.*in_place"):
        opt.step(lambda: model[0](torch.ones(3)).sum())
    assert unchanged(model, before) == []


def test_a_compiled_module_switches_to_in_place_with_one_message():
    model = torch.compile(nn.Linear(3, 1), backend="eager")
    with pytest.warns(UserWarning, match="compiled"):
        opt = zk.ZOSGD(model, lr=0.1)
    assert opt.perturb == "in_place"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: model(torch.ones(3)).sum())
    assert opt.projected_gradients[0] != 0
    with pytest.raises(ValueError, match="compiled"):
        zk.ZOSGD(model, perturb="on_entry")


@pytest.mark.parametrize("mode", APART)
def test_perturbed_shows_the_model_elsewhere_and_restores(mode):
    model, (x, y) = Small().eval(), batch()
    before, base = state(model), model(x, y)
    with zk.perturbed(model, 7, 0.05, perturb=mode):
        moved = model(x, y)
    with pytest.raises(KeyError), zk.perturbed(model, 7, 0.05, perturb=mode):
        model(x, y)
        raise KeyError
    twin = Small().eval()
    for i, p in enumerate(twin.parameters()):
        if p.requires_grad:
            zk.ops.add_noise_([p], [7], [0.05], streams=[i])
    assert torch.equal(moved, twin(x, y)) and not torch.equal(moved, base)
    assert unchanged(model, before) == []


def test_on_entry_needs_scratch_for_the_largest_layer_only():
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(12)])
    x = torch.ones(1, 512)
    with zk.perturbed(model, 1, 1e-3, perturb="on_entry"), torch.no_grad():
        model(x)
        model(x)
        with torch.profiler.profile(profile_memory=True) as profile:
            model(x)
    held = sum(e.self_cpu_memory_usage for e in profile.key_averages())
    assert held < 4 * 512 * 16

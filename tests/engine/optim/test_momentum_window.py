"""Momentum over a window of past directions, which has no state but plain numbers."""

import pytest
import torch
from test_optim import state, unchanged
from test_rules import Odd, check
from textbook import Textbook, fma, times
from torch import nn

import zokernels as zk
from zokernels.estimators import derive_seed


def remade(window):
    """The textbook's momentum from the last gradients' parts, oldest first."""

    def rule(w, d, z, h, state, t):
        past = state.setdefault("past", [])
        past.append((d, z))
        del past[:-window]
        acc = times(1 - h["lr"] * h["weight_decay"], w)
        for age, (d_then, z_then) in zip(range(len(past) - 1, -1, -1), past, strict=True):
            for dk, zk_ in zip(d_then, z_then, strict=True):
                acc = fma(-h["lr"] * h["beta"] ** age * (dk / len(d)), zk_, acc)
        return acc, {}

    return rule


@pytest.mark.parametrize(
    "window, dtype",
    [(1, torch.float32), (5, torch.float32), (5, torch.float64), (True, torch.float32)],
)
def test_steps_with_a_window_equal_the_textbook(window, dtype):
    h = dict(lr=0.003, eps=3e-3, weight_decay=0.07, beta=0.8)
    common = dict(seed=12, estimator="two_sided", dist="gaussian", maximize=True)
    model, twin = Odd(dtype), Odd(dtype)
    opt = zk.ZOSGDMomentum(model, num_queries=2, window=window, **h, **common)
    assert opt.param_groups[0]["window"] == (32 if window is True else window)
    params = [(i, p, h) for i, p in enumerate(twin.parameters()) if p.requires_grad]
    rule = remade(32 if window is True else window)
    steps = 50 if dtype is torch.float32 else 15
    check(opt, model, Textbook(rule, params, twin, q=2, **common), twin, steps)
    assert not opt.state


def test_what_a_window_drops_is_beta_to_the_w_of_the_momentum():
    # On a linear loss the estimates do not depend on where the weights are.
    slope = torch.linspace(-1, 2, 30, dtype=torch.float64)
    beta, window, lr, steps = 0.9, 7, 0.01, 25
    ends, m_of = [], []
    for kind in (None, window, steps):
        theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        opt = zk.ZOSGDMomentum([theta], lr=lr, eps=0.5, beta=beta, window=kind)
        for _ in range(steps):
            opt.step(lambda theta=theta: theta @ slope)
            if kind is None:
                m_of.append(opt.state[theta]["m"].clone())
        ends.append(theta.detach())
    dropped = -lr * beta**window * sum(m_of[: steps - window])
    # Roundings of binary64, a few hundred of them.
    assert torch.allclose(ends[0] - ends[1], dropped, rtol=1e-9, atol=1e-12)
    assert dropped.abs().max() > 1e-3
    assert torch.allclose(ends[0], ends[2], rtol=1e-9, atol=1e-12)


def test_a_window_resumes_from_plain_numbers_bit_for_bit(tmp_path):
    kw = dict(lr=0.01, seed=2**64 - 1, num_queries=2, sparsity=0.3, resample_every=5)
    model = Odd(torch.bfloat16)
    start = state(model)
    opt = zk.ZOSGDMomentum(model, window=4, rounding="stochastic", **kw)
    for _ in range(3):
        opt.step(model)
    taken = opt.state_dict()
    torch.save(taken, tmp_path / "opt.pt")
    twin = Odd(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    resumed = zk.ZOSGDMomentum(twin, rounding="nearest")
    resumed.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    kept = []
    for _ in range(5):
        assert torch.equal(opt.step(model), resumed.step(twin))
        kept.append(history_of(opt.param_groups[0]))
    assert unchanged(twin, state(model)) == [] and unchanged(model, start) != []
    # The fifth step ends the first mask, and the sixth begins with its own directions.
    assert kept == [4, 4, 1, 2, 3] and history_of(taken["param_groups"][0]) == 3


def history_of(group):
    (of_all,) = group["history"]
    return len(of_all["steps"])


def test_a_parameter_that_joins_has_no_part_in_directions_from_before():
    model, x = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)]), torch.ones(4)
    for p in model[0].parameters():
        p.requires_grad_(False)
    groups = [{"params": list(model.parameters())}]
    opt, twin = zk.ZOSGDMomentum(groups, lr=0.1, window=8), []
    for step in range(6):
        if step == 3:
            model.requires_grad_(True)
            before = model[0].weight.detach().clone()
        opt.step(lambda: model[1](model[0](x)).square().sum())
        twin.append(opt.projected_gradients[0])
        if step == 3:
            z = zk.noise.gaussian(16, seed=derive_seed(0, 3, 0), stream=0).view(4, 4)
            assert torch.allclose(model[0].weight, before - 0.1 * twin[3] * z, atol=1e-6)
    assert history_of(opt.param_groups[0]) == 3

"""ε on a schedule: torch's own, moving ``eps`` and nothing else."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import zokernels as zk


def made(**options):
    model = nn.Linear(3, 2)
    groups = [dict(params=[model.weight], eps=4e-3), dict(params=[model.bias])]
    return model, zk.ZOSGD(groups, lr=1e-3, eps=1e-3, model=model, **options)


def scales(opt):
    return [g["eps"] for g in opt.param_groups]


def test_it_moves_what_torchs_schedule_would_move():
    model, opt = made()
    theirs = torch.optim.SGD([dict(params=[p], lr=lr) for p, lr in zip(
        model.parameters(), (4e-3, 1e-3), strict=True
    )])  # fmt: skip
    falling, rates = zk.EpsSchedule(opt, CosineAnnealingLR, T_max=7), CosineAnnealingLR(theirs, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            seen = scales(opt)
            opt.step(lambda: model(torch.ones(1, 3)).sum())
            theirs.step()
            falling.step(), rates.step()
            assert scales(opt) == rates.get_last_lr() == falling.get_last_eps() != seen
    assert [g["lr"] for g in opt.param_groups] == [1e-3, 1e-3]


def test_one_that_follows_a_metric():
    _, opt = made()
    falling = zk.EpsSchedule(opt, ReduceLROnPlateau, factor=0.5, patience=1)
    for _ in range(3):
        falling.step(1.0)
    assert scales(opt) == falling.get_last_eps() == [2e-3, 5e-4]
    _, other = made()
    again = zk.EpsSchedule(other, ReduceLROnPlateau, factor=0.5, patience=1)
    again.load_state_dict(falling.state_dict())
    falling.step(1.0), falling.step(1.0), again.step(1.0), again.step(1.0)
    assert scales(other) == scales(opt) == [1e-3, 2.5e-4]


def test_a_function_may_make_it_and_it_begins_at_once():
    _, opt = made()
    zk.EpsSchedule(
        opt, lambda eps: SequentialLR(eps, [LinearLR(eps, 0.5), LinearLR(eps, 1.0, 0.1)], [5])
    )
    assert scales(opt) == [2e-3, 5e-4]


def test_the_difference_is_taken_at_the_scale_of_the_step():
    model, opt = made()
    falling = zk.EpsSchedule(opt, LambdaLR, lr_lambda=lambda n: 0.5**n)
    seen = []
    for _ in range(3):
        losses = []
        before = model.bias.detach().clone()
        opt.step(lambda losses=losses: losses.append(model(torch.ones(1, 3)).sum()) or losses[-1])
        d = (float(losses[0]) - float(losses[1])) / 2
        seen.append(d / opt.projected_gradients[0])
        falling.step()
        assert not torch.equal(before, model.bias)
    assert seen == pytest.approx([4e-3, 2e-3, 1e-3])


def test_it_goes_on_where_it_was():
    model, opt = made()
    falling = zk.EpsSchedule(opt, LinearLR, start_factor=1.0, end_factor=0.1, total_iters=10)
    for _ in range(4):
        opt.step(lambda: model(torch.ones(1, 3)).sum())
        falling.step()
    saved = (opt.state_dict(), falling.state_dict())
    _, other = made()
    other.load_state_dict(saved[0])
    again = zk.EpsSchedule(other, LinearLR, start_factor=1.0, end_factor=0.1, total_iters=10)
    again.load_state_dict(saved[1])
    for schedule in (falling, again):
        schedule.step()
    assert scales(opt) == scales(other) == pytest.approx([4e-3 * 0.55, 1e-3 * 0.55])


def test_a_run_with_one_is_gone_on_with_from_its_log(tmp_path):
    def run(path, stop):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        opt = zk.ZOSGD(model, lr=0.1, eps=1e-2)
        falling = zk.EpsSchedule(opt, LambdaLR, lr_lambda=lambda n: 0.5**n)
        opt.record(path)
        for _ in range(stop):
            opt.step(lambda: model(torch.ones(1, 3)).square().sum())
            falling.step()
        opt.trajectory.close()
        return model

    straight = run(tmp_path / "whole", 6)
    run(tmp_path / "half", 3)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = zk.ZOSGD(model, lr=0.1, eps=1e-2)
    opt.resume(tmp_path / "half")
    falling = zk.EpsSchedule(opt, LambdaLR, lr_lambda=lambda n: 0.5 ** (n + 3))
    for _ in range(3):
        opt.step(lambda: model(torch.ones(1, 3)).square().sum())
        falling.step()
    assert torch.equal(model.weight, straight.weight)


def test_what_is_no_schedule_is_refused():
    _, opt = made()
    with pytest.raises(TypeError, match="schedule made a float, but it must be one of"):
        zk.EpsSchedule(opt, lambda eps: 0.1)
    falling = zk.EpsSchedule(opt, LinearLR)
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match="is of 2 param groups, but the optimizer has 3"):
        falling.step()

"""A run that was taken elsewhere between two recorded steps is refused, and its log stays whole."""

import copy

import pytest
import torch
from torch import nn

import zokernels as zk

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def begun(path, steps=2, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    opt = zk.ZOSGD(model, lr=1e-2, eps=1e-2, **options)
    opt.record(path)
    for _ in range(steps):
        opt.step(lambda: loss(model))
    return model, opt


def loss(model):
    return model(X.to(model[0].weight.dtype)).float().square().mean()


def test_going_back_by_a_state_dict_is_refused_and_the_log_stays_whole(tmp_path):
    path = tmp_path / "run.zk"
    model, opt = begun(path)
    kept, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    for _ in range(2):
        opt.step(lambda: loss(model))
    four = copy.deepcopy(model.state_dict())
    opt.load_state_dict(kept)
    model.load_state_dict(weights)
    with pytest.raises(zk.TrajectoryError, match="Step 2 can't follow.*until=2"):
        opt.step(lambda: loss(model))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    opt.trajectory.close()
    torch.manual_seed(0)
    again = zk.replay(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), path)
    assert all(torch.equal(v, four[k]) for k, v in again.state_dict().items())


def test_weights_of_another_type_are_refused(tmp_path):
    model, opt = begun(tmp_path / "run.zk")
    model.bfloat16()
    with pytest.raises(
        zk.TrajectoryError, match="'0.weight' was turned from .*float32 to .*bfloat16"
    ):
        opt.step(lambda: loss(model))


@pytest.mark.parametrize("blocks", [None, "module"], ids=str)
def test_a_resume_compares_blocks(tmp_path, blocks):
    path = tmp_path / "run.zk"
    _, opt = begun(path, blocks=blocks)
    opt.trajectory.close()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    other = zk.ZOSGD(model, lr=1e-2, eps=1e-2, blocks="module" if blocks is None else None)
    with pytest.raises(zk.TrajectoryError, match="blocks is"):
        other.resume(path)
    same = zk.ZOSGD(model, lr=1e-2, eps=1e-2, blocks=blocks)
    same.resume(path).close()

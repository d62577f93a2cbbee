"""A log is the same wherever and however the weights lie, and so are the weights it makes."""

import subprocess
import sys

import pytest
import torch
from anywhere import LAYOUTS, Net, plain
from conftest import same_bits
from tiny import environment

import zokernels as zk

RULES = {
    "sgd": (zk.ZOSGD, dict(mask=zk.masks.Magnitude(0.2), weight_decay=0.1)),
    "adam": (zk.ZOAdam, dict(bias_correction=True, num_queries=2)),
    "momentum": (zk.ZOSGDMomentum, dict(sparsity=0.2, state_dtype=torch.bfloat16)),
    "rank1": (zk.ZOSGD, dict(dist="rank1", num_queries=2)),
    "rank1, adam": (zk.ZOAdam, dict(dist="rank1", mask=zk.masks.Random(0.6, 3))),
}


def make(model, rule):
    kind, own = RULES[rule]
    rounding = "stochastic" if model.norm.weight.dtype is torch.bfloat16 else "nearest"
    return kind(model, lr=0.03, eps=0.01, perturb="in_place", rounding=rounding, **own)


def run(opt, steps=range(5)):
    for t in steps:
        losses = iter([1.5, 1.25 - 0.125 * t, 0.5, 0.25])
        opt.step(lambda losses=losses: next(losses))


def assert_equal(model, twin):
    assert all(map(same_bits, map(plain, model.parameters()), map(plain, twin.parameters())))


@pytest.mark.parametrize("rule, dtype", [
    ("sgd", torch.float32), ("adam", torch.float32), ("momentum", torch.bfloat16),
    ("rank1", torch.bfloat16), ("rank1, adam", torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("where", LAYOUTS)
def test_a_run_is_recorded_replayed_and_resumed_wherever_it_lies(where, rule, dtype, tmp_path):
    place = LAYOUTS[where]
    for name, model in (("here", Net(dtype)), ("there", place(Net(dtype)))):
        opt = make(model, rule)
        log = opt.record(tmp_path / name)
        run(opt)
        log.close()
        last = model
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    for name, base in (("there", Net(dtype)), ("here", place(Net(dtype)))):
        assert_equal(zk.replay(base, tmp_path / name, chunk=2), last)
    # From a log of elsewhere, two steps short of its end.
    model = place(Net(dtype))
    opt = make(model, rule)
    log = opt.resume(tmp_path / "here", until=3)
    run(opt, range(3, 5))
    log.close()
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    assert_equal(model, last)


def test_a_replay_names_weights_that_share_memory(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(4, 3))]
    opt = zk.ZOSGD(weights, lr=0.1)
    log = opt.record(tmp_path / "run")
    run(opt, [0])
    log.close()
    shared = torch.ones(3, 4)
    with pytest.raises(zk.TrajectoryError, match="'0' and Parameter '1' share memory"):
        zk.replay([shared, shared.t()], tmp_path / "run")
    assert bool((shared == 1).all())


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
import torch
import zokernels as zk
made = []
for part in ("recorded", "replayed"):
    torch.manual_seed(0)
    made.append(torch.nn.Linear(5, 3))
opt = zk.ZOSGD(made[0], lr=0.1, seed=3)
log = opt.record(sys.argv[1])
for _ in range(3):
    opt.step(lambda: made[0](torch.ones(2, 5)).square().mean())
log.close()
start = made[1].weight.detach().clone()
zk.replay(made[1], sys.argv[1])
assert all(map(torch.equal, made[0].parameters(), made[1].parameters()))
assert not torch.equal(made[1].weight, start)
"""


def test_a_run_is_recorded_and_replayed_where_there_is_no_numpy(tmp_path):
    # Torch does without it, and so does an install of the engine alone.
    command = [sys.executable, "-c", WITHOUT_NUMPY, str(tmp_path / "run.zk")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

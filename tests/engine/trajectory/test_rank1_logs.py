"""Runs along directions of rank one, from their logs alone."""

import copy
import json
import struct

import pytest
import torch
from anywhere import Net
from test_noise_rank1 import element
from test_replay import TOKENS
from test_replay import Net as Words
from test_trajectory import equal, weights
from torch import nn

import zokernels as zk
from zokernels import noise, passes
from zokernels.estimators import derive_seed


def test_the_documents_are_enough_to_replay_a_run_without_this_package(tmp_path):
    """Reads the file by docs/reliability.md, and makes z by docs/noise.md, in Python's integers."""
    model = Net()
    base = copy.deepcopy(model)
    opt = zk.ZOSGD(model, lr=0.02, eps=0.01, seed=5, dist="rank1", weight_decay=0.1)
    opt.record(tmp_path / "run")
    for _ in range(2):
        opt.step(lambda: model().square().mean())
    opt.trajectory.close()
    data, at, frames = (tmp_path / "run").read_bytes(), 8, []
    while at < len(data):
        kind, length, _ = struct.unpack_from("<cII", data, at)
        frames.append((kind, data[at + 9 : at + 9 + length]))
        at += 9 + length + 4
    header = json.loads(frames[0][1])
    (described,) = [json.loads(payload) for kind, payload in frames if kind == b"P"]
    assert described["dist"] == "rank1" and described["parameters"] == list(range(9))
    found = [p.detach().clone().flatten() for p in base.parameters()]
    steps = [payload for kind, payload in frames if kind == b"S"]
    for payload in steps:
        number, passes_, of, flags, queries, decay, c = struct.unpack("<QHHBHff", payload)
        assert (passes_, of, flags, queries) == (1, 0, 0, 1)
        seed = derive_seed(header["seed"], number, 0)
        for p, w in zip(header["parameters"], found, strict=True):
            # Two or three dimensions: the last is the columns; from four on, the first the rows.
            *_, last = 0, *p["shape"]
            columns = {1: 0, 2: last, 4: w.numel() // p["shape"][0]}[len(p["shape"])]
            z = [element(i, columns, seed, p["stream"]) for i in range(len(w))]
            # A sign times c, and one sum: binary32 rounds both as an fma would.
            w.copy_(decay * w + torch.tensor(z, dtype=torch.float32) * c)
    assert len(steps) == 2
    assert equal(found, [p.flatten() for p in weights(model)])
    assert not equal(found, [p.flatten() for p in weights(base)])


def test_groups_with_distributions_of_their_own(tmp_path):
    model = Words()
    base = copy.deepcopy(model)
    groups = [
        {"params": [model.embed.weight, model.scale], "lr": 0.01, "dist": "rank1"},
        {"params": [model.middle.weight], "lr": 0.1, "dist": "gaussian"},
        {"params": [model.middle.bias], "lr": 0.1, "dist": "rademacher", "mask": None},
    ]
    opt = zk.ZOSGDMomentum(groups, seed=9, eps=1e-2, num_queries=2)
    opt.record(tmp_path / "run")
    for step in range(8):
        model.scale.requires_grad_(step % 3 != 2)
        opt.step(lambda: model(*TOKENS))
    opt.trajectory.close()
    trained = [model.embed.weight, model.scale, model.middle.weight, model.middle.bias]
    params = [base.embed.weight, base.scale, base.middle.weight, base.middle.bias]
    for chunk in (1, 3, 256):
        again = copy.deepcopy(params)
        zk.replay(again, tmp_path / "run", chunk=chunk)
        assert equal(again, trained)
    assert {d["dist"] for d in zk.Trajectory(tmp_path / "run").passes} == set(noise.KINDS)


STEPS = [(3, 5e-3, 0.99, 7), (2**63 + 5, -2e-2, 1.0, 2**64 - 1), (11, 1e-3, 0.5, 9)]
RULES = {
    "add_noise": None,
    "sign": dict(rule="sign"),
    "momentum": dict(rule="momentum", beta=0.7),
    "adam": dict(rule="adam", betas=(0.8, 0.9), adam_eps=1e-6, amsgrad=True),
}


@pytest.mark.parametrize("mask", [None, zk.masks.Magnitude(0.6), zk.masks.Random(0.4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_many_steps_in_one_pass_are_as_many_passes(rule, dtype, mask):
    shapes = [(9, 33), (3, 4, 5), (4, 3, 3, 3), (20,), ()]
    start = [torch.randn(s, generator=torch.manual_seed(i)).to(dtype) for i, s in enumerate(shapes)]
    names = {"momentum": ("m",), "adam": ("m", "v", "v_max")}.get(rule, ())

    def run(params, states, steps):
        seeds, coeffs, decays, rounding = (list(x) for x in zip(*steps, strict=True))
        how = dict(
            dist="rank1", mask=mask, decay=decays, rounding="stochastic", rounding_seed=rounding,
            each_step=True, streams=[4, 0, 7, 2, 5],
        )  # fmt: skip
        if rule == "add_noise":
            passes.add_noise_(params, seeds, coeffs, **how)
        else:
            lr = [0.1] * len(steps)
            passes.apply_update_(params, states, seeds=seeds, coeffs=coeffs, lr=lr, **RULES[rule],
                                 **how)  # fmt: skip

    ends = []
    for parts in ([STEPS], [[step] for step in STEPS]):
        params = [p.clone() for p in start]
        states = [{n: torch.zeros(p.shape) for n in names} for p in params]
        for part in parts:
            run(params, states, part)
        ends.append([*params, *(t for s in states for t in s.values())])
    assert equal(*ends)
    assert not equal(ends[0][: len(start)], start)


def test_a_reader_that_does_not_know_the_distribution_refuses_the_log(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    base, opt = copy.deepcopy(model), zk.ZOSGD(model, lr=0.1, dist="rank1")
    opt.record(tmp_path / "run")
    opt.step(lambda: model(torch.ones(3)).sum())
    opt.trajectory.close()
    before = weights(base)
    monkeypatch.delitem(noise.KINDS, "rank1")
    with pytest.raises(zk.TrajectoryError, match="a distribution or a rounding that is unknown"):
        zk.replay(base, tmp_path / "run")
    assert equal(weights(base), before)

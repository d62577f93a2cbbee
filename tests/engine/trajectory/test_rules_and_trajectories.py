"""Every rule's run is replayed and resumed from its trajectory, bit for bit."""

import pytest
import torch
from test_optim import Small, batch

import zokernels as zk

RUNS = {
    "sgd": (zk.ZOSGD, dict(num_queries=2)),
    "sign": (zk.ZOSGDSign, {}),
    "momentum": (zk.ZOSGDMomentum, {}),
    "momentum in 16 bits": (zk.ZOSGDMomentum, dict(state_dtype=torch.bfloat16)),
    "adam": (zk.ZOAdam, {}),
    "adam corrected": (zk.ZOAdam, dict(amsgrad=False, bias_correction=True)),
    "conservative": (zk.ZOSGDConservative, {}),
    "sparse": (zk.ZOSGD, dict(sparsity=0.3, resample_every=2)),
    "blocks": (zk.ZOSGD, dict(blocks="module")),
    "blocks at the end": (zk.ZOSGD, dict(blocks="module", block_order="simultaneous")),
    "rank1": (zk.ZOSGD, dict(dist="rank1", num_queries=2)),
    "rank1, conservative": (zk.ZOSGDConservative, dict(dist="rank1")),
    "rank1, sparse": (zk.ZOSGD, dict(dist="rank1", sparsity=0.3, resample_every=2)),
    "rank1, blocks": (zk.ZOAdam, dict(dist="rank1", blocks="module")),
    "rank1, forward": (zk.ForwardGrad, dict(dist="rank1")),
    "blocks, adam": (zk.ZOAdam, dict(blocks="module", bias_correction=True)),
}


def made(kind, options):
    model = Small()
    common = dict(lr=0.01, weight_decay=0.1, seed=5)
    if kind is not zk.ForwardGrad:
        common["eps"] = 1e-2
    return model, kind(model, **common, **options)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, expected):
    return all(torch.equal(p, w) for p, w in zip(model.parameters(), expected, strict=True))


def recorded(kind, options, path, steps=6):
    (x, y), (model, opt) = batch(), made(kind, options)
    recorder = opt.record(path)
    for _ in range(steps):
        opt.step(lambda: model(x, y))
    recorder.close()
    return weights(model)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_replayed_and_resumed(name, tmp_path):
    kind, options = RUNS[name]
    expected = recorded(kind, options, tmp_path / "run.zk")
    twin = Small()
    zk.replay(twin, tmp_path / "run.zk")
    assert same(twin, expected)
    (x, y), (model, opt) = batch(), made(kind, options)
    recorder = opt.resume(tmp_path / "run.zk", until=3)
    for _ in range(3):
        opt.step(lambda: model(x, y))
    recorder.close()
    assert same(model, expected)


@pytest.mark.parametrize("dist", ["gaussian", "rank1"])
def test_a_window_is_replayed_and_refuses_to_be_resumed(dist, tmp_path):
    expected = recorded(zk.ZOSGDMomentum, dict(window=3, dist=dist), tmp_path / "run.zk")
    twin = Small()
    zk.replay(twin, tmp_path / "run.zk")
    assert same(twin, expected)
    model, opt = made(zk.ZOSGDMomentum, dict(window=3, dist=dist))
    before = weights(model)
    with pytest.raises(zk.TrajectoryError, match="state_dict"):
        opt.resume(tmp_path / "run.zk")
    assert same(model, before)


def test_a_block_wise_step_left_between_its_updates_ends_the_log(tmp_path):
    (x, y), (model, opt) = batch(), made(zk.ZOSGD, dict(blocks="module"))
    recorder, calls = opt.record(tmp_path / "run.zk"), 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyError
        return model(x, y)

    with pytest.raises(KeyError):
        opt.step(closure)
    with pytest.raises(zk.TrajectoryError, match="half done"):
        opt.step(closure)
    recorder.close()

"""Weights that a forward writes are as before it, whether or not they are perturbed in it."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = {
    "two-sided": (zk.ZOSGD, dict(eps=1e-2)),
    "one-sided": (zk.ZOSGD, dict(eps=1e-2, estimator="one_sided", num_queries=2)),
    "population": (zk.ZOSGD, dict(eps=1e-2, estimator="population", num_queries=2)),
    "blocks": (zk.ZOSGD, dict(eps=1e-2, blocks="module")),
    "blocks at once": (zk.ZOSGD, dict(eps=1e-2, blocks="module", block_order="simultaneous")),
    "conservative": (zk.ZOSGDConservative, dict(eps=1e-2)),
    "forward gradient": (zk.ForwardGrad, dict(num_queries=2)),
    "forward gradient in blocks": (zk.ForwardGrad, dict(blocks="module")),
}
MODES = [
    (way, mode)
    for way in WAYS
    for mode in ("in_place", "on_entry", "paired")
    if not (way.startswith("forward") and mode == "paired")
]


class Clamping(nn.Module):
    """Layers of which one is scaled down by each forward, and one by its own code."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8, max_norm=1.0)
        self.mix = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        with torch.no_grad():
            self.mix.weight.clamp_(-0.1, 0.1)
        return self.head(self.mix(self.table(ids).flatten(1)).tanh())


IDS = torch.arange(12).view(3, 4)


def trained(way, mode, lr, steps=3, log=None):
    kind, options = WAYS[way]
    model = Clamping()
    opt = kind(model, lr=lr, seed=1, perturb=mode, **options)
    if log is not None:
        opt.record(log)
    with warnings.catch_warnings():
        # Of the writes it is told, and of what can't share a forward.
        warnings.simplefilter("ignore")
        for _ in range(steps):
            opt.step(lambda: model(IDS).square().mean())
    if log is not None:
        opt.trajectory.close()
    return model, opt.projected_gradients


@pytest.mark.parametrize("way, mode", MODES)
def test_a_step_without_a_rate_changes_no_bit(way, mode):
    model, slopes = trained(way, mode, lr=0.0)
    assert all(map(torch.equal, Clamping().parameters(), model.parameters()))
    # Each forward began at the same weights.
    assert slopes == pytest.approx(trained(way, "in_place", lr=0.0)[1], rel=1e-3)


@pytest.mark.parametrize("way, mode", MODES)
def test_a_log_gives_the_trained_weights(way, mode, tmp_path):
    model, _ = trained(way, mode, lr=0.05, log=tmp_path / "log.zk")
    replayed = zk.replay(Clamping(), tmp_path / "log.zk")
    assert not torch.equal(model.mix.weight, Clamping().mix.weight)
    assert all(map(torch.equal, replayed.parameters(), model.parameters()))


def test_a_probe_changes_no_bit():
    model = Clamping()
    opt = zk.ZOSGD(model, lr=1e-3, eps=1e-2, estimator="one_sided")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zk.probe(opt, lambda ids: model(ids).square().mean(), itertools.repeat(IDS))
    assert all(map(torch.equal, Clamping().parameters(), model.parameters()))


@pytest.mark.parametrize("kind", [zk.ForwardGrad, zk.ZOSGD])
def test_looking_for_writes_changes_no_bit(kind):
    """A first step looks at each operation; the same step is a later one of a run that went on."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 3)
    )
    base.register_buffer("large", torch.zeros(5000))
    x, found = torch.randn(2, 5, 8), []
    for cut in (6, 3):
        model = copy.deepcopy(base)
        opt = kind(model, lr=0.05, estimator="one_sided", num_queries=2, seed=8)
        for step in range(6):
            if step == cut:
                state = opt.state_dict()
                opt = kind(model, lr=0.05, estimator="one_sided", num_queries=2, seed=8)
                opt.load_state_dict(state)
            opt.step(lambda model=model: model(x).square().mean())
        found.append(model)
    assert all(map(torch.equal, *(m.parameters() for m in found)))

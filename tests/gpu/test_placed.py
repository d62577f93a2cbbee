"""Weights in channels_last on a GPU, and half of a model there: the bits of a CPU's."""

import pytest
import torch
from anywhere import Net, relaid
from device import DEVICE, assert_same, marks, some

import zokernels as zk

pytestmark = marks


class Split(Net):
    """Convolutions on the CPU, and the rest on the GPU."""

    def forward(self):
        h = self.large(self.first(self.x).relu()).flatten(1).to(DEVICE)
        return self.wide(self.norm(self.matrix(h)))


def halved(model):
    for module in (model.matrix, model.norm, model.wide):
        module.to(DEVICE)
    return model


def moved(model):
    model.x = model.x.to(DEVICE)
    return relaid(model.to(DEVICE))


PLACES = {"devices": halved, "layouts": moved, "both": lambda model: halved(relaid(model))}


@pytest.mark.parametrize("rule, mode", some([
    (zk.ZOSGD, "on_entry"), (zk.ZOAdam, "in_place"), (zk.ZOSGDSign, "on_entry"),
]))  # fmt: skip
@pytest.mark.parametrize("where", PLACES)
def test_steps_have_the_cpus_bits_and_its_log(where, rule, mode, tmp_path):
    twin, model = Net(torch.bfloat16), PLACES[where](Split(torch.bfloat16))
    for name, m in (("here", twin), ("there", model)):
        opt = rule(m, lr=0.02, eps=0.01, seed=7, perturb=mode, rounding="stochastic")
        log = opt.record(tmp_path / name)
        for _ in range(2):
            losses = iter([1.5, 1.25])
            opt.step(lambda m=m, losses=losses: (m(), next(losses))[1])
        log.close()
    assert_same(twin.parameters(), model.parameters())
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    base = zk.replay(Net(torch.bfloat16).to(DEVICE), tmp_path / "there")
    assert_same(twin.parameters(), base.parameters())

"""The scale of a step by tensors is that by Python's floats, to the bit."""

import random

import pytest
import torch

from zokernels.estimators import Moment, differences, mean, scale
from zokernels.graphs import scale as device

CHANCE = random.Random(0)
STEPS = {
    "any": [CHANCE.gauss(0.3, 2.0) for _ in range(7)],
    "alike": [0.1] * 8,
    "a third": [1 / 3] * 7,
    "zero": [0.0] * 3,
    "one apart": [0.1] * 7 + [0.2],
}


def number(x):
    return torch.tensor(float(x), dtype=torch.float64)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("normalize", [None, "std", "ema"])
def test_it_is_the_hosts(normalize, clip, step):
    slopes, before = STEPS[step], Moment(0.4, 0.3)
    expected, after = scale(slopes, normalize, clip, before)
    scaler = device.Scaler(normalize, clip, len(slopes), number)
    found = scaler(*(torch.tensor(x, dtype=torch.float64) for x in (slopes, before)))
    assert found.moment.tolist() == [*after]
    assert bool(found.is_flat) == (expected is None)
    if expected is not None:
        assert found.gradients.tolist() == expected


@pytest.mark.parametrize("step", STEPS)
def test_the_mean_is_the_hosts(step):
    losses = STEPS[step]
    found = device.mean(torch.tensor(losses, dtype=torch.float64), number(len(losses)))
    assert found.item() == mean(losses)
    if step in ("alike", "a third"):
        assert found.item() == losses[0] and not any(differences("population", losses))

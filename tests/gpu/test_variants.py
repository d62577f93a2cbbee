"""Masks, roundings, several steps and decay on a GPU, each with each other: the CPU's bits.

The longest of the checks, each case a kernel of its own to compile; so it comes last.
"""

from functools import partial

import pytest
import torch
from conftest import varied
from device import DEVICE, DISTS, DRY, assert_same, marks, some, spread, states_to_device, to_device
from test_ops import DTYPES, mask_of, unaligned
from test_update import RULES, flat, states_of

import zokernels as zk
from zokernels import noise

pytestmark = marks

# Unaligned ones, and an aligned one of whole groups.
SIZES = [9, 103] if DRY else [0, 1, 7, 8, 9, 127, 1003, 4099, 100_003]
WHOLE = 8192 + 77 if DRY else 100_003
MASKS, ROUNDINGS = ["none", "random", "magnitude", "bits"], ["nearest", "stochastic"]
FAR = 8 * 2**32 - 5001
DRAWS = {
    "gaussian": partial(noise.gaussian, 100_003, offset=FAR),
    "rademacher": partial(noise.rademacher, 100_003, offset=FAR),
    "mask": partial(noise.mask, 100_003, 0.3, offset=FAR),
    "rank1": partial(noise.rank1, (300, 1001)),
    "rank1 of a convolution": partial(noise.rank1, (7, 5, 3, 3)),
    "rank1 of a vector": partial(noise.rank1, (1000,)),
}
OFFSETS = [0, 3, 8, 2**35 - 4, 129, 1, 2**40 + 5, 2**35 - 2000, 2**32 - 50_000]
COLUMNS = [8, 100, 3, 2**33, 0, 1, 128, 300, 768]


def tensors(dtype):
    ragged = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
    return [*ragged, varied(WHOLE, dtype, 20)]


def mask_on(kind, tensors, device):
    made = mask_of(kind, tensors)
    if isinstance(made, zk.masks.Bits):
        made.packed = [p.to(device) for p in made.packed]
    return made


@pytest.mark.parametrize("draw", DRAWS)
def test_raw_noise(draw):
    where = dict(seed=2**63 + 5, stream=2**32 - 1)
    there = DRAWS[draw](**where, device=DEVICE)
    assert there.device.type == DEVICE
    assert_same([DRAWS[draw](**where)], [there])


def numbers(each_step, rounding, dist):
    # A coefficient too small to take the noise's unit into itself.
    return dict(
        seeds=[3, 2**63 + 5, 7, 8],
        coeffs=[1e-3, -0.5, 2e-30, 0.25],
        streams=[*[5, 2**32 - 1, 0, 1, 2, 3, 4, 6, 7][: len(SIZES)], 8],
        offsets=[*OFFSETS[: len(SIZES)], 2**35],
        columns=[*COLUMNS[: len(SIZES)], 128] if dist == "rank1" else None,
        dist=dist,
        decay=[0.99, 1.0] if each_step else 0.99,
        rounding=rounding,
        rounding_seed=[77, 2**64 - 1] if each_step else 2**63,
        each_step=2 if each_step else False,
    )


ADDS = spread(2, DTYPES, DISTS, MASKS, ROUNDINGS, [False, True])


@pytest.mark.parametrize("dtype, dist, mask, rounding, each_step", some(ADDS, 3), ids=str)
def test_add_noise(dtype, dist, mask, rounding, each_step):
    cpu = tensors(dtype)
    gpu, masks = to_device(cpu), [mask_on(mask, cpu, device) for device in ("cpu", DEVICE)]
    call = numbers(each_step, rounding, dist)
    zk.ops.add_noise_(cpu, mask=masks[0], **call)
    zk.ops.add_noise_(gpu, mask=masks[1], backend="triton", **call)
    assert_same(cpu, gpu)


def _sooner(case):
    """Those of one step first, and of these the masks: what a training run may ask for."""
    *_, mask, rounding, each_step = case
    return each_step, rounding == "stochastic", mask != "random"


STATES = [torch.float32, torch.bfloat16]
UPDATES = sorted(
    (
        case
        for case in spread(4, list(RULES), DTYPES, STATES, MASKS, ROUNDINGS, [False, True])
        if case[0] != "sign" or case[2] is torch.float32
    ),
    key=_sooner,
)


@pytest.mark.parametrize("name, dtype, state, mask, rounding, each_step", some(UPDATES, 4), ids=str)
def test_apply_update(name, dtype, state, mask, rounding, each_step):
    # A third of them with each distribution, so that each value meets all.
    dist = DISTS[(len(name) + len(mask) + (state is torch.float32) + each_step) % len(DISTS)]
    cpu = tensors(dtype)
    cpu_states = states_of(name, cpu, state)
    gpu, gpu_states = to_device(cpu), states_to_device(cpu_states)
    masks = [mask_on(mask, cpu, device) for device in ("cpu", DEVICE)]
    call = numbers(each_step, rounding, dist) | RULES[name]
    call["lr"] = [0.01, 0.03] if each_step else 0.02
    zk.ops.apply_update_(cpu, cpu_states, mask=masks[0], **call)
    zk.ops.apply_update_(gpu, gpu_states, mask=masks[1], backend="triton", **call)
    assert_same(flat(cpu, cpu_states), flat(gpu, gpu_states))

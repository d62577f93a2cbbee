"""Rank-one directions by the Triton kernels, in Triton's interpreter: the reference's bits."""

import pytest
import torch
from conftest import same_bits, varied
from test_kernels import MASKS, ROUNDINGS, STATES, pairwise
from test_ops import DTYPES, mask_of
from test_update import RULES, flat, states_of

import zokernels as zk
from zokernels.backends.triton import launch

# Columns of the parameter, where its part begins, and how many elements that has: within a row, in
# rows' middles, whole rows; narrow, uneven and aligned ones; and no matrix.
PARTS = [
    (1, 300, 205), (3, 7, 100), (100, 2**35 - 4, 403), (128, 128 * 125, 128 * 70),
    (768, 2**40 + 300, 2000), (768, 768 * 63, 768 * 66), (0, 2**35 - 4, 77),
    (2**33, 2**33 * 5 - 20, 50), (2**62, 2**62 + 2**35, 9), (8, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("columns, offset, numel", PARTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_of_a_matrix_has_its_signs(dtype, columns, offset, numel):
    w = varied(numel, dtype)
    expected, got = w.clone(), w.clone()
    for p, backend in ((expected, "reference"), (got, "triton")):
        zk.ops.add_noise_(
            [p], [11, 2**63], [-3e-4, 0.5], columns=[columns], offsets=[offset], dist="rank1",
            streams=[9], backend=backend,
        )  # fmt: skip
    assert same_bits(expected, got)


# In tiles of four rows a whole one, one that ends in a row, narrow ones, and no matrix.
SMALL = launch.Shape(64, 1)
FEW = [(128, 128 * 60, 128 * 5 + 3), (3, 2**35 - 4, 20), (0, 0, 9)]


def arguments(mask, rounding, each_step, tensors):
    return dict(
        seeds=[3, 2**63 + 5, 7, 8],
        coeffs=[1e-3, -0.5, 2e-30, 0.25],
        streams=[5, 0, 2**32 - 1],
        columns=[columns for columns, _, _ in FEW],
        offsets=[offset for _, offset, _ in FEW],
        dist="rank1",
        mask=mask_of(mask, tensors),
        decay=[0.99, 1.0] if each_step else 0.99,
        rounding=rounding,
        rounding_seed=[77, 2**64 - 1] if each_step else 2**64 - 2,
        each_step=2 if each_step else False,
    )


ADDS = pairwise(DTYPES, MASKS, ROUNDINGS, [False, True])


@pytest.mark.parametrize("dtype, mask, rounding, each_step", ADDS, ids=str)
def test_add_noise_to_matrices_equals_the_reference(dtype, mask, rounding, each_step):
    expected = [varied(numel, dtype, i) for i, (_, _, numel) in enumerate(FEW)]
    got = [t.clone() for t in expected]
    call = arguments(mask, rounding, each_step, expected)
    zk.ops.add_noise_(expected, backend="reference", **call)
    with launch.shaped(SMALL):
        zk.ops.add_noise_(got, backend="triton", **call)
    assert all(map(same_bits, expected, got))


UPDATES = pairwise(RULES, DTYPES, STATES, MASKS, ROUNDINGS, [False, True])


@pytest.mark.parametrize("name, dtype, state, mask, rounding, each_step", UPDATES, ids=str)
def test_a_rules_update_of_matrices_equals_the_reference(
    name, dtype, state, mask, rounding, each_step
):
    expected = [varied(numel, dtype, i) for i, (_, _, numel) in enumerate(FEW)]
    got = [t.clone() for t in expected]
    call = arguments(mask, rounding, each_step, expected) | RULES[name]
    call["lr"] = [0.01, 0.03] if each_step else 0.02
    states = [states_of(name, expected, state) for _ in range(2)]
    zk.ops.apply_update_(expected, states[0], backend="reference", **call)
    with launch.shaped(SMALL):
        zk.ops.apply_update_(got, states[1], backend="triton", **call)
    assert all(map(same_bits, flat(expected, states[0]), flat(got, states[1])))


@pytest.mark.parametrize("rows, warps, count", [(32, 1, 20), (512, 2, 100), (4096, 8, 300)])
def test_a_tiles_height_changes_no_bit(rows, warps, count):
    # At 4096 a tile has rows of two blocks of signs.
    expected = varied(128 * count, torch.bfloat16)
    got = expected.clone()
    call = dict(seeds=[7], coeffs=[0.125], dist="rank1", columns=[128], offsets=[128 * 115])
    zk.ops.add_noise_([expected], backend="reference", **call)
    with launch.shaped(launch.Shape(rows, warps)):
        zk.ops.add_noise_([got], backend="triton", **call)
    assert same_bits(expected, got)


SHAPES = [(), (5,), (9, 1), (7, 3), (11, 100), (130, 128), (3, 768), (2, 5, 24), (4, 3, 5, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_of_any_shapes_in_one_call(dtype):
    whole = [varied(torch.Size(s).numel(), dtype, i).view(s) for i, s in enumerate(SHAPES)]
    expected, got = [[t.clone() for t in whole] for _ in range(2)]
    for tensors, backend in ((expected, "reference"), (got, "triton")):
        zk.ops.add_noise_(tensors, [5, 6], [0.5, -1e-3], dist="rank1", backend=backend)
    assert all(map(same_bits, expected, got))

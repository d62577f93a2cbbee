"""add_noise along directions of rank one, by the native backend: the reference's bits."""

import math

import pytest
import torch
from conftest import needs_native, same_bits, varied
from test_ops import DTYPES, ISAS

import zokernels as zk

# Of parameters for rank-one directions, some longer than a thread's share.
SHAPES = [
    (4, 1), (9, 2), (43, 3), (41, 7), (33, 31), (70, 33), (23, 100), (300, 128), (90, 768),
    (2, 70001), (2, 3, 100), (6, 5, 3, 3), (2, 2, 2, 2, 40), (57,), (),
]  # fmt: skip


@needs_native
@pytest.mark.parametrize("seeds", [1, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_every_shape(dtype, seeds, monkeypatch):
    # Few seeds go row by row, many take several rows at a time, and too many a part of the columns.
    w = [varied(math.prod(shape), dtype, i).view(shape) for i, shape in enumerate(SHAPES)]
    call = dict(
        seeds=[2**40 + k for k in range(seeds)],
        coeffs=[0.3 * (-0.7) ** k for k in range(seeds)],
        dist="rank1",
        decay=0.99,
    )
    expected = [t.clone() for t in w]
    zk.ops.add_noise_(expected, backend="reference", **call)
    z = [zk.noise.rank1(t.shape, seed=2**40, stream=i).flatten() for i, t in enumerate(w)]
    for isa in ISAS:
        monkeypatch.setenv("ZOKERNELS_ISA", isa)
        got, out = [t.clone() for t in w], [torch.full_like(t, math.nan) for t in w]
        zk.ops.add_noise_(got, backend="native", **call)
        zk.ops.add_noise(w, out, backend="native", **call)
        ones = [torch.zeros(t.shape) for t in w]
        zk.ops.add_noise_(ones, [2**40], [1.0], dist="rank1", backend="native")
        for e, g, o, one, noise in zip(expected, got, out, ones, z, strict=True):
            assert same_bits(e, g) and same_bits(e, o), f"{isa} differs in shape {tuple(e.shape)}"
            assert torch.equal(one.flatten(), noise)


@needs_native
@pytest.mark.parametrize("seeds", [1, 5])
@pytest.mark.parametrize(
    ("columns", "offset"),
    [
        (768, 2**32 * 768 - 900),  # rows beyond 2³²
        (768, 2**39 * 768 - 900),  # where the high word of a row's block changes
        (3, 3 * 2**39 - 700),
        (2**39 + 100, 2**40 - 500),  # and that of a column's
        (70001, 5 * 70001 - 400),
        (130, 7),
    ],
)
def test_far_inside_a_parameter(columns, offset, seeds, monkeypatch):
    w = varied(3000, torch.bfloat16)
    call = dict(seeds=list(range(seeds)), coeffs=[0.25] * seeds, dist="rank1", streams=[3])
    call |= dict(columns=[columns], offsets=[offset])
    zk.ops.add_noise_([expected := w.clone()], backend="reference", **call)
    for isa in ISAS:
        monkeypatch.setenv("ZOKERNELS_ISA", isa)
        zk.ops.add_noise_([got := w.clone()], backend="native", **call)
        assert same_bits(expected, got), isa

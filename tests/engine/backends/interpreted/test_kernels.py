"""The Triton kernels against the reference, bit for bit, in Triton's interpreter.

Collected only where TRITON_INTERPRET=1 was set before the program began; test_triton.py runs it in
a process of its own.
"""

import itertools
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from conftest import same_bits, varied
from test_ops import DISTS, DTYPES, mask_of, unaligned
from test_update import RULES, flat, states_of

import zokernels as zk
from zokernels.backends.triton import arithmetic

SIZES = [0, 1, 1003]
MASKS = ["none", "random", "magnitude", "bits"]
ROUNDINGS = ["nearest", "stochastic"]
STATES = [torch.float32, torch.bfloat16]


def arguments(dist, mask, rounding, each_step, tensors):
    # Unaligned tensors; offsets at the end of a group, and at 2³⁵ where a block's number carries.
    return dict(
        seeds=[3, 2**63 + 5, 7, 8],
        coeffs=[1e-3, -0.5, 2e-30, 0.25],
        streams=[5, 0, 2**32 - 1],
        offsets=[0, 2**40 + 4095, 2**35 - 4],
        dist=dist,
        mask=mask_of(mask, tensors),
        decay=[0.99, 1.0] if each_step else 0.99,
        rounding=rounding,
        rounding_seed=[77, 2**64 - 1] if each_step else 2**64 - 2,
        each_step=2 if each_step else False,
    )


@pytest.mark.parametrize("each_step", [False, True], ids=["once", "each_step"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_noise_equals_the_reference(dtype, dist, mask, rounding, each_step):
    expected = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
    got = [t.clone() if i % 2 else unaligned(t.numel(), dtype, i) for i, t in enumerate(expected)]
    call = arguments(dist, mask, rounding, each_step, expected)
    zk.ops.add_noise_(expected, backend="reference", **call)
    zk.ops.add_noise_(got, backend="triton", **call)
    for e, g in zip(expected, got, strict=True):
        assert same_bits(e, g), f"differs at {e.numel()} elements"


def pairwise(*axes):
    """Of all combinations as few as hold every pair of two axes' values (greedily)."""
    left = {
        (i, a, j, b)
        for (i, x), (j, y) in itertools.combinations(enumerate(axes), 2)
        for a in x
        for b in y
    }
    chosen = []
    combinations = list(itertools.product(*axes))
    while left:
        gains = [
            sum((i, c[i], j, c[j]) in left for i, j in itertools.combinations(range(len(c)), 2))
            for c in combinations
        ]
        best = combinations[gains.index(max(gains))]
        chosen.append(best)
        left -= {(i, best[i], j, best[j]) for i, j in itertools.combinations(range(len(best)), 2)}
    return chosen


UPDATES = list(itertools.product(RULES, DTYPES, STATES, DISTS, MASKS, ROUNDINGS, [False, True]))
QUICK = set(pairwise(RULES, DTYPES, STATES, DISTS, MASKS, ROUNDINGS, [False, True]))


@pytest.mark.parametrize(
    "name, dtype, state, dist, mask, rounding, each_step",
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in UPDATES],
)
def test_apply_update_equals_the_reference(name, dtype, state, dist, mask, rounding, each_step):
    expected = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
    got = [t.clone() if i % 2 else unaligned(t.numel(), dtype, i) for i, t in enumerate(expected)]
    call = arguments(dist, mask, rounding, each_step, expected) | RULES[name]
    call["lr"] = [0.01, 0.03] if each_step else 0.02
    states = [states_of(name, expected, state) for _ in range(2)]
    zk.ops.apply_update_(expected, states[0], backend="reference", **call)
    zk.ops.apply_update_(got, states[1], backend="triton", **call)
    for e, g in zip(flat(expected, states[0]), flat(got, states[1]), strict=True):
        assert same_bits(e, g), f"differs at {e.numel()} elements"


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_aligned_groups_equal_the_reference(dtype, dist):
    # Two whole groups and a ragged end, as a training step calls it.
    w = varied(2 * 16384 + 77, dtype)
    expected, got = w.clone(), w.clone()
    for p, backend in ((expected, "reference"), (got, "triton")):
        zk.ops.add_noise_([p], [11], [-3e-4], dist=dist, backend=backend)
    assert same_bits(expected, got)


def test_mixed_types_go_in_one_call_and_out_of_place_leaves_the_weights():
    tensors = [varied(300, d, i) for i, d in enumerate(DTYPES)]
    before, out = [t.clone() for t in tensors], [torch.empty_like(t) for t in tensors]
    expected = [t.clone() for t in tensors]
    call = dict(seeds=[1], coeffs=[0.5], mask=zk.masks.Magnitude(0.1))
    zk.ops.add_noise(tensors, out, backend="triton", **call)
    zk.ops.add_noise_(expected, backend="reference", **call)
    assert all(same_bits(a, b) for a, b in zip(expected, out, strict=True))
    assert all(same_bits(a, b) for a, b in zip(before, tensors, strict=True))


def test_each_tensor_may_have_states_of_its_own_types():
    tensors = [varied(300, torch.bfloat16, i) for i in range(2)]
    results = []
    for backend in ("reference", "triton"):
        p = [t.clone() for t in tensors]
        states = [states_of("adam", p[:1])[0], states_of("adam", p[1:], torch.bfloat16)[0]]
        states[1]["m"] = states[1]["m"].float()
        zk.ops.apply_update_(p, states, "adam", [1], [0.5], lr=0.1, backend=backend)
        results.append(flat(p, states))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_the_same_list_is_described_once():
    from zokernels.backends.triton.table import _build

    p, hits = [torch.zeros(50), torch.zeros(70)], []
    for seed in range(3):
        zk.ops.add_noise_(p, [seed], [0.5], backend="triton")
        hits.append(_build.cache_info().hits)
    assert hits[2] == hits[0] + 2


def test_each_matrix_of_a_large_model_is_described_once():
    from zokernels.backends.triton.table import _build_one

    # A forward at θ + εz describes one after the other, some 150 in a model of 24 layers; of lists
    # 64 are kept.
    many, hits = [torch.zeros(9) for _ in range(70)], []
    for seed in range(2):
        for p in many:
            zk.ops.add_noise_([p], [seed], [0.5], backend="triton", dist="rademacher")
        hits.append(_build_one.cache_info().hits)
    assert hits[1] >= hits[0] + 70
    expected = torch.zeros(9)
    for seed in range(2):
        zk.ops.add_noise_([expected], [seed], [0.5], backend="reference", dist="rademacher")
    assert all(same_bits(expected, p) for p in many)


@triton.jit
def fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c = tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)
    tl.store(out_ptr + i, arithmetic.fma(a, b, c))


def test_fma_rounds_once_where_a_binary64_sum_would_round_twice():
    # A little more than half a step above 1: rounded to binary64 first, it ties, and goes to 1.
    a = torch.tensor([2.0**-24 * (1 + 2.0**-20), 2.0**-24 * (1 + 2.0**-23)])
    b = torch.tensor([1 + 2.0**-20, 1 - 2.0**-24])
    c, out = torch.ones(2), torch.empty(2)
    fma_kernel[(1,)](a, b, c, out, 2)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), out.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert r == min((1.0, 1.0 + 2.0**-23), key=lambda v: abs(Fraction(v) - exact))

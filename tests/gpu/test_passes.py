"""The Triton kernels of a training step on a GPU: the CPU's bits."""

import math

import pytest
import shifts
import torch
from conftest import varied
from device import DEVICE, DISTS, DRY, assert_same, marks, some, states_to_device, to_device
from test_ops import DTYPES, unaligned
from test_update import RULES, flat, states_of

import zokernels as zk
from zokernels.perturb import DeferredDirection, Direction, Move
from zokernels.perturb.deferred import words

pytestmark = marks

# Unaligned tensors, empty, of one element and of odd sizes; and aligned ones of whole groups.
SIZES = [0, 1003] if DRY else [0, 1, 7, 8, 9, 127, 1003, 4099, 100_003]
WHOLE = [4096] if DRY else [5 * 16384 + 77, 3 * 16384]
STREAMS = [5, 2**32 - 1, 0, 1, 2, 3, 4, 6, 7, 8, 2**31]
# Where an index passes 2³², a block's number 2³², and both begin a group.
OFFSETS = [0, 3, 8, 2**35 - 4, 129, 1, 2**40 + 5, 2**35 - 2000, 2**32 - 50_000, 0, 2**36]
# Narrow and long rows, and no matrix; of the aligned ones whole tiles, and a row's middle before.
COLUMNS = [8, 100, 3, 2**33, 0, 1, 128, 300, 768, 128, 768]


def tensors(dtype):
    ragged = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
    return [*ragged, *(varied(size, dtype, 20 + i) for i, size in enumerate(WHOLE))]


def places(dist):
    """Streams and offsets of `tensors`, and with ``"rank1"`` their parameters' columns."""
    ragged = len(SIZES)
    chosen = [*range(ragged), *range(9, 9 + len(WHOLE))]
    found = dict(streams=[STREAMS[i] for i in chosen], offsets=[OFFSETS[i] for i in chosen])
    return found | ({"columns": [COLUMNS[i] for i in chosen]} if dist == "rank1" else {})


def matrices(dtype):
    """Tensors that have rows and columns: odd ones, whole tiles with an edge, a convolution's."""
    shapes = [(7, 100), (71, 136)] if DRY else [(7, 100), (300, 768), (1000, 128), (6, 5, 3, 3)]
    return [
        unaligned(math.prod(shape), dtype, i).view(shape) if i % 2 == 0
        else varied(math.prod(shape), dtype, i).view(shape)
        for i, shape in enumerate(shapes)
    ]  # fmt: skip


@pytest.mark.parametrize("apart", [False, True], ids=["in_place", "apart"])
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", some(DTYPES), ids=str)
def test_a_training_pass(dtype, dist, apart):
    cpu = tensors(dtype)
    gpu, out = to_device(cpu), to_device(cpu)
    for seeds, coeffs in (
        ([2**63 + 11], [-3e-4]),
        (list(range(3, 11))[: 2 if DRY else 8], [1e-3, -0.5, 0.25, 1.0, -1e-4, 2.0, 3e-5, 0.125]),
    ):
        call = dict(seeds=seeds, coeffs=coeffs[: len(seeds)], dist=dist, **places(dist))
        if apart:
            before = [t.clone() for t in gpu]
            zk.ops.add_noise(gpu, out, backend="triton", **call)
            assert_same(before, gpu)
            gpu, out = out, gpu
        else:
            zk.ops.add_noise_(gpu, backend="triton", **call)
        zk.ops.add_noise_(cpu, **call)
        assert_same(cpu, gpu)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", some(DTYPES, 1), ids=str)
def test_both_sides_of_a_direction(dtype, dist):
    if dist == "rank1":
        # A direction knows its columns by the tensors' own shapes.
        cpu = matrices(dtype)
        at = dict(streams=STREAMS[: len(cpu)], offsets=[0] * len(cpu))
    else:
        cpu, at = tensors(dtype), places(dist)
    gpu, chosen = to_device(cpu), range(len(cpu))
    for seeds, coeffs in (([2**63 + 11], [-3e-4]), ([3, 4], [1e-3, -0.5])):
        moves = [Move((1.0,) * len(seeds))] * len(cpu)
        like = Direction(gpu, at["streams"], moves, seeds, dist, backend="triton")
        numbers = torch.tensor(words(seeds, coeffs), device=DEVICE)
        direction = DeferredDirection(like, [numbers], [0] * len(cpu))
        sides = [to_device(cpu), to_device(cpu)]
        direction.fill(gpu, sides[0], chosen, at["offsets"], sides[1])
        for side, got in zip((1, -1), sides, strict=True):
            expected = [torch.empty_like(t) for t in cpu]
            zk.ops.add_noise(cpu, expected, seeds, [side * c for c in coeffs], dist=dist, **at)
            assert_same(expected, got)


@pytest.mark.parametrize("bias", ["none", "common", "each"])
@pytest.mark.parametrize("dtype", some(DTYPES, 1), ids=str)
def test_a_shift_of_products(dtype, bias):
    from zokernels.backends import triton

    for width, out in [(7, 9), (300, 77)] if DRY else shifts.SIZES:
        for lanes, rows in ((1, 1), (2, 3 if DRY else 100), (3, 0)):
            given = shifts.case(lanes, rows, width, out, dtype, bias, DEVICE)
            shifts.assert_rounded_once(shifts.run(triton, *given), *given)


UPDATES = [
    (name, dtype, state, dist)
    for name in RULES
    for dtype in DTYPES
    for state in ([torch.float32] if name == "sign" else [torch.float32, torch.bfloat16])
    for dist in DISTS
]


@pytest.mark.parametrize("name, dtype, state, dist", some(UPDATES, 4), ids=str)
def test_a_training_update(name, dtype, state, dist):
    cpu = tensors(dtype)
    cpu_states = states_of(name, cpu, state)
    gpu, gpu_states = to_device(cpu), states_to_device(cpu_states)
    for seeds in ([2**64 - 2], [4, 5]):
        call = dict(
            seeds=seeds, coeffs=[1e-3, -0.5][: len(seeds)], lr=0.02, dist=dist, **places(dist),
            **RULES[name],
        )  # fmt: skip
        zk.ops.apply_update_(cpu, cpu_states, **call)
        zk.ops.apply_update_(gpu, gpu_states, backend="triton", **call)
        assert_same(flat(cpu, cpu_states), flat(gpu, gpu_states))


def columns(dist):
    """Of a tensor that is a large matrix's part."""
    return {"columns": [128 if DRY else 4096]} if dist == "rank1" else {}


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", some(DTYPES, 1), ids=str)
def test_a_hundred_million_weights(dtype, dist):
    cpu = varied(5003 if DRY else 10**6 + 3, dtype).repeat(1 if DRY else 100)
    gpu = cpu.to(DEVICE, copy=True)
    call = dict(seeds=[11], coeffs=[-3e-4], dist=dist, offsets=[2**32 - 10**7])
    call |= columns(dist)
    zk.ops.add_noise_([cpu], **call)
    zk.ops.add_noise_([gpu], backend="triton", **call)
    assert_same([cpu], [gpu])


@pytest.mark.parametrize("dist", DISTS)
def test_a_tensor_of_more_than_two_to_the_31_elements(dist):
    n = 20_007 if DRY else 2**31 + 10_007
    if not DRY and torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 6.5 GB of free GPU memory")
    p = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    call = dict(seeds=[5], coeffs=[1.0], streams=[3], dist=dist, **columns(dist))
    zk.ops.add_noise_([p], backend="triton", **call)
    for start in (0, n // 2 - 17, n - 20_000, n - 1000):
        part = torch.zeros(min(1000, n - start), dtype=torch.bfloat16)
        zk.ops.add_noise_([part], offsets=[start], **call)
        assert_same([part], [p[start : start + part.numel()]])


@pytest.mark.parametrize("rows, warps", some([(32, 1), (256, 8), (4096, 16)]))
@pytest.mark.parametrize("dist", some(DISTS, 1))
def test_a_groups_shape_changes_no_bit(dist, rows, warps):
    from zokernels.backends.triton import launch

    cpu = tensors(torch.bfloat16)
    gpu = to_device(cpu)
    call = dict(seeds=[7], coeffs=[0.125], dist=dist, **places(dist))
    zk.ops.add_noise_(cpu, **call)
    with launch.shaped(launch.Shape(rows, warps)):
        zk.ops.add_noise_(gpu, backend="triton", **call)
    assert_same(cpu, gpu)


@pytest.mark.skipif(DRY, reason="is about compiled kernels; a CUDA device has them")
def test_nothing_is_compiled_anew_when_numbers_change():
    from zokernels.backends.triton.add_noise import _add_noise_kernel

    def compiled():
        return sum(len(cache[0]) for cache in _add_noise_kernel.device_caches.values())

    counts = []
    for k, numel in ((1, 4096), (2, 5000), (7, 12_345), (16, 100_000), (1, 1)):
        seeds, coeffs = list(range(k)), [0.1 * (i + 1) for i in range(k)]
        zk.ops.add_noise_([torch.zeros(numel, device="cuda")], seeds, coeffs)
        counts.append(compiled())
    assert len(set(counts)) == 1


@pytest.mark.skipif(DRY, reason="is about the default for CUDA tensors; needs a CUDA device")
def test_the_default_for_cuda_tensors_is_triton():
    assert zk.backends()["triton"].available
    p = torch.zeros(1000, device="cuda", dtype=torch.float64)
    zk.ops.add_noise_([p], [1], [1.0])
    assert torch.equal(p.cpu(), zk.noise.gaussian(1000, seed=1).double())

"""add_noise: the contract, and every backend against the reference, bit for bit."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import bits, needs_native, same_bits, varied
from hypothesis import given, settings
from hypothesis import strategies as st

import zokernels as zk
from zokernels import masks
from zokernels.backends import checks, native
from zokernels.backends.plan import AddNoise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTS = ["gaussian", "rademacher", "rank1"]
ISAS = native.instruction_sets() if native.why_missing() is None else []
SIZES = [0, 1, 7, 8, 9, 127, 1003, 4099]
COLUMNS = [5, 1, 0, 3, 768, 7, 31, 128]


def of_rank1(dist, columns):
    """The keyword that goes with tensors of one dimension, which are parts of matrices."""
    return dict(columns=columns) if dist == "rank1" else {}


def unaligned(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor whose storage starts 1 to 7 elements past an aligned address."""
    shift = seed % 7 + 1
    return torch.cat([torch.zeros(shift, dtype=dtype), varied(numel, dtype, seed)])[shift:]


def mask_of(kind: str, tensors: list[torch.Tensor]) -> masks.Mask | None:
    if kind == "random":
        return masks.Random([0.3 + 0.05 * i for i in range(len(tensors))], seed=2**40 + 9)
    if kind == "magnitude":
        return masks.Magnitude(0.01)
    if kind == "bits":
        generator = torch.Generator().manual_seed(3)
        return masks.Bits([torch.rand(t.numel(), generator=generator) < 0.5 for t in tensors])
    return None


@needs_native
@pytest.mark.parametrize("each_step", [False, True], ids=["once", "each_step"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("mask", ["none", "random", "magnitude", "bits"])
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference(dtype, dist, mask, rounding, each_step, monkeypatch):
    tensors = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
    call = dict(
        seeds=[3, 2**63 + 5, 7],
        coeffs=[1e-3, -0.5, 2e-30],
        streams=[5, 2**32 - 1, 0, 1, 2, 3, 4, 6],
        offsets=[0, 3, 8, 2**35 - 4, 129, 1, 2**40 + 5, 2**35 - 2000],
        dist=dist,
        mask=mask_of(mask, tensors),
        decay=[0.99, 1.0, 0.5] if each_step else 0.99,
        rounding=rounding,
        rounding_seed=[77, 2**50, 0] if each_step else 2**63,
        each_step=each_step,
        **of_rank1(dist, COLUMNS),
    )
    expected = [t.clone() for t in tensors]
    zk.ops.add_noise_(expected, backend="reference", **call)
    for isa in ISAS:
        monkeypatch.setenv("ZOKERNELS_ISA", isa)
        got = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
        zk.ops.add_noise_(got, backend="native", **call)
        for size, e, g in zip(SIZES, expected, got, strict=True):
            assert same_bits(e, g), f"{isa} differs from the reference at {size} elements"


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference_at_a_million(dtype, dist, isa, monkeypatch):
    # Several spans, shared among threads, with K = 1 as a training step calls it.
    monkeypatch.setenv("ZOKERNELS_ISA", isa)
    w = varied(10**6 + 3, dtype)
    expected, got = w.clone(), w.clone()
    for p, backend in ((expected, "reference"), (got, "native")):
        zk.ops.add_noise_(
            [p], [11], [-3e-4], dist=dist, offsets=[5], backend=backend, **of_rank1(dist, [768])
        )
    assert same_bits(expected, got)


@needs_native
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_ranges_of_a_prepared_pass(dtype, dist, monkeypatch):
    w = varied(60 * 130, dtype).view(60, 130)
    seeds, coeffs = [5, 2**63], [0.5, -0.125]
    numbers = checks.numbers_of_pass([w], seeds, coeffs, dist=dist, decay=0.5)
    rows = torch.tensor([3, 59, 0, 3, 17])
    plus, minus = w.clone(), w.clone()
    call = dict(dist=dist, decay=0.5, backend="reference")
    zk.ops.add_noise_([plus], seeds, coeffs, **call)
    zk.ops.add_noise_([minus], seeds, [-c for c in coeffs], **call)
    for isa in ISAS:
        monkeypatch.setenv("ZOKERNELS_ISA", isa)
        out, mirror = torch.empty(5, 130, dtype=dtype), torch.empty(5, 130, dtype=dtype)
        for other in (None, [mirror]):
            native.Prepared(AddNoise(**numbers, out=[out]), other).run_rows(seeds, coeffs, rows)
            assert same_bits(out, plus[rows])
            out.zero_()
        assert same_bits(mirror, minus[rows])
        for begin, end in ((0, 650), (77, 300), (130, 131), (1000, 1001)):
            prepared = native.Prepared(AddNoise(**numbers, out=[out]), [mirror])
            prepared.run_range(seeds, coeffs, begin, end)
            for got, expected in ((out, plus), (mirror, minus)):
                assert same_bits(got.flatten()[: end - begin], expected.flatten()[begin:end])


@needs_native
@pytest.mark.parametrize("dist", ["gaussian", "rank1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_threads(dtype, dist):
    w = varied(300_001, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            p = w.clone()
            zk.ops.add_noise_(
                [p, p.clone()], [1, 2], [0.1, 0.2], mask=masks.Random(0.5, 1), dist=dist,
                **of_rank1(dist, [1001, 90]),
            )  # fmt: skip
            results.append(p)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(results[0], r) for r in results[1:])


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_by_offset_equal_the_whole(dtype, dist, backend):
    whole = varied(5000, dtype)
    cuts = [0, 1, 130, 131, 2048, 4999, 5000]
    shards = [whole[a:b].clone() for a, b in zip(cuts, cuts[1:], strict=False)]
    call = dict(
        seeds=[4], coeffs=[0.25], dist=dist, mask=masks.Random(0.7, 5), rounding="stochastic",
        rounding_seed=8, backend=backend,
    )  # fmt: skip
    zk.ops.add_noise_([whole], streams=[9], **call, **of_rank1(dist, [75]))
    zk.ops.add_noise_(
        shards, streams=[9] * len(shards), offsets=cuts[:-1], **call,
        **of_rank1(dist, [75] * len(shards)),
    )  # fmt: skip
    assert same_bits(whole, torch.cat(shards))


@pytest.mark.parametrize("mask", ["none", "random", "magnitude", "bits"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_step_equals_one_call_a_step(dtype, rounding, mask):
    w = varied(3001, dtype)
    seeds, coeffs = [1, 2, 3, 4], [0.1, 0.0, -0.2, 1e-3]
    decays, rounding_seeds = [0.9, 1.0, 1.0, 0.99], [5, 6, 7, 8]
    call = dict(mask=mask_of(mask, [w]), rounding=rounding)
    one_pass, steps = w.clone(), w.clone()
    zk.ops.add_noise_(
        [one_pass], seeds, coeffs, decay=decays, rounding_seed=rounding_seeds, each_step=True,
        **call,
    )  # fmt: skip
    for s, c, d, r in zip(seeds, coeffs, decays, rounding_seeds, strict=True):
        zk.ops.add_noise_([steps], [s], [c], decay=d, rounding_seed=r, **call)
    assert same_bits(one_pass, steps)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_out_of_place_equals_in_place(dtype, backend):
    if dtype is torch.float64 and backend == "native":
        backend = None
    w = [varied(n, dtype, n) for n in (1, 130, 2001)]
    before = [t.clone() for t in w]
    out = [torch.full_like(t, math.nan) for t in w]
    expected = [t.clone() for t in w]
    call = dict(seeds=[1, 2], coeffs=[0.5, -0.1], mask=masks.Random(0.5, 3), backend=backend)
    zk.ops.add_noise(w, out, **call)
    zk.ops.add_noise_(expected, **call)
    for a, b, original, kept in zip(out, expected, before, w, strict=True):
        assert same_bits(a, b)
        assert torch.equal(bits(original), bits(kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_coefficients_write_nothing(dtype):
    p = varied(1000, dtype)
    before, out = bits(p).clone(), torch.empty_like(p)
    zk.ops.add_noise_([p], [1, 2], [0.0, -0.0], rounding="stochastic")
    zk.ops.add_noise([p], [out], [1], [0.0])
    assert torch.equal(bits(p), before) and torch.equal(bits(out), before)


@pytest.mark.parametrize("mask", ["random", "magnitude", "bits"])
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_elements_keep_their_bits(dtype, backend, mask):
    p = varied(4099, dtype)
    if dtype is torch.float16:
        p.view(torch.int16)[::97] = 0x7C01  # a signalling NaN, which a conversion would change
    before = p.clone()
    m = mask_of(mask, [p])
    zk.ops.add_noise_([p], [1], [1.0], decay=0.5, mask=m, backend=backend)
    if mask == "random":
        keep = zk.noise.mask(4099, 0.3, seed=2**40 + 9)
    elif mask == "magnitude":
        keep = before.float().abs() <= 0.01
    else:
        keep = torch.rand(4099, generator=torch.Generator().manual_seed(3)) < 0.5
    assert torch.equal(bits(p)[~keep], bits(before)[~keep])
    finite = keep & before.isfinite() & (before.abs() < 1)
    assert (bits(p)[finite] != bits(before)[finite]).float().mean() > 0.9


def test_reference_reads_like_its_formula():
    w, decay, c = torch.randn(1000), 0.875, 2.0**-7
    p = w.clone()
    zk.ops.add_noise_([p], [6], [c], streams=[3], decay=decay, backend="reference")
    z = zk.noise.gaussian(1000, seed=6, stream=3)
    # decay and c scale by powers of two or few bits, so that binary64 holds the sum exactly
    # enough for one rounding to be the right one almost always; the exact test is hypothesis's.
    exact = (w * decay).double() + c * z.double()
    assert (p.double() - exact).abs().max() <= 2.0**-24 * exact.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    c=st.floats(width=32, allow_nan=False, allow_infinity=False),
    w=st.lists(st.floats(width=32, allow_nan=False), min_size=8, max_size=8),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_backend_rounds_the_exact_sum_once(c, w, seed):
    from fractions import Fraction

    weight = torch.tensor(w)
    results = []
    for backend, isa in [("reference", ""), *(("native", isa) for isa in ISAS)]:
        os.environ["ZOKERNELS_ISA"] = isa
        try:
            p = weight.clone()
            zk.ops.add_noise_([p], [seed], [c], backend=backend)
        finally:
            del os.environ["ZOKERNELS_ISA"]
        results.append(p)
        assert same_bits(results[0], p)
    z = zk.noise.gaussian(8, seed=seed)
    for wi, zi, pi in zip(w, z.tolist(), results[0].tolist(), strict=True):
        if not math.isfinite(wi) or not math.isfinite(pi):
            continue
        exact = Fraction(c) * Fraction(zi) + Fraction(wi)
        below, above = (
            float(torch.nextafter(torch.tensor(pi), torch.tensor(to)))
            for to in (-math.inf, math.inf)
        )
        error = abs(exact - Fraction(pi))
        for neighbour in (below, above):
            if math.isfinite(neighbour):
                assert error <= abs(exact - Fraction(neighbour))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_unbiased(dtype):
    # One value, rounded under many seeds: the mean of n roundings by a step of h has standard
    # deviation at most h/2/sqrt(n); five of them are allowed, plus the 2^-16 grain of the draw.
    n, value = 200_000, 1.0 + 1 / 3000
    step = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10
    w = torch.ones(n, dtype=dtype)
    zk.ops.add_noise_([w], [1], [1e-30], decay=value, rounding="stochastic", rounding_seed=5)
    assert set(w.unique().tolist()) <= {1.0, 1.0 + step}
    assert abs(w.double().mean().item() - value) < step * (2.5 / math.sqrt(n) + 2.0**-16)


def test_stochastic_rounding_overflows_to_infinity_and_passes_specials():
    for dtype, largest in ((torch.bfloat16, 3.3895e38), (torch.float16, 65504.0)):
        w = torch.tensor([largest] * 64 + [math.inf, -math.inf, math.nan]).to(dtype)
        zk.ops.add_noise_([w], [1], [1e-30], decay=1.0019, rounding="stochastic")
        assert w[:64].isinf().any() and not w[:64].isnan().any()
        assert w[64] == math.inf and w[65] == -math.inf and w[66].isnan()


def test_float64_is_computed_in_binary64():
    w = torch.randn(100, dtype=torch.float64)
    p, c = w.clone(), 0.1
    zk.ops.add_noise_([p], [3], [c], decay=0.7)
    z = zk.noise.gaussian(100, seed=3).double()
    assert torch.equal(p, z * c + w * 0.7)


def test_mixed_types_and_empty_list_in_one_call():
    tensors = [torch.randn(50).to(d) for d in (*DTYPES, torch.float64)]
    alone = [t.clone() for t in tensors]
    zk.ops.add_noise_(tensors, [1], [0.5], streams=[4, 5, 6, 7])
    for t, stream in zip(alone, (4, 5, 6, 7), strict=True):
        zk.ops.add_noise_([t], [1], [0.5], streams=[stream])
    assert all(same_bits(a, b) for a, b in zip(tensors, alone, strict=True))
    zk.ops.add_noise_([], [1], [0.5])


def test_autograd_notices_the_write():
    w = torch.randn(5, requires_grad=True)
    y = (w * w).sum()
    zk.ops.add_noise_([w], [1], [0.5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@needs_native
def test_flushing_of_subnormals_in_the_program_changes_nothing():
    w = varied(5000, torch.float32)
    expected, got = w.clone(), w.clone()
    zk.ops.add_noise_([expected], [1], [1e-37])
    torch.set_flush_denormal(True)
    try:
        zk.ops.add_noise_([got], [1], [1e-37])
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(expected), bits(got))


@needs_native
def test_a_forked_child_does_not_hang():
    code = (
        "import os, torch, zokernels as zk\n"
        # Both are made here: torch's own parallel loops hang in a child.
        "p, q = torch.zeros(2, 1 << 20)\n"
        "zk.ops.add_noise_([p], [1], [1.0])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    zk.ops.add_noise_([q], [1], [1.0])\n"
        "    os._exit(0 if q.numpy().tobytes() == p.numpy().tobytes() else 3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_touches_no_transformers_and_no_global_state():
    code = (
        "import sys, torch\n"
        "before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "import zokernels\n"
        "assert 'transformers' not in sys.modules and not torch.cuda.is_initialized()\n"
        "assert torch.equal(before[0], torch.get_rng_state())\n"
        "assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

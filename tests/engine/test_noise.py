"""The noise, version 1: bits, addresses, exactness and refusals."""

import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from zokernels import noise

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("noise_v1.json").read_text())
LOW32 = 0xFFFFFFFF
DRAWS = {
    "gaussian": noise.gaussian,
    "rademacher": noise.rademacher,
    "mask": lambda numel, **where: noise.mask(numel, 0.3, **where),
    "rounding": lambda numel, *, seed, stream=0, offset=0, device="cpu": noise.uniform16(
        numel, noise.ROUNDING, seed, stream, offset, device
    ),
}


# Salmon et al., Random123, kat_vectors: "philox4x32 10".
KNOWN_ANSWERS = [
    pytest.param(
        (0, 0),
        (0, 0, 0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        id="zeros",
    ),
    pytest.param(
        (LOW32, LOW32),
        (LOW32, LOW32, LOW32, LOW32),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        id="ones",
    ),
    pytest.param(
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(key, counter, expected):
    words = noise.philox4x32(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected
    assert philox(key, counter) == list(expected)


def test_first_block_under_key_1_2():
    expected = [
        "-0x1.8d30aep-2",
        "-0x1.9d4820p+0",
        "0x1.eb6938p-1",
        "0x1.1b86a8p+0",
        "-0x1.1ab3dcp+0",
        "-0x1.24786cp+1",
        "-0x1.feaa80p-4",
        "0x1.a50490p+0",
    ]
    z = noise.gaussian(8, seed=1 + (2 << 32))
    assert z.dtype == torch.float32
    assert z.tolist() == [float.fromhex(h) for h in expected]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=f"{c['kind']}-{c['seed']}-{c['stream']}-{c['offset']}-{c['numel']}")
        for c in GOLDEN["cases"]
    ],
)
def test_golden_vectors(case):
    kind, numel = case["kind"], case["numel"]
    where = {
        "seed": int(case["seed"]),
        "stream": case["stream"],
        "offset": int(case["offset"]),
    }
    if kind == "gaussian":
        got = noise.gaussian(numel, **where).view(torch.int32)
        expected = [struct.unpack(">i", bytes.fromhex(h))[0] for h in case["values"].split()]
    elif kind == "rademacher":
        got = noise.rademacher(numel, **where)
        expected = [{"+": 1.0, "-": -1.0}[sign] for sign in case["values"]]
    elif kind == "mask":
        got = noise.mask(numel, case["keep"], **where)
        expected = [{"1": True, "0": False}[bit] for bit in case["values"]]
    else:
        got = DRAWS["rounding"](numel, **where)
        expected = [int(h, 16) for h in case["values"].split()]
    assert GOLDEN["version"] == noise.VERSION
    assert len(expected) == numel
    assert got.tolist() == expected


def philox(key, counter):
    """Philox4x32-10 on Python integers."""
    k, c = list(key), list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        left, right = (second >> 32) ^ c[1] ^ k[0], (first >> 32) ^ c[3] ^ k[1]
        c = [left, second & LOW32, right, first & LOW32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def block_words(kind, seed, stream, block):
    return philox((seed % 2**32, seed >> 32), (block % 2**32, block >> 32, stream, kind))


def round32(exact):
    """The binary32 number nearest to a fraction, ties to even, as a fraction."""
    if exact == 0:
        return exact
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    return round(exact / quantum) * quantum


C0, C1, C2 = (
    Fraction(struct.unpack(">f", bytes.fromhex(h))[0]) for h in ("3eb57eaf", "a10acaa5", "020674a6")
)


def normals(words):
    """The eight normals of four words, every operation exact and then rounded to binary32."""
    v = []
    for w in words:
        x, p = [], []
        for half in (w & 0xFFFF, w >> 16):
            number = (half << 16 | 0x8000) - (half >> 15 << 32)
            x.append(round32(Fraction(number)))
            square = round32(x[-1] * x[-1])
            q = round32(square * C2 + C1)
            p.append(round32(q * square + C0))
        high = round32(x[1] * p[1])
        v += [round32(x[0] * p[0] + high), round32(x[0] * p[0] - high)]
    a, b, c, d = (round32(t) for t in (v[0] + v[2], v[0] - v[2], v[4] + v[6], v[4] - v[6]))
    e, f, g, h = (round32(t) for t in (v[1] + v[3], v[1] - v[3], v[5] + v[7], v[5] - v[7]))
    z = a + c, e + g, b + d, f + h, a - c, e - g, b - d, f - h
    return [float(round32(t) / 2**29) for t in z]


@pytest.mark.parametrize(
    ("seed", "stream", "block", "blocks"),
    [
        pytest.param(0, 0, 0, 150, id="origin"),
        pytest.param(2**64 - 1, 2**32 - 1, 2**60 - 51, 50, id="last-elements"),
        pytest.param(2**63 + 99, 2**31, 2**32 - 50, 100, id="across-the-block-high-word"),
    ],
)
def test_gaussian_equals_exact_rational_arithmetic(seed, stream, block, blocks):
    numel = min(8 * blocks, 2**63 - 1 - 8 * block)
    expected = [z for b in range(blocks) for z in normals(block_words(0, seed, stream, block + b))]
    z = noise.gaussian(numel, seed=seed, stream=stream, offset=8 * block)
    assert bits(z) == bits(torch.tensor(expected[:numel], dtype=torch.float32))


def bits(z):
    # Bits, since == does not tell +0 from -0.
    return z.view(torch.int32).tolist()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((0x00000000,) * 4, id="zeros"),
        pytest.param((0xFFFFFFFF,) * 4, id="ones"),
        pytest.param((0x7FFF7FFF,) * 4, id="largest"),
        pytest.param((0x80008000,) * 4, id="smallest"),
        pytest.param((0x7FFF8000, 0x80007FFF) * 2, id="opposite-ends"),
        pytest.param((0x0000FFFF, 0xFFFF0000, 0x12341234, 0x1234EDCB), id="cancelling-halves"),
        pytest.param((0x7FFFFFFF, 0x80000000, 0x00008000, 0xFFFF7FFF), id="int32-ends"),
    ],
)
def test_transform_of_chosen_words_equals_exact_rational_arithmetic(words):
    z = noise._hadamard_normals(tuple(torch.tensor([w]) for w in words))[0]
    assert bits(z) == bits(torch.tensor(normals(words), dtype=torch.float32))


def fma_in_binary64(a, b, c):
    """The binary64 sum a·b + c, and where rounding it to binary32 could differ from a true fma.

    The product of two binary32 numbers is exact in binary64. Rounding twice then differs from
    rounding once only where the sum is inexact and falls on the midpoint of two binary32 numbers.
    """
    product = a * b
    total = product + c
    # Knuth's TwoSum: `error` is what the sum lost, exactly.
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    midpoint = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    return total, midpoint & (error != 0)


def test_the_check_of_exactness_finds_a_case_that_rounds_twice():
    a, b, c = 2.0**-24 * (1 + 2.0**-15), 1 - 2.0**-15, 1 + 2.0**-23
    total, wrong = fma_in_binary64(np.array([a, a]), b, np.array([c, 0.0]))
    once = round32(Fraction(a) * Fraction(b) + Fraction(c))
    assert float(np.float32(total[0])) != float(once)
    assert wrong.tolist() == [True, False]


def quintic_inputs():
    return noise._float_of_int32(torch.arange(65536) << 16 | 0x8000)


def test_binary64_fma_of_the_quintic_is_exact_for_all_inputs():
    square = (quintic_inputs() ** 2).double().numpy()
    q, wrong = fma_in_binary64(square, np.float64(noise._C2), np.float64(noise._C1))
    assert not wrong.any()
    p, wrong = fma_in_binary64(q.astype(np.float32).astype(np.float64), square, noise._C0)
    assert not wrong.any()
    # The midpoint test above reads binary64 bits as if no result were subnormal in binary32.
    assert min(np.abs(q).min(), np.abs(p).min()) > 2.0**-126


def test_binary64_fma_of_the_pair_is_exact_for_all_pairs_of_halves():
    x = quintic_inputs()
    p = noise._quintic(x)
    y = (x * p).double().numpy()
    product = x.double().numpy() * p.double().numpy()
    # |x·p ± y| < 2**31, so a sum of multiples of 2**-22 has 53 bits and is exact in binary64.
    assert np.abs(product).max() + np.abs(y).max() < 2.0**31
    assert (y % 2.0**-22 == 0).all()
    inexact = np.flatnonzero(product % 2.0**-22 != 0)
    assert 0 < len(inexact) < 4096
    # y is odd in x, so that going through every y covers both signs of yh.
    assert np.array_equal(np.sort(y), np.sort(-y))
    for i in inexact:
        total, wrong = fma_in_binary64(x[i].item(), p[i].item(), y)
        assert not wrong.any()
        assert np.abs(total[total != 0]).min() > 2.0**-126


SHARDS = [
    pytest.param(0, [0, 1, 7, 8, 9, 200, 0, 300], id="from-0"),
    pytest.param(8 * 2**32 - 129, [1, 128, 3, 400, 5], id="across-2**35"),
    pytest.param(128 * 2**32 - 77, [77, 1, 127, 129], id="across-2**39"),
]


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("offset", "sizes"), SHARDS)
def test_shards_are_slices_of_the_whole(kind, offset, sizes):
    where = {"seed": 2**40 + 3, "stream": 11}
    whole = DRAWS[kind](sum(sizes), offset=offset, **where)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    shards = [
        DRAWS[kind](n, offset=offset + s, **where) for s, n in zip(starts, sizes, strict=True)
    ]
    assert [len(shard) for shard in shards] == sizes
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"seed": 6}, id="next-seed"),
        pytest.param({"seed": 5 + 2**32}, id="seed-high-word"),
        pytest.param({"seed": 5 + 2**63}, id="seed-top-bit"),
        pytest.param({"stream": 1}, id="next-stream"),
        pytest.param({"stream": 2**32 - 1}, id="last-stream"),
        pytest.param({"offset": 128}, id="next-block"),
        pytest.param({"offset": 128 * 2**32}, id="block-high-word"),
        pytest.param({"stream": 5, "seed": 0}, id="seed-and-stream-exchanged"),
    ],
)
def test_every_part_of_the_address_matters(kind, other):
    draw = DRAWS[kind]
    assert not torch.equal(draw(4096, seed=5), draw(4096, **({"seed": 5} | other)))


def test_kinds_draw_different_words():
    drawn = {tuple(noise.uniform16(64, kind, 5, 0, 0, "cpu").tolist()) for kind in range(4)}
    assert len(drawn) == 4


def test_rademacher_reads_bits_from_the_least_significant_of_word_0():
    signs = noise.rademacher(256, seed=2**63 + 7, stream=9, offset=128 * 2**32)
    words = [block_words(1, 2**63 + 7, 9, 2**32 + block) for block in range(2)]
    # index // 128 names the block, index % 128 // 32 the word, index % 32 the bit.
    expected = [1.0 if words[i // 128][i % 128 // 32] >> (i % 32) & 1 else -1.0 for i in range(256)]
    assert signs.dtype == torch.float32
    assert signs.tolist() == expected


@pytest.mark.parametrize("kind", [noise.MASK, noise.ROUNDING])
def test_uniform16_takes_the_low_half_of_each_word_first(kind):
    u = noise.uniform16(16, kind, 2**63 + 7, 9, 8 * 2**32, "cpu")
    words = [w for block in range(2) for w in block_words(kind, 2**63 + 7, 9, 2**32 + block)]
    assert u.tolist() == [half for w in words for half in (w & 0xFFFF, w >> 16)]


@pytest.mark.parametrize(
    ("keep", "threshold"),
    [
        pytest.param(0, 0, id="none"),
        pytest.param(1, 65536, id="all"),
        pytest.param(1.0 - 2.0**-17, 65536, id="tie-rounds-to-all"),
        pytest.param(2.0**-17, 0, id="tie-rounds-to-none"),
        pytest.param(2.0**-16, 1, id="smallest-share"),
        pytest.param(1.5 / 65536, 2, id="tie-up-to-even"),
        pytest.param(2.5 / 65536, 2, id="tie-down-to-even"),
        pytest.param(0.1, 6554, id="tenth"),
        pytest.param(0.5, 32768, id="half"),
    ],
)
def test_mask_keeps_below_the_rounded_threshold(keep, threshold):
    numel = 1 << 18
    kept = noise.mask(numel, keep, seed=3, stream=2, offset=5)
    u = noise.uniform16(numel, noise.MASK, 3, 2, 5, "cpu")
    assert kept.dtype == torch.bool
    assert torch.equal(kept, u < threshold)
    share = threshold / 65536
    # Five binomial standard deviations.
    assert abs(int(kept.sum()) - numel * share) <= 5 * (numel * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("kind", DRAWS)
def test_settings_of_torch_change_nothing(kind):
    expected = DRAWS[kind](300, seed=8, offset=3)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        wide = DRAWS[kind](300, seed=8, offset=3)
    finally:
        torch.set_default_dtype(default)
    with torch.enable_grad():
        graded = DRAWS[kind](300, seed=8, offset=3)
    with torch.inference_mode():
        inferred = DRAWS[kind](300, seed=8, offset=3)
    for got in (wide, graded, inferred):
        assert got.dtype == expected.dtype
        assert not got.requires_grad
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", DRAWS)
def test_global_generator_is_neither_read_nor_moved(kind):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = DRAWS[kind](300, seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(DRAWS[kind](300, seed=8), first)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("seed", -1, id="seed-negative"),
        pytest.param("seed", 2**64, id="seed-65-bits"),
        pytest.param("seed", 1.0, id="seed-float"),
        pytest.param("seed", True, id="seed-bool"),
        pytest.param("seed", None, id="seed-none"),
        pytest.param("stream", -1, id="stream-negative"),
        pytest.param("stream", 2**32, id="stream-33-bits"),
        pytest.param("offset", -1, id="offset-negative"),
        pytest.param("offset", 2**63, id="offset-64-bits"),
        pytest.param("offset", 0.0, id="offset-float"),
        pytest.param("numel", -1, id="numel-negative"),
        pytest.param("numel", 8.0, id="numel-float"),
    ],
)
def test_arguments_out_of_range_are_named(kind, name, value):
    arguments = {"numel": 8, "seed": 1} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name} is {value}, but .*\.$"):
        DRAWS[kind](**arguments)


@pytest.mark.parametrize("kind", DRAWS)
def test_indices_end_before_2_to_the_63(kind):
    assert len(DRAWS[kind](9, seed=1, offset=2**63 - 10)) == 9
    with pytest.raises(ValueError, match=rf"^offset \+ numel is {2**63}, but .*\.$"):
        DRAWS[kind](9, seed=1, offset=2**63 - 9)


@pytest.mark.parametrize("keep", [1.5, -0.25, float("nan"), float("inf")])
def test_shares_out_of_range_are_named(keep):
    with pytest.raises(ValueError, match=rf"^keep is {keep}, but .*\.$"):
        noise.mask(8, keep, seed=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", DRAWS)
def test_device_changes_nothing(kind):
    where = {"seed": 2**63 + 5, "stream": 2**32 - 1, "offset": 8 * 2**32 - 5001}
    on_device = DRAWS[kind](100_003, device="cuda", **where)
    assert on_device.device.type == "cuda"
    assert torch.equal(on_device.cpu(), DRAWS[kind](100_003, **where))

"""The noise, version 1: bits, addresses, exactness and refusals."""

import functools
import json
import struct
from pathlib import Path

import pytest
import torch
from test_noise_exact import LOW32, block_words, philox

from zokernels import noise

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("noise_v1.json").read_text())
DRAWS = {
    "gaussian": noise.gaussian,
    "rademacher": noise.rademacher,
    "mask": lambda numel, **where: noise.mask(numel, 0.3, **where),
    "rounding": lambda numel, *, seed, stream=0, offset=0, device="cpu": noise.uniform16(
        numel, noise.ROUNDING, seed, stream, offset, device
    ),
    # Part of a parameter of 37 columns.
    "rank1": lambda numel, *, seed, stream=0, offset=0, device="cpu": noise.signs_of_rank1(
        numel, 37, seed, stream, offset, device
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
        pytest.param(c, id="-".join(str(v) for k, v in c.items() if k != "values"))
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
    elif kind in ("rademacher", "rank1"):
        draw = noise.rademacher
        if kind == "rank1":
            draw = functools.partial(
                noise.signs_of_rank1, columns=int(case["columns"]), device="cpu"
            )
        got = draw(numel, **where)
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
    if "shape" in case:
        whole = noise.rank1(case["shape"], seed=where["seed"], stream=where["stream"])
        assert whole.shape == tuple(case["shape"]) and whole.flatten().tolist() == expected


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
    for block in (0, 1, 2**32):
        drawn = set()
        for kind, size in noise.BLOCK.items():
            words, _ = noise._blocks(1, 5, 0, block * size, kind, "cpu")
            assert [int(w) for w in words] == block_words(kind, 5, 0, block)
            drawn |= {int(w) for w in words}
        assert list(noise.BLOCK) == list(range(6)) and len(drawn) == 24


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

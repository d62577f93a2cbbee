"""The passes under hypothesis: native equals the reference, nonsense is refused by a sentence."""

import math

import pytest
import torch
from conftest import bits, needs_native, same_bits, varied
from hypothesis import event, given
from hypothesis import strategies as st
from test_ops import DISTS, ISAS

import zokernels as zk
from zokernels import masks
from zokernels.backends import rules

U64 = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**32, 2**64 - 1])
SMALL = st.floats(-2, 2, width=32)
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHARE = st.floats(0, 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
STATE = st.sampled_from([torch.float32, torch.bfloat16])
# Around the places where a group of blocks ends, and where the high word of a counter changes.
NUMELS = st.integers(0, 40) | st.sampled_from([63, 65, 127, 129, 1023, 1025, 2047, 4097])
OFFSETS = (
    st.integers(0, 300)
    | st.sampled_from([2**35 - 5, 2**39 - 70, 2**45 - 1])
    | U64.map(lambda x: x // 16)
)

COLUMNS = (
    st.none() | st.integers(0, 300) | st.sampled_from([768, 4096, 2**39 + 100, 2**45, 2**63 - 1])
)


@st.composite
def weights(draw, dtype=None):
    """A contiguous tensor of some shape that starts anywhere in its storage, with odd numbers."""
    dtype = dtype or draw(DTYPES)
    numel, shift = draw(NUMELS), draw(st.integers(0, 7))
    whole = varied(numel + shift, dtype, draw(st.integers(0, 3)))[shift:]
    kind = draw(st.sampled_from(["flat", "column", "row", "matrix", "strided"]))
    if kind == "matrix":
        columns = draw(st.integers(1, 200))
        return whole[: numel // columns * columns].view(-1, columns)
    if kind == "column":
        return whole.reshape(numel, 1)
    if kind == "row":
        return whole.reshape(1, 1, numel)
    if kind == "strided" and numel:
        # Contiguous, since a dimension of one element is never stepped along.
        return whole.as_strided((numel, 1), (1, 77), whole.storage_offset())
    return whole


@st.composite
def maskings(draw, tensors):
    kind = draw(st.sampled_from(["none", "none", "random", "magnitude", "bits"]))
    if kind == "random":
        keeps = [draw(SHARE) for _ in tensors]
        return masks.Random(keeps if draw(st.booleans()) else draw(SHARE), draw(U64))
    if kind == "magnitude":
        return masks.Magnitude(draw(st.floats(0, width=32, allow_nan=False)))
    if kind == "bits":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 5)))
        return masks.Bits([torch.rand(t.shape, generator=generator) < 0.5 for t in tensors])
    return None


@st.composite
def calls(draw, updating=False):
    """Tensors, and the keywords of a pass over them."""
    tensors = draw(st.lists(weights(), min_size=1, max_size=3))
    queries, steps = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    each_step = draw(st.sampled_from([queries, False]))
    count, times = queries * steps, steps if each_step else 1

    def one_or_each(strategy):
        if each_step and draw(st.booleans()):
            return [draw(strategy) for _ in range(times)]
        return draw(strategy)

    dist = draw(st.sampled_from(DISTS))
    columns = draw(st.none() | st.tuples(*[COLUMNS] * len(tensors))) if dist == "rank1" else None
    call = dict(
        seeds=[draw(U64) for _ in range(count)],
        coeffs=[draw(SMALL | ANY) for _ in range(count)],
        streams=[draw(st.integers(0, 2**32 - 1)) for _ in tensors],
        offsets=[draw(OFFSETS) for _ in tensors],
        columns=columns,
        dist=dist,
        mask=draw(maskings(tensors)),
        decay=one_or_each(SMALL | st.just(1.0)),
        rounding=draw(st.sampled_from(["nearest", "stochastic"])),
        rounding_seed=one_or_each(U64),
        each_step=each_step,
    )
    if updating:
        rule = draw(st.sampled_from(["sign", "momentum", "adam"]))
        call |= dict(
            rule=rule,
            lr=one_or_each(SMALL),
            beta=draw(SHARE),
            betas=(draw(st.floats(0, 0.999)), draw(st.floats(0, 0.999))),
            adam_eps=draw(st.floats(0, 1, width=32)),
            amsgrad=draw(st.booleans()),
            step=draw(st.none() | st.integers(1, 10**6)),
        )
        event(rule)
    return tensors, call


def states_for(tensors, call, kinds):
    names = rules.state_names(call["rule"], call["amsgrad"])
    made = []
    for i, t in enumerate(tensors):
        # v and v_max are means of squares.
        numbers = [varied(t.numel(), torch.float32, 7 + i), varied(t.numel(), torch.float32, 9)]
        made.append([(numbers[bool(j)].abs() if j else numbers[0]).to(kinds[j])
                     for j in range(len(names))])  # fmt: skip
    return made


def clones(tensors):
    """Copies of the same shapes, whose storage begins with them."""
    return [t.clone() for t in tensors]


def equal(a, b):
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=ISAS or [None])
def native(request, monkeypatch):
    monkeypatch.setenv("ZOKERNELS_ISA", request.param or "")


@needs_native
@given(case=calls(), threads=st.sampled_from([1, 2]))
def test_add_noise_native_equals_the_reference(native, case, threads):
    tensors, call = case
    in_place, out, kept = clones(tensors), clones(tensors), clones(tensors)
    zk.ops.add_noise_(expected := clones(tensors), backend="reference", **call)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        zk.ops.add_noise_(in_place, backend="native", **call)
        zk.ops.add_noise(tensors, out, backend="native", **call)
    finally:
        torch.set_num_threads(before)
    assert equal(in_place, expected)
    assert equal(out, expected)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors, kept, strict=True))


@needs_native
@given(case=calls(updating=True), kinds=st.lists(STATE, min_size=2, max_size=2))
def test_update_native_equals_the_reference(native, case, kinds):
    tensors, call = case
    kinds = [*kinds, kinds[-1]]
    results = []
    for backend in ("reference", "native"):
        params, states = clones(tensors), states_for(tensors, call, kinds)
        zk.ops.apply_update_(params, states, backend=backend, **call)
        results.append([*params, *(s for state in states for s in state)])
    assert equal(*results)


@needs_native
@pytest.mark.parametrize("dist", DISTS)
def test_a_zero_keeps_its_sign(native, dist):
    """What is 0 has a sign, too: of weights, of coefficients, and of a learning rate of 0."""
    for coeff in (0.0, -0.0):
        for rule, options in ((None, {}), ("sign", dict(lr=0.0)), ("sign", dict(lr=-0.0))):
            call = dict(seeds=[3] * 5, coeffs=[coeff] * 5, dist=dist, decay=0.5, **options)
            results = []
            for backend in ("reference", "native"):
                w = torch.tensor([0.0, -0.0] * 1000).view(8, 250)
                if rule:
                    zk.ops.apply_update_([w], None, rule, backend=backend, **call)
                else:
                    zk.ops.add_noise_([w], backend=backend, **call)
                results.append(w)
            assert torch.equal(bits(results[0]), bits(results[1]))


@given(case=calls(), cuts=st.lists(st.integers(0, 5000), max_size=4))
def test_shards_of_a_tensor_get_what_the_whole_gets(case, cuts):
    tensors, call = case
    if isinstance(call["mask"], masks.Bits):
        call["mask"] = None
    whole, parts = tensors[0].clone(), tensors[0].clone().reshape(-1)
    if isinstance(call["mask"], masks.Random):
        call["mask"] = masks.Random(0.5, call["mask"].seed)
    (stream, *_), (offset, *_) = call.pop("streams"), call.pop("offsets")
    given = call.pop("columns")
    zk.ops.add_noise_(
        [whole], streams=[stream], offsets=[offset], columns=given and given[:1], **call
    )
    edges = sorted({0, parts.numel(), *(c % (parts.numel() + 1) for c in cuts)})
    shards = [parts[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    offsets = [offset + a for a in edges[:-1]]
    columns = None
    if call["dist"] == "rank1":
        # A part's own shape does not say how many columns there are.
        of_whole = given[0] if given else None
        columns = [zk.noise.columns_of(whole.shape) if of_whole is None else of_whole]
        columns *= len(shards)
    zk.ops.add_noise_(
        shards, streams=[stream] * len(shards), offsets=offsets, columns=columns, **call
    )
    assert same_bits(whole.reshape(-1), parts)


NONSENSE = st.sampled_from(
    [
        None, True, -1, 0, 1.5, 2**32, 2**64, 2**80, -(2**70), 1e39, 1e400, math.nan, -math.inf,
        "", "a", "gaussian", b"x", 1j, object(), [], (), {}, [None], ["a"], [[1]], [-1], [2**64],
        [math.nan], [1, 2, 3, 4, 5, 6, 7], {"a": 1}, torch.tensor(1.0), torch.ones(3),
        torch.tensor([math.nan]), lambda: 1, range(2), iter([]), masks.Random(0.5, 1),
        masks.Random([0.5] * 9, 1), masks.Magnitude([]), masks.Bits([]), int, (0.9,), (2.0, 0.5),
        ("a", 0.5), [torch.ones(2)], [{"m": torch.ones(2)}], {"m": torch.ones(2)},
    ]
)  # fmt: skip
TENSORS = st.sampled_from(
    [
        torch.ones(4, 6).t(), torch.ones(3).expand(2, 3), torch.arange(3), torch.ones(2) > 0,
        torch.ones(2, dtype=torch.complex64), torch.eye(3).to_sparse(),
        torch.ones(3, device="meta"), torch.ones(6)[::2], 3, None, "w", [torch.ones(2)],
        torch.ones(3, dtype=torch.float64),
    ]
)  # fmt: skip


@given(data=st.data(), updating=st.booleans())
def test_nonsense_is_refused_by_a_sentence_and_nothing_is_written(data, updating):
    """One argument is of a wrong type or length, or out of range; some happen to fit."""
    tensors, call = data.draw(calls(updating))
    states = states_for(tensors, call, [torch.float32] * 3) if updating else None
    if updating:
        call["states"] = states
    params = list(tensors)
    name = data.draw(st.sampled_from(["params", "backend", *call]))
    value = data.draw(NONSENSE, label=name)
    if name == "params":
        if data.draw(st.booleans()):
            value = [*params, data.draw(TENSORS)]
        params = value
    else:
        call[name] = value
    held = [*tensors, *(s for state in states or () for s in state)]
    before = [bits(t).clone() for t in held]
    run = zk.ops.apply_update_ if updating else zk.ops.add_noise_
    try:
        run(params, **call)
    except (TypeError, ValueError, RuntimeError) as error:
        assert len(str(error)) > 30 and str(error).endswith("."), (type(error), str(error))
        assert all(torch.equal(bits(t), b) for t, b in zip(held, before, strict=True))
        event(f"{name} refused")
    else:
        event(f"{name} accepted")

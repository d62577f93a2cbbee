"""apply_update_: each rule's formula, and every backend against the reference, bit for bit."""

import math

import pytest
import torch
from conftest import bits, needs_native, same_bits, varied
from test_ops import COLUMNS, DISTS, DTYPES, ISAS, SIZES, mask_of, of_rank1, unaligned

import zokernels as zk
from zokernels import masks

RULES = {
    "sign": dict(rule="sign"),
    "momentum": dict(rule="momentum", beta=0.8),
    "adam": dict(rule="adam", betas=(0.85, 0.97), adam_eps=1e-6),
    "adam corrected": dict(rule="adam", betas=(0.85, 0.97), adam_eps=1e-6, step=3),
    "amsgrad": dict(rule="adam", betas=(0.85, 0.97), adam_eps=1e-6, amsgrad=True),
}
STATES = {"sign": (), "momentum": ("m",), "amsgrad": ("m", "v", "v_max")}
# Each rule with each type of its state, and the one that keeps none once.
KEPT = [
    pytest.param(name, state, id=f"{name}-{kind}")
    for name in RULES
    for kind, state in {"m32": torch.float32, "m16": torch.bfloat16}.items()
    if STATES.get(name, True) or kind == "m32"
]


def states_of(name, tensors, dtype=torch.float32):
    """States in the middle of a run: m of both signs, v and v_max not negative."""
    made = []
    for i, t in enumerate(tensors):
        generator = torch.Generator().manual_seed(i)
        names = STATES.get(name, ("m", "v"))
        state = {n: torch.randn(t.numel(), generator=generator) * 0.3 for n in names}
        made.append({n: (x if n == "m" else x.square()).to(dtype) for n, x in state.items()})
    return made


def flat(tensors, states):
    return [*tensors, *(t for state in states for t in state.values())]


@needs_native
@pytest.mark.parametrize("each_step", [0, 2], ids=["once", "each_step"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("mask", ["none", "random", "magnitude", "bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "state"), KEPT)
def test_native_equals_reference(name, dtype, state, mask, rounding, each_step, monkeypatch):
    # A third of the combinations with each distribution, so that each value meets all.
    dist = DISTS[(len(name) + len(mask) + (state is torch.float32) + bool(each_step)) % 3]
    tensors = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
    call = dict(
        seeds=[3, 2**63 + 5, 7, 8],
        coeffs=[1e-3, -0.5, 2e-30, 0.25],
        lr=[0.01, 0.03] if each_step else 0.02,
        streams=[5, 2**32 - 1, 0, 1, 2, 3, 4, 6],
        offsets=[0, 3, 8, 2**35 - 4, 129, 1, 2**40 + 5, 2**35 - 2000],
        dist=dist,
        mask=mask_of(mask, tensors),
        decay=[0.99, 1.0] if each_step else 0.99,
        rounding=rounding,
        rounding_seed=[77, 2**64 - 1] if each_step else 2**64 - 2,
        each_step=each_step,
        **RULES[name],
        **of_rank1(dist, COLUMNS),
    )
    expected, before = [t.clone() for t in tensors], states_of(name, tensors, state)
    zk.ops.apply_update_(expected, before, backend="reference", **call)
    for isa in ISAS:
        monkeypatch.setenv("ZOKERNELS_ISA", isa)
        got = [unaligned(size, dtype, i) for i, size in enumerate(SIZES)]
        states = states_of(name, tensors, state)
        zk.ops.apply_update_(got, states, backend="native", **call)
        for e, g in zip(flat(expected, before), flat(got, states), strict=True):
            assert same_bits(e, g), f"{isa} differs from the reference at {e.numel()} elements"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_rule_reads_like_its_formula(name, dtype):
    # In binary64, from the same z; in float32 the passes round some five operations.
    n, seeds, coeffs, lr, decay = 200, [4, 9], [0.5, -0.125], 0.05, 0.9
    w = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (state,) = states_of(name, [w], dtype)
    old = {k: t.double().clone() for k, t in state.items()}
    p = w.to(dtype, copy=True)
    w = p.double().clone()
    zk.ops.apply_update_(
        [p], [state], seeds=seeds, coeffs=coeffs, lr=lr, decay=decay, **RULES[name]
    )
    g = sum(c * zk.noise.gaussian(n, seed=s).double() for s, c in zip(seeds, coeffs, strict=True))
    if name == "sign":
        expected = decay * w - lr * g.sign()
    elif name == "momentum":
        m = 0.8 * old["m"] + g
        expected = decay * w - lr * m
    else:
        m, v = 0.85 * old["m"] + 0.15 * g, 0.97 * old["v"] + 0.03 * g * g
        if name == "amsgrad":
            expected = decay * w - lr * m / (torch.maximum(old["v_max"], v).sqrt() + 1e-6)
        elif name == "adam":
            expected = decay * w - lr * m / (v.sqrt() + 1e-6)
        else:
            m_hat, v_hat = m / (1 - 0.85**3), v / (1 - 0.97**3)
            expected = decay * w - lr * m_hat / (v_hat.sqrt() + 1e-6)
    tolerance = 1e-14 if dtype is torch.float64 else 1e-6
    assert torch.allclose(p.double(), expected, rtol=tolerance, atol=tolerance)
    if "m" in state:
        assert torch.allclose(state["m"].double(), m, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_step_equals_one_call_a_step(name, dtype):
    w = varied(3001, dtype)
    one, many = w.clone(), w.clone()
    states = [states_of(name, [w], torch.bfloat16) for _ in range(2)]
    seeds, coeffs, call = [1, 2, 3, 4], [0.1, 0.0, -0.2, 1e-3], dict(RULES[name])
    lrs, decays, rounding = [0.1, 0.2], [0.9, 1.0], [5, 6]
    zk.ops.apply_update_(
        [one], states[0], seeds=seeds, coeffs=coeffs, lr=lrs, decay=decays, rounding="stochastic",
        rounding_seed=rounding, each_step=2, mask=masks.Magnitude(0.5), **call,
    )  # fmt: skip
    for i in range(2):
        if "step" in call:
            call["step"] = RULES[name]["step"] + i
        part = slice(2 * i, 2 * i + 2)
        zk.ops.apply_update_(
            [many], states[1], seeds=seeds[part], coeffs=coeffs[part], lr=lrs[i], decay=decays[i],
            rounding="stochastic", rounding_seed=rounding[i], mask=masks.Magnitude(0.5), **call,
        )  # fmt: skip
    for a, b in zip(flat([one], states[0]), flat([many], states[1]), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_masked_out_weights_and_states_keep_their_bits(backend):
    p = varied(4099, torch.bfloat16)
    before, states = p.clone(), states_of("amsgrad", [p])
    old = [{k: t.clone() for k, t in s.items()} for s in states]
    keep = torch.rand(4099, generator=torch.Generator().manual_seed(3)) < 0.5
    zk.ops.apply_update_(
        [p], states, seeds=[1], coeffs=[1.0], lr=0.5, decay=0.5, mask=masks.Bits([keep]),
        backend=backend, **RULES["amsgrad"],
    )  # fmt: skip
    assert torch.equal(bits(p)[~keep], bits(before)[~keep])
    for k, t in states[0].items():
        assert torch.equal(t[~keep], old[0][k][~keep])
        assert k == "v_max" or not torch.equal(t[keep], old[0][k][keep])


def test_a_bfloat16_state_is_unbiased():
    # m ← 0.9 m + c z at c·z far below half a step of bfloat16: to nearest, m would never move.
    n, m0 = 200_000, 1.0
    p, m = torch.zeros(n), torch.full((n,), m0, dtype=torch.bfloat16)
    zk.ops.apply_update_([p], [[m]], "momentum", [1], [1e-30], lr=0.1, beta=0.9995)
    # Below 1 a step is 2⁻⁸; five standard deviations of a mean of n roundings, and their grain.
    assert abs(m.double().mean().item() - 0.9995 * m0) < 2.0**-8 * (2.5 / math.sqrt(n) + 2.0**-16)
    assert torch.equal(p, m.float() * torch.tensor(-0.1))


def test_states_come_as_dicts_sequences_or_a_lone_tensor():
    results = []
    for form in (lambda m: {"m": m}, lambda m: [m], lambda m: (m,), lambda m: m):
        p, m = torch.ones(9), torch.ones(9)
        zk.ops.apply_update_([p], [form(m)], "momentum", [1], [0.5], lr=0.1)
        results.append((p, m))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def ones(n=4, dtype=torch.float32):
    return torch.ones(n, dtype=dtype)


BAD = {
    "rule": (dict(rule="rmsprop"), ValueError, "sign, momentum, adam"),
    "no states": (dict(states=None), ValueError, "one entry for each of the 1"),
    "too many": (dict(states=[[ones()], [ones()]]), ValueError, "2 entries"),
    "missing": (dict(states=[{"v": ones()}]), ValueError, "'m' is missing"),
    "count": (dict(states=[[ones(), ones()]]), ValueError, "keeps 1"),
    "size": (dict(states=[[ones(5)]]), ValueError, "5 elements"),
    "type": (dict(states=[[ones(4, torch.float16)]]), TypeError, "float32 or torch.bfloat16"),
    "strides": (dict(states=[[ones(8)[::2]]]), ValueError, "contiguous"),
    "lr": (dict(lr=math.nan), ValueError, "lr is nan"),
    "lr list": (dict(lr=[0.1]), ValueError, "each_step"),
    "beta": (dict(beta=1.5), ValueError, "beta is 1.5"),
    "each_step": (dict(each_step=3), ValueError, "divides"),
    "no seeds": (dict(seeds=[], coeffs=[]), ValueError, "at least one seed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_a_byte_is_written(name):
    change, error, words = BAD[name]
    p, m = torch.randn(4), torch.randn(4)
    before = p.clone(), m.clone()
    good = dict(states=[[m]], rule="momentum", seeds=[1], coeffs=[0.5], lr=0.1)
    with pytest.raises(error, match=words):
        zk.ops.apply_update_([p], **{**good, **change})
    assert torch.equal(p, before[0]) and torch.equal(m, before[1])


def test_a_state_that_shares_the_weights_memory_is_refused():
    p = torch.randn(4)
    with pytest.raises(ValueError, match="overlap"):
        zk.ops.apply_update_([p], [[p]], "momentum", [1], [0.5], lr=0.1)


def test_adams_bias_correction_needs_a_step_from_1_and_betas_below_1():
    state = [{"m": torch.zeros(4), "v": torch.zeros(4)}]
    for change, words in (
        (dict(step=0), "count from 1"),
        (dict(step=1, betas=(0.9, 1.0)), "below 1"),
    ):
        with pytest.raises(ValueError, match=words):
            zk.ops.apply_update_([torch.ones(4)], state, "adam", [1], [0.5], lr=0.1, **change)

"""What no pass could do is refused, by a sentence, before a byte is written."""

import math

import pytest
import torch
from conftest import needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

import zokernels as zk
from zokernels import masks
from zokernels.backends import native

GOOD = dict(seeds=[1], coeffs=[0.5])
BAD = {
    "one tensor": (lambda p: p, {}, TypeError, "list of tensors"),
    "not a tensor": (lambda p: [p, 3], {}, TypeError, "int"),
    "integers": (lambda p: [p, torch.arange(3)], {}, TypeError, "int64"),
    "not contiguous": (lambda p: [p, torch.ones(4, 6).t()], {}, ValueError, "contiguous"),
    "overlapping": (lambda p: [p, p[3:]], {}, ValueError, "overlap"),
    "the same twice": (lambda p: [p, p], {}, ValueError, "overlap"),
    "sparse": (lambda p: [p, torch.eye(3).to_sparse()], {}, ValueError, "sparse"),
    "meta": (lambda p: [p, torch.ones(3, device="meta")], {}, ValueError, "meta"),
    "no seeds": (lambda p: [p], dict(seeds=[], coeffs=[]), ValueError, "at least one seed"),
    "more seeds": (lambda p: [p], dict(seeds=[1, 2]), ValueError, "one for each seed"),
    "NaN": (lambda p: [p], dict(coeffs=[math.nan]), ValueError, "nan"),
    "infinite": (lambda p: [p], dict(coeffs=[math.inf]), ValueError, "inf"),
    "too large": (lambda p: [p], dict(coeffs=[1e39]), ValueError, "binary32"),
    "NaN decay": (lambda p: [p], dict(decay=math.nan), ValueError, "decay"),
    "not a number": (lambda p: [p], dict(coeffs=["a"]), TypeError, "'a'"),
    "negative seed": (lambda p: [p], dict(seeds=[-1]), ValueError, "-1"),
    "large stream": (lambda p: [p], dict(streams=[2**32]), ValueError, "4294967296"),
    "streams": (lambda p: [p], dict(streams=[1, 2]), ValueError, "one for each tensor"),
    "negative offset": (lambda p: [p], dict(offsets=[-8]), ValueError, "-8"),
    "dist": (lambda p: [p], dict(dist="cauchy"), ValueError, "gaussian, rademacher, rank1"),
    "columns of others": (lambda p: [p], dict(columns=[8]), ValueError, "dist='rank1'"),
    "columns": (lambda p: [p], dict(columns=[8, 8], dist="rank1"), ValueError, "one for each"),
    "negative columns": (lambda p: [p], dict(columns=[-1], dist="rank1"), ValueError, "at least 1"),
    "half a column": (lambda p: [p], dict(columns=[1.5], dist="rank1"), ValueError, "integer"),
    "columns, a number": (lambda p: [p], dict(columns=8, dist="rank1"), TypeError, "a list"),
    "too many columns": (lambda p: [p], dict(columns=[2**63], dist="rank1"), ValueError, "columns"),
    "rounding": (lambda p: [p], dict(rounding="up"), ValueError, "stochastic"),
    "backend": (lambda p: [p], dict(backend="cuda"), ValueError, "native"),
    "decay list": (lambda p: [p], dict(decay=[0.5]), ValueError, "each_step"),
    "mask": (lambda p: [p], dict(mask=0.5), TypeError, "Random, Magnitude, Bits"),
    "mask count": (lambda p: [p], dict(mask=masks.Random([0.1, 0.2], 1)), ValueError, "1 tensors"),
    "bits count": (lambda p: [p], dict(mask=masks.Bits([])), ValueError, "one mask for each"),
    "bits size": (
        lambda p: [p],
        dict(mask=masks.Bits([torch.ones(3, dtype=torch.bool)])),
        ValueError,
        "needs",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_a_byte_is_written(name):
    make, change, error, words = BAD[name]
    p = torch.randn(40)
    before = p.clone()
    with pytest.raises(error, match=words):
        zk.ops.add_noise_(make(p), **{**GOOD, **change})
    assert torch.equal(p, before)


def test_a_tensor_without_memory_is_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="without memory.*traced"):
        zk.ops.add_noise_([torch.ones(40)], **GOOD)


def test_out_must_fit():
    w = torch.randn(5)
    with pytest.raises(ValueError, match="must agree"):
        zk.ops.add_noise([w], [torch.empty(6)], [1], [1.0])
    with pytest.raises(ValueError, match="overlap"):
        zk.ops.add_noise([w], [w], [1], [1.0])
    with pytest.raises(ValueError, match="give as many"):
        zk.ops.add_noise([w], [], [1], [1.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.Random(1.5, 1),
        lambda: masks.Random(math.nan, 1),
        lambda: masks.Random(0.5, -1),
        lambda: masks.Magnitude(-1.0),
        lambda: masks.Magnitude(math.nan),
    ],
    ids=["keep", "nan keep", "seed", "threshold", "nan threshold"],
)
def test_bad_masks_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_a_float64_tensor_is_refused_by_native():
    with pytest.raises((ValueError, RuntimeError), match="native"):
        zk.ops.add_noise_([torch.ones(3, dtype=torch.float64)], [1], [1.0], backend="native")


@needs_native
def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setenv("ZOKERNELS_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="avx1024"):
        zk.ops.add_noise_([torch.ones(3)], [1], [1.0])


def test_without_the_library_the_reference_runs_and_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    (tmp_path / "why.txt").write_text("there is no C++ compiler ('c++' was not found)\n")
    monkeypatch.setattr(native, "BUILD_ERROR", tmp_path / "why.txt")
    described = zk.backends()["native"]
    assert not described.available and "no C++ compiler" in described.reason
    p = torch.zeros(9)
    zk.ops.add_noise_([p], [1], [1.0])
    assert torch.equal(p, zk.noise.gaussian(9, seed=1))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        zk.ops.add_noise_([p], [1], [1.0], backend="native")

"""By how much a rank-one direction shifts a product: the native library against binary64."""

import pytest
import torch
from conftest import needs_native, same_bits
from shifts import SIZES, assert_rounded_once, case, run

from zokernels.backends import native

ISAS = native.instruction_sets() if native.why_missing() is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = needs_native


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["none", "common", "each"])
def test_it_is_the_exact_sum_rounded_once(dtype, bias, isa, monkeypatch):
    monkeypatch.setenv("ZOKERNELS_ISA", isa)
    for width, out in SIZES:
        for lanes, rows in ((1, 3), (2, 5), (3, 0)):
            given = case(lanes, rows, width, out, dtype, bias)
            assert_rounded_once(run(native, *given), *given)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_the_threads_nor_on_the_rows_beside_it(isa, monkeypatch):
    monkeypatch.setenv("ZOKERNELS_ISA", isa)
    x, *others = case(2, 200, 333, 777, torch.bfloat16, "each")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(native, x, *others)
        torch.set_num_threads(3)
        assert same_bits(expected, run(native, x, *others))
    finally:
        torch.set_num_threads(before)
    assert same_bits(expected[:, 17:18], run(native, x[:, 17:18], *others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(dtype):
    x, taken, given, scales, bias = case(1, 3, 200, 150, dtype, "common")
    x[0, 0, 7], x[0, 1, 9], bias[11] = float("inf"), float("nan"), float("nan")
    y = run(native, x, taken, given, scales, bias)
    rest = torch.arange(150) != 11
    assert y[0, 0, rest].isinf().all() and y[0, 1].isnan().all()
    assert y[0, 2, rest].isfinite().all() and y[0, :, 11].isnan().all()

"""The bytes of a base in few bits are those of its tensors."""

import pytest

pytest.importorskip("bitsandbytes", reason="needs the extra quantised")
quantised = pytest.importorskip("bench.quantised")
pytestmark = pytest.mark.hf


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_the_arithmetic_is_what_is_held(kind):
    held = quantised.measured("opt-tiny", kind)
    assert quantised.arithmetic("opt-tiny", kind) == held
    plain = quantised.arithmetic("opt-tiny", "bfloat16")
    assert (held < plain) == (kind != "bfloat16")

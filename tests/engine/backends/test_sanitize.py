"""The native code under AddressSanitizer and UBSan."""

import pytest
import sanitize


@pytest.mark.slow
def test_no_pass_touches_a_byte_that_is_not_its_own(tmp_path):
    """Exact-sized, unaligned buffers; every type, rule, mask, rounding and instruction set."""
    if why := sanitize.why_not():
        pytest.skip(why)
    done = sanitize.run(tmp_path, 5000)
    assert done.returncode == 0, done.stderr
    assert "5000 passes" in done.stdout and "traced passes" in done.stdout

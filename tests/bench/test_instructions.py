"""Counting instructions under an emulator."""

import io

import pytest

from bench import cross, instructions


class Dribble(io.BytesIO):
    """Gives few bytes at a time, so that marks are cut."""

    def read(self, size=-1):
        return super().read(min(size, 5))


def test_every_instruction_of_a_log_counts_once():
    line = b"Trace 0: 0x7f7e8ce00100 [0000000001009331/0000000000400580/00000001/00000201] _start\n"
    assert instructions.lines(Dribble(b"a word before\n" + 137 * line)) == 137
    assert instructions.lines(io.BytesIO(b"")) == 0


@pytest.mark.slow
def test_a_weight_costs_fewer_instructions_with_neon(tmp_path):
    if why := cross.why_not():
        pytest.skip(why)
    program = cross.program(tmp_path, instructions.SOURCE, cross.COMPILER)
    neon, portable = (
        instructions.per_weight(program, "float32", "gaussian", isa) for isa in instructions.ISAS
    )
    # Philox alone takes 18 products of four instructions for 32 weights.
    assert 18 * 4 / 32 < neon < portable / 2

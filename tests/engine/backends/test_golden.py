"""The native code in a program of its own, also on another processor: the reference's bits."""

import shlex
import shutil
import subprocess

import golden
import pytest
from conftest import needs_native

from bench import cross
from zokernels.backends import native

needs_compiler = pytest.mark.skipif(
    shutil.which(shlex.split(cross.compiler())[0]) is None,
    reason=f"needs a C++ compiler; there is no {cross.compiler()}",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("golden") / "golden.bin"
    return file, golden.write(file)


def run(command, written, isas):
    file, count = written
    assert count > 350
    done = subprocess.run([*command, str(file), *isas], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{count} cases on {len(isas)} instruction sets, 0 failures\n"


@needs_native
@needs_compiler
def test_this_processors_code_gives_the_references_bits(written, tmp_path):
    program = cross.link(tmp_path, golden.SOURCE, native.LIBRARY, cross.compiler())
    run([str(program)], written, native.instruction_sets())


# As an install compiles it, it takes 30 seconds of one core; with -O1, 13.
@pytest.mark.parametrize("flags", ["-O1", pytest.param("-O3", marks=pytest.mark.slow)])
def test_code_for_arm_gives_the_references_bits(written, tmp_path, flags):
    if why := cross.why_not():
        pytest.skip(why)
    program = cross.program(tmp_path, golden.SOURCE, cross.COMPILER, flags)
    run([*cross.EMULATOR, str(program)], written, ("portable", "neon"))
    if flags == "-O1":
        return
    # Random passes too, of which neon must make what the portable code makes.
    library = tmp_path / "zokernels" / "backends" / "_native.so"
    fuzz = cross.link(tmp_path, golden.SOURCE.with_name("sanitize.cpp"), library, cross.COMPILER)
    done = subprocess.run([*cross.EMULATOR, str(fuzz), "2000"], capture_output=True, text=True)
    assert done.returncode == 0 and "on 2 instruction sets" in done.stdout, done.stderr


@needs_native
@needs_compiler
def test_a_bit_that_differs_is_found(written, tmp_path):
    # Of a float32 tensor's last element, in the first case, what the reference makes of it.
    file, _ = written
    content = bytearray(file.read_bytes())
    at, blobs = 0, []
    for _ in range(13):
        size = int.from_bytes(content[at : at + 8], "little")
        blobs.append((at + 8, at + 8 + size))
        at += 8 + size
    changed = tmp_path / "golden.bin"
    start, end = blobs[11]
    content[end - 4] ^= 1
    changed.write_bytes(content)
    program = cross.link(tmp_path, golden.SOURCE, native.LIBRARY, cross.compiler())
    command = [str(program), str(changed), "portable"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failures" in done.stdout
    assert f"element {(end - start) // 4 - 1} of" in done.stderr

"""Building csrc for 64-bit ARM on another processor, and running what comes out under qemu."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILER = "aarch64-linux-gnu-g++"
# The oldest that the code is for: an instruction that came later is refused.
EMULATOR = ["qemu-aarch64", "-cpu", "cortex-a53", "-L", "/usr/aarch64-linux-gnu"]


def compiler() -> str:
    """The compiler of an install here."""
    return os.environ.get("CXX", "c++")


def why_not() -> str | None:
    """Why nothing can be built or run for ARM here, or None."""
    missing = [tool for tool in (COMPILER, EMULATOR[0]) if shutil.which(tool) is None]
    if missing:
        return (
            f"there is no {' and no '.join(missing)} here; "
            "apt-get install g++-aarch64-linux-gnu qemu-user."
        )
    return None


def program(folder: Path, source: Path, using: str, flags: str = "") -> Path:
    """Builds the library as an install does and a program that calls it.

    Args:
        folder: Where all that is made goes.
        source: The program, one file.
        using: The compiler of both.
        flags: More flags for the library.

    Returns:
        The program.

    Raises:
        RuntimeError: If the library does not compile.
    """
    env = {**os.environ, "CXX": using, "ZOKERNELS_CXXFLAGS": flags}
    build = ["build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, env=env, check=True)
    library = folder / "zokernels" / "backends" / "_native.so"
    if not library.exists():
        raise RuntimeError((library.parent / "_build_error.txt").read_text(encoding="utf-8"))
    return link(folder, source, library, using)


def link(folder: Path, source: Path, library: Path, using: str) -> Path:
    """Builds a program that calls a library which is there."""
    made = folder / source.stem
    subprocess.run(
        [
            *shlex.split(using), "-std=c++17", "-O1", "-Wall", "-I", str(ROOT / "csrc"),
            str(source), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(made),
        ],
        check=True,
    )  # fmt: skip
    return made

"""Builds csrc where there is a C++ compiler. It never imports torch.

The library is plain C++ behind a C interface, so one build serves every torch and Python. Without
a compiler the install succeeds, the reason is kept beside the package, and `zokernels env` says it.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
FLAGS = "-O3 -std=c++17 -fPIC -ffp-contract=off -fvisibility=hidden -pthread -Wall".split()
KERNELS = ("add_noise", "apply_update", "shift")
# gcc keeps AVX registers on a stack that Windows aligns to 16 bytes: its code crashes (gcc 54412).
WINDOWS = "it is not made for Windows. Plain PyTorch serves there, and under WSL Linux's wheel."
# By the first word of what the compiler builds for; each has portable code beside these.
X86 = {
    "avx2": "-mavx2 -mfma -mf16c".split(),
    # gcc 12 warns of its own AVX-512 headers.
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512 -Wno-maybe-uninitialized -Wno-uninitialized".split(),
}
ARM: dict[str, list[str]] = {"neon": []}
TARGETS = {
    "x86_64": ("-DZK_X86", X86),
    "amd64": ("-DZK_X86", X86),
    "aarch64": ("-DZK_ARM", ARM),
    "arm64": ("-DZK_ARM", ARM),
}


class BuildNative(build_ext):
    """Compiles the library with whatever C++ compiler ``CXX`` names or the system has."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "zokernels/backends"
        package.mkdir(parents=True, exist_ok=True)
        library, error = package / "_native.so", package / "_build_error.txt"
        library.unlink(missing_ok=True)
        error.unlink(missing_ok=True)
        reason = self.attempt(library)
        if reason is not None:
            library.unlink(missing_ok=True)
            error.write_text(reason + "\n", encoding="utf-8")
            print(f"zokernels: installing without the native backend: {reason}", file=sys.stderr)

    def attempt(self, library: Path) -> str | None:
        """Makes the library, or says why there is none and what to do."""
        if sys.platform == "win32":
            return WINDOWS
        try:
            self.compile(library)
        except (OSError, subprocess.CalledProcessError) as failure:
            return f"{_reason(failure)}. Install a C++ compiler and reinstall."
        return None

    def compile(self, library: Path) -> None:
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "c++")) + FLAGS
        extra = shlex.split(os.environ.get("ZOKERNELS_CXXFLAGS", ""))
        compiler += ["-fopenmp"] if _works([*compiler, "-fopenmp"], temp) else []
        define, isas = TARGETS.get(_target(compiler), ("", {}))
        units = [("dispatch", "dispatch", define.split())]
        # Portable first: of a function that several files hold, the linker keeps the first, and an
        # AVX-512 copy of the standard library's would stop an older CPU.
        for isa, flags in {"portable": [], **isas}.items():
            named = [*flags, f'-DZK_SIMD="simd_{isa}.h"', f"-DZK_ISA={isa}"]
            units += [(kernel, f"{kernel}_{isa}", named) for kernel in KERNELS]
        objects, running = [], []
        for file, name, flags in units:
            source = ROOT / "csrc" / f"{file}.cpp"
            objects.append(str(temp / f"{name}.o"))
            command = [*compiler, *flags, *extra, "-c", str(source), "-o", objects[-1]]
            running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for command, process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
        link = [*compiler, *extra, "-shared", "-o", str(library), *objects]
        subprocess.run(link, check=True, capture_output=True, text=True)

    # What an editable install asks for: the library is found by path, not as a Python module.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Tags the wheel for its platform and for every Python 3, since the library is not a module."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """Marks the wheel as one for this platform."""

    def has_ext_modules(self) -> bool:
        return True


def _target(compiler: list[str]) -> str:
    """The processor that the compiler makes code for, which may not be that of this machine."""
    done = subprocess.run([*compiler, "-dumpmachine"], check=True, capture_output=True, text=True)
    return done.stdout.strip().split("-")[0].lower()


def _works(command: list[str], temp: Path) -> bool:
    """Whether the compiler takes these flags: Apple's clang has no ``-fopenmp``."""
    probe = temp / "probe.cpp"
    probe.write_text("int main() { return 0; }\n", encoding="utf-8")
    done = subprocess.run([*command, str(probe), "-o", str(temp / "probe")], capture_output=True)
    return done.returncode == 0


def _reason(failure: Exception) -> str:
    if isinstance(failure, FileNotFoundError):
        return f"there is no C++ compiler ({failure.filename!r} was not found)"
    if isinstance(failure, subprocess.CalledProcessError):
        lines = [line for line in (failure.stderr or "").splitlines() if "error" in line]
        return f"the C++ compiler failed: {lines[0].strip() if lines else failure}"
    return f"the C++ compiler did not run: {failure}"


setup(
    ext_modules=[Extension("zokernels.backends._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    distclass=NativeDistribution,
)

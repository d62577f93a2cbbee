"""Builds csrc with AddressSanitizer and UBSan, and runs passes through it.

Random ones from C++, see sanitize.cpp; and some from Python, see sanitize_traced.py.

ThreadSanitizer is left out: it does not see libgomp's barriers, and calls every pass a race.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CHECKS = "-fsanitize=address,undefined -fno-sanitize-recover=all".split()
COMMON = [*CHECKS, "-fno-omit-frame-pointer", "-g1", "-O1"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def why_not() -> str | None:
    """Why the sanitizers can't be used here, or None."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("int main() { return 0; }\n")
        try:
            subprocess.run(
                [*compiler(), *CHECKS, str(probe), "-o", f"{folder}/probe"],
                check=True,
                capture_output=True,
            )
            subprocess.run([f"{folder}/probe"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return (
                f"{compiler()[0]} makes no program with -fsanitize=address,undefined; install gcc "
                "or clang with its sanitizers."
            )
    return None


def run(folder: Path, cases: int, seed: int = 1) -> subprocess.CompletedProcess:
    """Builds the library and the driver in a folder and runs so many passes."""
    env = {**os.environ, "ZOKERNELS_CXXFLAGS": " ".join(COMMON)}
    build = ["build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, env=env, check=True)
    library = folder / "zokernels" / "backends" / "_native.so"
    if not library.exists():
        raise RuntimeError((library.parent / "_build_error.txt").read_text(encoding="utf-8"))
    driver, source = folder / "sanitize", Path(__file__).with_suffix(".cpp")
    subprocess.run(
        [
            *compiler(), "-std=c++17", "-Wall", *COMMON, "-I", str(ROOT / "csrc"), str(source),
            str(library), f"-Wl,-rpath,{library.parent}", "-o", str(driver),
        ],
        check=True,
    )  # fmt: skip
    command = [str(driver), str(cases), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done
    traced = run_traced(library)
    traced.stdout = done.stdout + traced.stdout
    return traced


def run_traced(library: Path) -> subprocess.CompletedProcess:
    """Runs passes from Python code that torch.compile's tracer rewrites."""
    runtime = subprocess.run(
        [*compiler(), "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    env = {
        **os.environ,
        "LD_PRELOAD": runtime,
        # Python frees little at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    program = Path(__file__).with_name("sanitize_traced.py")
    return subprocess.run(
        [sys.executable, str(program), str(library)], env=env, capture_output=True, text=True
    )


def main() -> int:
    if why := why_not():
        print(why, file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="passes to run")
    parser.add_argument("--seed", type=int, default=1, help="chooses them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder), given.cases, given.seed)
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

"""A wheel in a fresh environment without a compiler: ``python -m bench.wheels``, into wheels.csv.

The environment holds torch, the wheel and what they need. Its ``PATH`` has nothing else, so that
no compiler is found, and ``zokernels verify`` runs in an empty folder: what it verifies is what the
wheel brought.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zokernels.lab.benchmarks import machine, results

RESULTS = results.FOLDER / "wheels.csv"
COLUMNS = (
    "date", "commit", "machine", "threads", "wheel", "libc", "python", "torch", "built_with",
    "instruction_sets", "openmp", "passed", "failed", "seconds",
)  # fmt: skip

# The OpenMP libraries of a process in which torch and a pass have run on two threads, by their
# folder and name; a pass in a forked child has to end, too.
OPENMP = """
import os, re, torch, zokernels as zk
torch.set_num_threads(2)
w = torch.zeros(1 << 20)
torch.cos(w)
zk.ops.add_noise_([w], [1], [1.0], backend="native")
child = os.fork()
if not child:
    zk.ops.add_noise_([w], [2], [1.0], backend="native")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
mapped = (line.split()[-1] for line in open("/proc/self/maps"))
found = sorted({p for p in mapped if re.search(r"/lib[gi]?omp[^/]*$", p)})
print(" ".join("/".join(p.split("/")[-3:]) for p in found))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, verify and append a row; 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.wheels", description=__doc__)
    parser.add_argument("wheel", type=Path, help="built from this checkout")
    parser.add_argument("--python", required=True, help="makes the environment: python3.12")
    parser.add_argument("--torch", required=True, help="the version to install: 2.10.0")
    parser.add_argument("--installer", default="python -m pip install", help="or uv pip install")
    parser.add_argument(
        "--root", type=Path, default=Path("/"),
        help="of another system, in which --python and --installer are; entered by chroot",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    options = parser.parse_args(arguments)
    if different := differences(options.wheel):
        print(f"The wheel is not of this checkout; {different[0]} differs.", file=sys.stderr)
        return 1
    results.check(options.out, COLUMNS)
    with tempfile.TemporaryDirectory(dir=options.root / "tmp", prefix="zk-wheel-") as place:
        found = verified(options, Path(place))
    if reason := refusal(found):
        print(reason, file=sys.stderr)
        return 1
    mine = row(found, options.wheel.name)
    results.append(options.out, COLUMNS, [mine])
    print(", ".join(f"{name} {value}" for name, value in mine.items()))
    return 1 if mine["failed"] else 0


def differences(wheel: Path) -> list[str]:
    """The package's files that are not this checkout's, other than what a compiler made."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("zokernels/")}
        here = {
            path.relative_to(machine.ROOT).as_posix()
            for path in (machine.ROOT / "zokernels").rglob("*.py")
        }
        shared = {name for name in inside if Path(name).suffix in (".py", ".json", ".tsv")}
        return sorted(
            name
            for name in shared | here
            if name not in shared
            or not (machine.ROOT / name).is_file()
            or archive.read(name) != (machine.ROOT / name).read_bytes()
        )


def verified(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """What ``zokernels verify --json`` says in an environment made in ``place``, and `OPENMP`."""
    inside = Path("/") / place.relative_to(options.root)
    # By its whole path: the environment's PATH has only what the environment has.
    enter = [] if options.root == Path("/") else [shutil.which("chroot"), str(options.root)]
    shutil.copy(options.wheel, place)
    bin = inside / "venv/bin"

    def run(command: Sequence[str], env: Mapping[str, str], **more: Any) -> str:
        more = {"check": True, **more}
        return subprocess.run([*enter, *command], env=env, cwd=place, text=True, **more).stdout

    run([options.python, "-m", "venv", str(inside / "venv")], os.environ)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    active = kept | {"VIRTUAL_ENV": str(bin.parent), "PATH": f"{bin}:{os.environ['PATH']}"}
    what = (f"torch=={options.torch}", str(inside / options.wheel.name))
    run(["env", *shlex.split(options.installer), *what], active)
    alone = {"PATH": str(bin), "HOME": str(inside)}
    alone |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    verify = [str(bin / "zokernels"), "verify", "--json", str(inside / "found.json")]
    run(verify, alone, check=False)
    found = json.loads((place / "found.json").read_text(encoding="utf-8"))
    # Two OpenMP libraries may hang.
    openmp = run([str(bin / "python"), "-c", OPENMP], alone, stdout=subprocess.PIPE, timeout=120)
    return found | {"openmp": openmp.strip()}


def refusal(found: Mapping[str, Any]) -> str | None:
    """Why these outcomes are no row: they must be of the wheel's library, with no compiler near."""
    about = found["environment"]
    native = about["backends"]["native"]
    if about["compiler"] is not None:
        return f"There is a compiler in the environment: {about['compiler']}."
    return None if native["available"] else f"The wheel brought no kernels: {native['reason']}"


def row(found: Mapping[str, Any], wheel: str) -> dict[str, Any]:
    """A row of what `verified` found."""
    about, failed = found["environment"], sum(not case["passed"] for case in found["cases"])
    libc = re.search(r"glibc([\d.]+)", about["system"])
    here = machine.about()
    return {
        **{name: here[name] for name in ("date", "commit", "machine")},
        "threads": about["threads"],
        "wheel": wheel,
        "libc": f"glibc {libc[1]}" if libc else about["system"],
        "python": about["versions"]["python"],
        "torch": about["versions"]["torch"],
        "built_with": about["native_built_with"],
        "instruction_sets": " ".join(about["instruction_sets"]),
        "openmp": found["openmp"],
        "passed": len(found["cases"]) - failed,
        "failed": failed,
        "seconds": round(found["seconds"]),
    }


if __name__ == "__main__":
    sys.exit(main())

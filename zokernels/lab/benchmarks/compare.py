"""Two commits on one machine: the same passes of both, in alternation, each time a new process.

The other commit is unpacked into a temporary folder (``git archive``, so that nothing of git's is
written) and gets a native library of its own; Python and torch are those at hand.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zokernels.lab.benchmarks import tested, timing
from zokernels.lab.benchmarks.ops import Plan
from zokernels.lab.errors import InputError, RunError

LEAST = 0.02  # a smaller difference is not called one
FEWEST = 4  # runs of a side, below which nothing is called a difference
_LIBRARY = Path("zokernels", "backends", "_native.so")
_SOURCES = ("csrc", "setup.py")

Key = tuple[str, ...]
# Of one process: each case's fastest repetition over its floor's; a floor's own in ns a weight.
Ratios = dict[Key, float]
Sides = tuple[list[Ratios], list[Ratios]]


@dataclass(frozen=True)
class Difference:
    """One pass on both sides.

    Attributes:
        key: Type, op, noise, variant, and what runs.
        base: Median over the base's processes of the time over the floor's.
        here: The same of the working tree.
        ratio: Median, over neighbouring processes, of here over base; above 1 is slower.
        low: Its lower quartile.
        high: Its upper quartile.
        verdict: "slower", "faster", or "" within the noise.
    """

    key: Key
    base: float
    here: float
    ratio: float
    low: float
    high: float
    verdict: str


def resolve(ref: str, root: Path = tested.ROOT) -> str:
    """The commit that a name stands for.

    Raises:
        InputError: If there is no git repository, or no such commit in it.
    """
    if not tested.is_checkout(root):
        raise InputError(f"compare needs a git checkout of zokernels, and {root} is none.")
    asked = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    done = _git(root, *asked)
    if done.returncode:
        known = _git(root, "rev-parse", "--git-dir").returncode == 0
        raise InputError(
            f"'{ref}' is no commit of {root}; name one, as HEAD, main or a hash."
            if known
            else f"compare needs a git checkout of zokernels, and {root} is none."
        )
    return done.stdout.decode().strip()


def unpack(commit: str, into: Path, root: Path = tested.ROOT) -> None:
    """Put a commit's files into a folder, with a native library built of its sources.

    Where its sources are those of the working tree, the library is copied: it would be the same.

    Raises:
        InputError: If the working tree's own library is older than its sources.
        RunError: If the commit's library can't be built.
    """
    library = root / _LIBRARY
    if library.exists() and _newest(root) > library.stat().st_mtime:
        raise InputError(
            "The native library is older than its sources; build it first: "
            "python setup.py build_ext --inplace."
        )
    archive = _git(root, "archive", "--format=tar", commit)
    if archive.returncode:
        raise RunError(f"git archive {commit} failed: {archive.stderr.decode().strip()}.")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        # Pythons older than 3.10.12 and 3.11.4 have no filters, nor the keyword for them.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(into)
    if library.exists() and _sources(into) == _sources(root):
        shutil.copy2(library, into / _LIBRARY)
        return
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=into, capture_output=True, text=True)
    if not (into / _LIBRARY).exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise RunError(f"The native library of {commit[:9]} could not be built: {lines[-1]}")


def alternate(
    base: Path,
    here: Path,
    plan: Plan,
    runs: int,
    progress: Callable[[], None] = lambda: None,
) -> Sides:
    """Measure both in turn, base, here, here, base, base and so on; a process each.

    Args:
        base: A folder with a package.
        here: Another.
        plan: What each process measures.
        runs: Processes of each.
        progress: Called after each process.

    Raises:
        RunError: If one side can't be measured; it says which and why.
    """
    found: dict[Path, list[Ratios]] = {base: [], here: []}
    for number in range(runs):
        for root in (base, here) if number % 2 == 0 else (here, base):
            found[root].append(_side(root, plan))
            progress()
    return found[base], found[here]


def differences(base: Sequence[Ratios], here: Sequence[Ratios]) -> list[Difference]:
    """The passes that both sides have.

    One is called slower or faster if every process of one side was slower than every one of the
    other, and the medians are more than `LEAST` apart: among twice six equal processes that
    happens to a pass in one of 462 comparisons.
    """
    keys = [k for k in here[0] if all(k in ratios for ratios in (*base, *here))]
    return [_difference(key, [b[key] for b in base], [h[key] for h in here]) for key in keys]


def _difference(key: Key, base: Sequence[float], here: Sequence[float]) -> Difference:
    each = timing.spread([h / b for b, h in zip(base, here, strict=True)])
    apart = abs(each.median - 1) > LEAST and len(base) >= FEWEST
    verdict = ""
    if apart and min(here) > max(base):
        verdict = "slower"
    elif apart and max(here) < min(base):
        verdict = "faster"
    middles = statistics.median(base), statistics.median(here)
    return Difference(key, *middles, each.median, each.low, each.high, verdict)


def _side(root: Path, plan: Plan) -> Ratios:
    script = Path(__file__).with_name("side.py")
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script), str(root), json.dumps(asdict(plan))],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"The passes of {root} could not be measured: {lines[-1]}")
    lines = json.loads(done.stdout.splitlines()[-1])
    return {tuple(key): value for key, value in lines}


def _sources(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in _files(root)}


def _newest(root: Path) -> float:
    return max(path.stat().st_mtime for path in _files(root))


def _files(root: Path) -> list[Path]:
    found: list[Path] = []
    for name in _SOURCES:
        top = root / name
        found += [top] if top.is_file() else [p for p in sorted(top.rglob("*")) if p.is_file()]
    return found


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except FileNotFoundError:
        raise InputError("compare needs git, which is not installed here.") from None

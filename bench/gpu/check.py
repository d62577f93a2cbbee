"""Does every Triton kernel give the CPU's bits here, and every step the CPU's numbers?

tests/gpu in as many processes as there are cores, since each case compiles kernels of its own (1 to
2 s each): the passes of a training step first, then whole steps and graphs, then every combination.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import partial

from bench.gpu import deadline
from bench.gpu.part import CHECKED, Job, Part
from zokernels.lab.benchmarks import machine, results

FILES = tuple(
    f"test_{name}.py" for name in ("passes", "steps", "graphs", "runs", "placed", "variants")
)
# A test that hangs is ended, with its process; one that is begun last may take some seconds.
HANGS, LAST = 90, 12
# Lines of failures in the summary; check.log has all.
_TOLD = 40


def jobs(part: Part) -> list[Job]:
    """One: the tests share their time."""
    return [Job("checks", 1, partial(_check, part))]


def command(workers: int) -> list[str]:
    """Runs the checks, in their order, in so many processes."""
    tests = machine.ROOT / "tests" / "gpu"
    return [
        sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-m", "gpu",
        "-p", "no:cacheprovider", "-p", "bench.gpu.deadline", f"--timeout={HANGS}",
        "--timeout-method=thread",
        "-n", str(workers), "--dist=load", "--maxschedchunk=1",
        *(str(tests / name) for name in FILES),
    ]  # fmt: skip


def _check(part: Part) -> list[str]:
    # Matrices are tiny, and there is a process for every core.
    environment = machine.environment() | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        deadline.DEADLINE: str(time.time() + part.left() - LAST),
        deadline.COUNTS: str(part.out / CHECKED),
    }
    with subprocess.Popen(
        command(part.workers), cwd=machine.ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as run, (part.out / "check.log").open("w", encoding="utf-8") as log:  # fmt: skip
        assert run.stdout is not None
        told = 0
        for line in run.stdout:
            log.write(line)
            log.flush()
            if re.match(r"FAILED|ERROR|E  |.* broke the CUDA context", line) and told < _TOLD:
                part.say(line.rstrip())
                told += 1
    found = results.read(part.out / CHECKED)
    for row in found:
        part.say(
            f"{row['kind']}: {row['passed']} passed, {row['failed']} failed"
            + (f", {row['left']} left for time" if int(row["left"]) else "")
        )
    passed, failed, left = (results.total(found, name) for name in ("passed", "failed", "left"))
    line = f"{passed + failed} of {passed + failed + left} cases ran, {failed} failed"
    if run.returncode or failed or not passed:
        raise RuntimeError(f"{line}; pytest ended with {run.returncode}, see check.log")
    return [line]


if __name__ == "__main__":
    this = Part.of_arguments("check")
    raise SystemExit(this.run(jobs(this)))

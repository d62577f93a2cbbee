"""What the parts of a run on a GPU share: their time, rows kept as they come, a summary."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from zokernels.lab.benchmarks import results

SUMMARY, CHECKED = "summary.txt", "check.csv"


@dataclass(frozen=True)
class Job:
    """A piece of a part that is done or left as a whole.

    Attributes:
        name: What the summary calls it.
        seconds: That it takes on an H100 or H200; with less time left it is not begun.
        run: Does it, and returns lines for the summary.
    """

    name: str
    seconds: float
    run: Callable[[], Sequence[str]]


@dataclass
class Progress:
    """What became of the jobs so far."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Jobs that are behind us."""
        return self.done + len(self.failed) + len(self.left)


@dataclass
class Part:
    """One part of a run.

    Attributes:
        name: Of its rows' file and its lines in the summary.
        seconds: That it has, from ``began`` on; no job is begun that would take longer.
        out: The folder of rows and summary.
        dry: Whether it is tried on a CPU: tiny sizes, interpreted kernels.
        began: When its process was started, on `time.time`'s clock: to import torch and
            transformers takes it some 10 s.
        progress: Of the processes before this one.
    """

    name: str
    seconds: float
    out: Path
    dry: bool
    began: float = field(default_factory=time.time)
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def of_arguments(cls, name: str) -> Part:
        """The part that the command line asks for; ends the program where there is no GPU."""
        parser = argparse.ArgumentParser(prog=f"python -m bench.gpu.{name}")
        parser.add_argument("--seconds", type=float, required=True, help="that it may take")
        parser.add_argument("--began", type=float, default=time.time(), help="seconds since 1970")
        parser.add_argument("--out", type=Path, required=True, help="folder of rows and summary")
        parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny sizes")
        parser.add_argument("--progress", default="{}", help="of a process before this one")
        given = parser.parse_args()
        if not given.dry and not torch.cuda.is_available():
            sys.exit("torch sees no CUDA device here; --dry runs the same code on the CPU.")
        given.out.mkdir(parents=True, exist_ok=True)
        progress = Progress(**json.loads(given.progress))
        return cls(name, given.seconds, given.out, given.dry, given.began, progress)

    @property
    def device(self) -> str:
        """Where the tensors are."""
        return "cpu" if self.dry else "cuda"

    @property
    def workers(self) -> int:
        """Processes that share the cores."""
        return 2 if self.dry else min(16, os.cpu_count() or 1)

    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.time() - self.began

    def left(self) -> float:
        """Seconds that it still has."""
        return self.seconds - self.elapsed()

    def say(self, line: str) -> None:
        """A line of the summary, at once on the screen and in the file."""
        text = f"{self.name:6} {self.elapsed():4.0f} s  {line}"
        print(text, flush=True)
        with (self.out / SUMMARY).open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def keep(
        self, columns: Sequence[str], found: Sequence[Mapping[str, Any]], later: Sequence[str] = ()
    ) -> None:
        """Append rows to the part's file; their column ``tests`` says what the check found."""
        path = self.out / f"{self.name}.csv"
        results.check(path, columns, later)
        results.append(path, columns, [{**row, "tests": self._checked()} for row in found])

    def run(self, jobs: Sequence[Job]) -> int:
        """Do the jobs in turn for as long as there is time; the exit code.

        A job that fails costs no other one: a new process goes on, since a kernel or a capture that
        failed may have broken this one's context on the device.
        """
        now = self.progress
        for job in jobs[now.count :]:
            if self.left() < job.seconds:
                now.left.append(job.name)
                continue
            try:
                lines = job.run()
            except Exception as error:
                traceback.print_exc()
                self.say(f"FAILED {job.name}: {told(error)}")
                now.failed.append(job.name)
                if now.count < len(jobs):
                    self._go_on_anew()
            else:
                now.done += 1
                for line in lines:
                    self.say(line)
                gc.collect()
                if not self.dry:
                    torch.cuda.empty_cache()
        self.say(
            f"{now.done} of {len(jobs)} done, {len(now.failed)} failed, {len(now.left)} left for "
            f"time; {self.elapsed():.0f} of {self.seconds:.0f} s"
            + (f"; left: {', '.join(now.left)}" if now.left else "")
        )
        return int(bool(now.failed))

    def _go_on_anew(self) -> None:
        """The same command in the place of this process, told what is behind it."""
        sys.stdout.flush()
        sys.stderr.flush()
        so_far = ["--began", str(self.began), "--progress", json.dumps(asdict(self.progress))]
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *so_far])

    def _checked(self) -> str:
        """What the check part found before, in the same folder."""
        found = results.read(self.out / CHECKED)
        if not found:
            return "gpu checks not run"
        passed, failed = (results.total(found, name) for name in ("passed", "failed"))
        return f"gpu checks: {passed} passed, {failed} failed"


def told(error: Exception) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

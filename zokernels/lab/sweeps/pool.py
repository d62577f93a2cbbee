"""Several worker processes, each with its share of the threads.

A worker that dies takes its run with it and nothing else: the run is reported, and a new worker
takes the next one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zokernels
from zokernels.lab.sweeps.plan import Run

_PATIENCE = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, kept, failed, refused, died or interrupted; and why."""

    status: str
    reason: str = ""


Told = Callable[[int, Run, dict[str, Any]], None]


def threads_each(workers: int) -> int:
    """A worker's share of the threads of this process: of OMP_NUM_THREADS, or of its cores."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (int(given) if given.isdigit() else cores or 1) // workers)


class Pool:
    """Does runs.

    Args:
        workers: Number of processes.
        threads: Threads of each.
        logs: Folder of the files that take what the workers print.
        told: Called with the worker's number, its run, and what it tells: "step" and "loss".
        ended: Called with a run and its outcome, by the worker's thread.
    """

    def __init__(
        self,
        workers: int,
        threads: int,
        logs: Path,
        told: Told,
        ended: Callable[[int, Run, Outcome], None],
    ) -> None:
        self.workers, self.threads, self.logs = workers, threads, logs
        self.told, self.ended = told, ended
        self._todo: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._stopping = False
        self._lock = threading.Lock()

    def do(self, runs: Sequence[Run]) -> None:
        """Does them all, in their order; returns when the last one has ended.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once every run at hand has saved what it has; a second
                Ctrl-C ends the workers at once.
        """
        for run in runs:
            self._todo.put(run)
        ends = [threading.Event() for _ in range(min(self.workers, len(runs)))]
        for number, end in enumerate(ends):
            threading.Thread(target=self._slot, args=(number, end), daemon=True).start()
        try:
            try:
                _wait(ends)
            except KeyboardInterrupt:
                self._stop()
                _wait(ends)
                raise
        finally:
            self._stop()
            with self._lock:
                for process in self._processes.values():
                    if process.poll() is None:
                        process.kill()

    def _stop(self) -> None:
        """The end of its orders stops a worker between two steps."""
        self._stopping = True
        with self._lock:
            for process in self._processes.values():
                _close(process)

    def _slot(self, number: int, end: threading.Event) -> None:
        try:
            while not self._stopping:
                try:
                    run = self._todo.get_nowait()
                except queue.Empty:
                    break
                self.ended(number, run, self._one(number, run))
            with self._lock:
                process = self._processes.get(number)
            if process is not None:
                _close(process)
                process.wait(_PATIENCE)
        finally:
            end.set()

    def _one(self, number: int, run: Run) -> Outcome:
        process = self._worker(number)
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps(run.settings.plain()), file=process.stdin, flush=True)
        except (OSError, ValueError):
            if self._stopping:
                return Outcome("interrupted")
        for line in process.stdout:
            told = json.loads(line)
            if "status" in told:
                return Outcome(told["status"], told.get("reason", ""))
            self.told(number, run, told)
        code = process.wait()
        if self._stopping:
            return Outcome("interrupted")
        return Outcome("died", f"the worker ended with code {code}; {self._log(number)} says more")

    def _worker(self, number: int) -> subprocess.Popen[str]:
        with self._lock:
            known = self._processes.get(number)
            if known is not None and known.poll() is None:
                return known
            root = str(Path(zokernels.__file__).parent.parent)
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(self.threads),
                "PYTHONPATH": os.pathsep.join(paths),
            }
            with self._log(number).open("a", encoding="utf-8") as errors:
                # In a session of its own, a Ctrl-C reaches the sweep alone, which then asks.
                process = subprocess.Popen(
                    [sys.executable, "-m", "zokernels.lab.sweeps.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            self._processes[number] = process
            return process

    def _log(self, number: int) -> Path:
        return self.logs / f"worker-{number}.log"


def _wait(ends: Sequence[threading.Event]) -> None:
    # Not Thread.join, which in Python 3.11 takes a thread for ended once Ctrl-C interrupts it.
    for end in ends:
        while not end.wait(0.2):
            pass


def _close(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()

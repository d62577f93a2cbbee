"""A pytest plugin: tests that would begin after a deadline are left, and every outcome is counted.

In processes of pytest-xdist, too. What was counted is in a file after every test, so that a run
that is cut off has told what it found.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from zokernels.lab.benchmarks import machine, results

COLUMNS = (*machine.COLUMNS, "triton", "kind", "passed", "failed", "left", "skipped")
LEFT = "no time is left"
# The workers take their environment from the process that starts them.
DEADLINE, COUNTS = "ZOKERNELS_DEADLINE", "ZOKERNELS_COUNTS"
BROKEN = 70


def pytest_configure(config: pytest.Config) -> None:
    """Count, where the reports of all workers come together."""
    if not hasattr(config, "workerinput") and COUNTS in os.environ:
        config.pluginmanager.register(Counting(Path(os.environ[COUNTS])), "zokernels-counting")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a test that begins too late."""
    if time.time() > float(os.environ.get(DEADLINE, "inf")):
        pytest.skip(LEFT)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End the process where a kernel has broken its context: every later test in it would fail.

    pytest-xdist reports the test as failed and starts another process.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        capture = item.config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(item)
        print(f"{item.nodeid} broke the CUDA context: {error}", file=sys.stderr, flush=True)
        os._exit(BROKEN)


class Counting:
    """The outcomes by kind of case, a test function each."""

    def __init__(self, path: Path):
        self.path = path
        self.counts: dict[str, Counter[str]] = {}
        on_gpu = torch.cuda.is_available()
        about = machine.about("cuda" if on_gpu else "cpu")
        self.about = {**about, "triton": machine.triton()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One more outcome: of the call, or of a setup or teardown that did not pass."""
        if report.when != "call" and report.passed:
            return
        kind = report.nodeid.partition("[")[0].rpartition("::")[2].removeprefix("test_")
        is_left = report.skipped and LEFT in str(report.longrepr)
        outcome = "left" if is_left else report.outcome
        self.counts.setdefault(kind, Counter())[outcome] += 1
        self._write()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """How many ran, of how many there are."""
        total: Counter[str] = sum(self.counts.values(), Counter())
        ran = total["passed"] + total["failed"]
        terminalreporter.write_line(
            f"{ran} cases ran, {total['failed']} of them failed; {total['left']} were left for time"
        )

    def _write(self) -> None:
        found = [
            {**self.about, "tests": "", "kind": kind.replace("_", " "),
             **{name: count[name] for name in COLUMNS[-4:]}}
            for kind, count in self.counts.items()
        ]  # fmt: skip
        results.replace(self.path, COLUMNS, found)

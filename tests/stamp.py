"""Keeps a run's outcome where the benchmarks look for it: hooks that conftest.py takes."""

from pathlib import Path

import pytest

import zokernels
from zokernels.lab.benchmarks import tested

# "not slow" is the default, "" is all of them.
_MARKS = ("not slow", "")
_TESTS = Path(__file__).parent
_PARTS = ("keyword", "deselect", "ignore", "ignore_glob", "lf", "stepwise")


def pytest_sessionstart(session):
    session.zokernels_before = tested.fingerprint()


def pytest_sessionfinish(session, exitstatus):
    config, before = session.config, session.zokernels_before
    ours = Path(zokernels.__file__).is_relative_to(tested.ROOT)
    cache = getattr(config, "cache", None)
    if cache is None or not ours or tested.fingerprint() != before:
        return
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        outcome = tested.FAILED
    elif exitstatus == pytest.ExitCode.OK and complete(config):
        outcome = tested.PASSED
    else:
        return
    cache.set(tested.KEY, {"fingerprint": before, "outcome": outcome})


def complete(config) -> bool:
    """Whether the run was asked for all the tests that `make test` runs."""
    option = config.option
    if option.collectonly or option.markexpr not in _MARKS:
        return False
    if any(getattr(option, name, None) for name in _PARTS):
        return False
    return any(Path(config.invocation_params.dir, a).resolve() == _TESTS for a in config.args)

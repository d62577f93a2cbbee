"""Rows are marked by the tests' outcome for the very code that is measured."""

import json

import pytest
import stamp

from zokernels.lab.benchmarks import machine, tested

pytest_plugins = "pytester"


@pytest.fixture
def checkout(tmp_path):
    for name in ("tests/conftest.py", "csrc/a.cpp", "zokernels/a.py", "setup.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def keep(root, outcome):
    place = root / ".pytest_cache" / "v" / tested.KEY
    place.parent.mkdir(parents=True, exist_ok=True)
    kept = {"fingerprint": tested.fingerprint(root), "outcome": outcome}
    place.write_text(json.dumps(kept))
    return place


def test_an_outcome_holds_for_the_code_that_was_tested(checkout):
    assert tested.outcome(checkout) == "not run"
    keep(checkout, "passed")
    assert tested.outcome(checkout) == "passed"
    (checkout / "README.md").write_text("other words")
    assert tested.outcome(checkout) == "passed"
    for name in ("zokernels/a.py", "csrc/a.cpp", "setup.py", "zokernels/new.py"):
        keep(checkout, "passed")
        (checkout / name).write_text("changed")
        assert tested.outcome(checkout) == "not run", name
    keep(checkout, "failed")
    assert tested.outcome(checkout) == "failed"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": 3}', '{"outcome": "passed"}'])
def test_a_damaged_outcome_is_none(checkout, text):
    keep(checkout, "passed").write_text(text)
    assert tested.outcome(checkout) == "not run"


def test_an_installed_package_has_no_checkout(checkout, monkeypatch):
    (checkout / "tests" / "conftest.py").unlink()
    assert tested.outcome(checkout) == "no checkout"
    monkeypatch.setattr(machine.tested, "is_checkout", lambda: False)
    # Even where it lies inside some repository's folder.
    assert machine.commit() == "unknown"


@pytest.mark.parametrize(
    ("arguments", "body", "outcome"),
    [
        ((), "pass", "passed"),
        (("tests",), "pass", "passed"),
        ((), "assert False", "failed"),
        (("tests/test_it.py",), "assert False", "failed"),
        (("tests/test_it.py",), "pass", None),
        (("-k", "it"), "pass", None),
        (("--lf",), "pass", None),
        (("--collect-only",), "pass", None),
        (("-m", "slow"), "pass", None),
        (("-m", ""), "pass", "passed"),
        (("--deselect", "tests/test_it.py::test_other"), "pass", None),
        (("--ignore", "tests/test_other.py"), "pass", None),
        ((), "__import__('pathlib').Path('code').write_text('edited')", None),
    ],
)
def test_only_a_complete_run_passes_and_any_run_fails(
    pytester, monkeypatch, arguments, body, outcome
):
    pytester.makeini("[pytest]\ntestpaths = tests\nmarkers = slow\naddopts = -m 'not slow'")
    folder = pytester.mkdir("tests")
    (folder / "conftest.py").write_text(
        "from stamp import pytest_sessionfinish, pytest_sessionstart"
    )
    (folder / "test_it.py").write_text(
        f"import pytest\ndef test_it():\n    {body}\ndef test_other(): pass\n"
        "@pytest.mark.slow\ndef test_slow(): pass\n"
    )
    code = pytester.path / "code"
    code.write_text("as it was")
    monkeypatch.setattr(stamp, "_TESTS", folder)
    monkeypatch.setattr(tested, "fingerprint", lambda: code.read_text())
    pytester.runpytest_inprocess(*arguments)
    kept = pytester.path / ".pytest_cache" / "v" / tested.KEY
    found = json.loads(kept.read_text()) if kept.exists() else {"outcome": None}
    assert found["outcome"] == outcome
    if outcome:
        assert found["fingerprint"] == "as it was"

"""`zokernels bench compare`: another commit beside the working tree, and no trace of it after."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import needs_native

from zokernels.lab.benchmarks import compare, machine, tested
from zokernels.lab.benchmarks.ops import Plan
from zokernels.lab.cli import main
from zokernels.lab.errors import InputError, RunError

LIBRARY = "zokernels/backends/_native.so"
BUILD = """
from pathlib import Path
import sys
assert sys.argv[1:] == ["-q", "build_ext", "--inplace"]
Path("zokernels/backends/_native.so").write_text("built of " + Path("csrc/a.cpp").read_text())
"""


def git(root, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    files = {
        "tests/conftest.py": "", "csrc/a.cpp": "first", "setup.py": BUILD, "zokernels/a.py": "",
        "zokernels/backends/b.py": "", ".gitignore": "*.so\n",
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / LIBRARY).write_text("here")
    return root


def test_a_commit_gets_its_own_library_and_git_is_left_alone(repository, tmp_path):
    before = git(repository, "rev-parse", "HEAD").strip()
    commit = compare.resolve("HEAD", repository)
    assert commit == before
    compare.unpack(commit, tmp_path / "same", repository)
    assert (tmp_path / "same" / LIBRARY).read_text() == "here"
    (repository / "csrc" / "a.cpp").write_text("second, not committed")
    os.utime(repository / LIBRARY)
    compare.unpack(commit, tmp_path / "other", repository)
    assert (tmp_path / "other" / LIBRARY).read_text() == "built of first"
    assert (repository / LIBRARY).read_text() == "here"
    assert git(repository, "status", "--porcelain") == " M csrc/a.cpp\n"
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert git(repository, "stash", "list") == git(repository, "branch", "--format=%(refname)")[:0]


def test_what_cannot_be_compared_is_said(repository, tmp_path):
    for ref in ("no-such-name", "--help", "HEAD~9"):
        with pytest.raises(InputError, match="is no commit of"):
            compare.resolve(ref, repository)
    with pytest.raises(InputError, match="needs a git checkout"):
        compare.resolve("HEAD", tmp_path)
    os.utime(repository / LIBRARY, (1, 1))
    with pytest.raises(InputError, match="older than its sources"):
        compare.unpack("HEAD", tmp_path / "a", repository)
    (repository / LIBRARY).unlink()
    (repository / "setup.py").write_text("raise SystemExit('no compiler')")
    git(repository, "commit", "-qam", "broken")
    with pytest.raises(RunError, match="could not be built: no compiler"):
        compare.unpack("HEAD", tmp_path / "b", repository)


def test_a_side_that_cannot_be_measured_is_named(repository, tmp_path):
    (repository / "zokernels" / "__init__.py").write_text("raise ImportError('too old')")
    with pytest.raises(RunError, match=r"repository could not be measured: .*too old"):
        compare.alternate(repository, tmp_path, Plan(), 1)


def test_the_sides_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(compare, "_side", lambda root, plan: order.append(root) or {})
    compare.alternate("A", "B", Plan(), 4)
    assert "".join(order) == "ABBAABBA"


@pytest.mark.parametrize(
    ("here", "verdict"),
    [
        ([1.0, 1.1, 1.05, 0.98], ""),
        ([1.30, 1.31, 1.29, 1.33], "slower"),
        ([0.80, 0.81, 0.79, 0.82], "faster"),
        # One of them as fast as the other side's slowest.
        ([1.30, 1.31, 1.02, 1.33], ""),
        # All of them slower, and hardly.
        ([1.031, 1.032, 1.031, 1.033], ""),
    ],
)
def test_a_difference_is_one_beyond_the_noise(here, verdict):
    base = [1.0, 1.02, 1.03, 1.01]
    if verdict == "" and here[0] == 1.031:
        base = [1.03, 1.029, 1.03, 1.028]
    key = ("float32", "adam", "gaussian", "", "native-avx2")
    (found,) = compare.differences(
        [{key: b, ("only", "here"): 1.0} for b in base], [{key: h} for h in here]
    )
    assert found.verdict == verdict
    assert found.low <= found.ratio <= found.high
    # Of too few processes nothing is said.
    (few,) = compare.differences([{key: b} for b in base[:3]], [{key: h} for h in here[:3]])
    assert few.verdict == ""


def is_repository():
    command = ["git", "-C", str(machine.ROOT), "rev-parse", "HEAD"]
    return tested.is_checkout() and subprocess.run(command, capture_output=True).returncode == 0


needs_git = pytest.mark.skipif(not is_repository(), reason="needs a git checkout with a commit")


@needs_git
def test_an_unknown_commit_is_one_sentence(capsys):
    assert main(["bench", "compare", "no-such-commit"]) == 2
    assert "'no-such-commit' is no commit of" in capsys.readouterr().err


@needs_git
@needs_native
def test_a_commit_against_itself_has_the_same_passes(tmp_path, monkeypatch, capsys):
    # The working tree's library counts as fresh, whatever the order in which files were copied.
    monkeypatch.setattr(compare, "_newest", lambda root: 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    git_state = [git(machine.ROOT, *a) for a in (("worktree", "list"), ("status", "--porcelain"))]
    out = tmp_path / "out.json"
    small = ["--runs", "1", "--repeats", "3", "--numel", "3001", "--dtype", "float32"]
    assert main(["bench", "compare", "HEAD", *small, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["environment"]["base"] == git(machine.ROOT, "rev-parse", "HEAD").strip()
    assert {row["key"][1] for row in found["compare"]} >= {"add_noise_", "sign", "momentum", "adam"}
    assert all(row["ratio"] > 0 and row["verdict"] == "" for row in found["compare"])
    assert "nothing is called a difference" in capsys.readouterr().out
    assert list(tmp_path.glob("zokernels-base-*")) == []
    assert git_state == [
        git(machine.ROOT, *a) for a in (("worktree", "list"), ("status", "--porcelain"))
    ]


@needs_git
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_removes_the_commits_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(commit, into):
        assert Path(into).is_relative_to(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "unpack", interrupted)
    assert main(["bench", "compare", "HEAD"]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "Interrupted; the commit's folder is removed" in capsys.readouterr().err

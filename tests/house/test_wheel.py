"""What a stranger gets: the sdist, and the wheel built of it, with no torch at the build."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import setuptools

import zokernels as zk

ROOT = Path(__file__).parents[2]
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools, beside the egg-info

MISTYPED = """
import zokernels as zk
zk.noise.mask(5, "half", seed=1)
"""


def files():
    """The repository's files, those that are not committed yet included."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, which says what belongs to the repository")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in names.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository, in which nothing was built."""
    place = tmp_path_factory.mktemp("tree")
    for name in files():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


def build(tree, what, **variables):
    """The archive that setup.py makes; whatever imports torch fails."""
    blocked = tree.parent / f"{tree.name}-blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "torch.py").write_text("raise SystemExit('the build imported torch')")
    subprocess.run(
        [sys.executable, "setup.py", "-q", what], cwd=tree, check=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(blocked), **variables},
    )  # fmt: skip
    (made,) = (tree / "dist").glob("*.whl" if what == "bdist_wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def sdist(tree):
    return build(tree, "sdist")


@pytest.fixture(scope="module")
def plain(tree, tmp_path_factory):
    """The wheel of a machine without a compiler."""
    copy = tmp_path_factory.mktemp("plain") / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("dist", "build"))
    return build(copy, "bdist_wheel", CXX="./no-such-compiler")


def unpacked(sdist, place):
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (root,) = place.iterdir()
    return root


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_has_every_file_of_the_repository_and_no_other(sdist):
    with tarfile.open(sdist) as archive:
        names = {n.name.partition("/")[2] for n in archive.getmembers() if n.isfile()}
    assert {n for n in names if "egg-info/" not in n} - MADE == files()


def test_a_wheel_built_without_a_compiler_is_whole_and_says_why_it_has_no_kernels(plain):
    _, version, python, abi, platform = plain.stem.split("-")
    assert (version, python, abi) == (zk.__version__, "py3", "none") and platform != "any"
    inside = contents(plain)
    assert not any(name.endswith(".so") for name in inside)
    why = inside["zokernels/backends/_build_error.txt"].decode()
    assert "no C++ compiler" in why and "./no-such-compiler" in why and "Install" in why
    package = {f for f in files() if f.startswith("zokernels/")}
    assert package <= inside.keys()


def test_on_windows_it_installs_and_says_that_there_are_no_kernels(monkeypatch, tmp_path):
    with mock.patch.object(setuptools, "setup"):
        found = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(sys, "platform", "win32")
    command = found["BuildNative"](setuptools.Distribution())
    command.compile = lambda library: library.write_text("made by some compiler")
    assert "Windows" in command.attempt(tmp_path / "_native.so")
    assert not list(tmp_path.iterdir())


def test_a_type_checker_sees_the_types(plain, tmp_path):
    pytest.importorskip("mypy", reason="needs mypy: pip install '.[dev]'")
    venv.create(tmp_path / "venv", with_pip=False)
    (python,) = (tmp_path / "venv").glob("bin/python")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(plain) as archive:
        archive.extractall(packages)
    (tmp_path / "user.py").write_text(MISTYPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "", "MYPYPATH": ""},
    )  # fmt: skip
    (error, count) = done.stdout.splitlines()
    assert error.startswith("user.py:3: error: Argument 2") and "[arg-type]" in error, done.stdout
    assert count.startswith("Found 1 error")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no kernels on Windows")
def test_the_sdist_builds_the_wheel_that_the_repository_builds(tree, sdist, tmp_path):
    # Unoptimised, which compiles sooner: the files are what is compared.
    options = {"ZOKERNELS_CXXFLAGS": "-O0"}
    ours = contents(build(tree, "bdist_wheel", **options))
    theirs = contents(build(unpacked(sdist, tmp_path), "bdist_wheel", **options))
    assert "zokernels/backends/_native.so" in ours
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []

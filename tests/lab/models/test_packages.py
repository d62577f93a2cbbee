"""Models inside of packages: found without an import, and joined by a package that says how."""

import sys

import pytest
import tiny_gguf
from tiny import build

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading, packages
from zokernels.lab.sweeps import file, plan

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
# One that notes that it was imported, and each time that it joined its parts.
JOINS = """
from pathlib import Path
import fake_parts

DATA = Path(__file__).parent
(DATA / "imported").touch()


def assemble(output_path=None, overwrite=False):
    parts = sorted((Path(fake_parts.__file__).parent).glob("*.part*"))
    with Path(output_path).open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    with (DATA / "calls").open("a") as calls:
        calls.write("x")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("packages") / "tiny.gguf"
    tiny_gguf.write(path)
    return path.read_bytes()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that packages are found in, and a cache of its own."""
    found = tmp_path / "site"
    found.mkdir()
    monkeypatch.syspath_prepend(str(found))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield found
    for name in [n for n in sys.modules if n.startswith("fake")]:
        del sys.modules[name]


def package(site, name, code="raise SystemExit('imported')", **files):
    """A package; files by their names with _ for a folder and __ for a dot."""
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(code)
    for path, data in files.items():
        at = site / name / path.replace("__", ".").replace("_", "/")
        at.parent.mkdir(exist_ok=True)
        at.write_bytes(data)


def in_parts(site, source, code=JOINS):
    package(site, "fake", code)
    half = len(source) // 2
    package(site, "fake_parts", "", x__part0=source[:half], x__part1=source[half:])


@pytest.mark.parametrize("name", ["package:fake", "package:fake/data", "package:fake/data/a.gguf"])
def test_a_file_inside_of_a_package_is_found_without_an_import(site, source, name):
    package(site, "fake", data_a__gguf=source)
    assert packages.located(name) == packages.joined(name) == str(site / "fake/data/a.gguf")
    loaded = loading.load(name)
    assert loaded.model.config.name_or_path == str(site / "fake/data/a.gguf")
    assert "fake" not in sys.modules


def test_a_folder_inside_of_a_package_is_a_model_as_ever(site, source):
    package(site, "fake", b__gguf=source)
    build("opt", site / "fake/model")
    assert packages.located("package:fake/model") == str(site / "fake/model")
    assert loading.load("package:fake/model").model.config.model_type == "opt"


def test_of_several_files_one_must_be_named(site, source):
    package(site, "fake", data_a__gguf=source, b__gguf=source)
    with pytest.raises(InputError, match=r"could be any of b\.gguf, data/a\.gguf; name one"):
        loading.load("package:fake")
    assert packages.located("package:fake/b.gguf") == str(site / "fake/b.gguf")


@pytest.mark.parametrize("code", ["", "assemble = 3", "def assemble(:", "# assemble\nx = 1\0"])
def test_a_package_without_a_model_is_refused_and_not_imported(site, code):
    package(site, "fake", "(__import__('pathlib').Path(__file__).parent / 'ran').touch()\n" + code)
    with pytest.raises(InputError, match="no installed package 'fake' with a model in"):
        loading.load("package:fake")
    assert not (site / "fake/ran").exists()


def test_parts_are_joined_once_into_the_cache(site, source, tmp_path):
    in_parts(site, source)
    path = packages.located("package:fake")
    # Planning a sweep asks where the model is.
    sweep = tmp_path / "grid.yaml"
    sweep.write_text("base: {model: 'package:fake'}\ngrid: {lr: [1.0, 2.0]}\n")
    assert len(plan.plan(file.read(sweep), tmp_path / "out", sweep)[0]) == 2
    assert not (site / "fake/imported").exists() and not (tmp_path / "cache").exists()
    for _ in range(2):
        assert "fake" in loading.load("package:fake").notes[0]
    assert (site / "fake/calls").read_text() == "x"
    assert [str(p) for p in (tmp_path / "cache/zokernels").iterdir()] == [path]
    assert (tmp_path / "cache/zokernels").joinpath(path).read_bytes() == source


def test_another_release_is_joined_anew(site, source):
    in_parts(site, source)
    first = packages.joined("package:fake")
    (site / "fake/__init__.py").write_text(JOINS + "\nRELEASE = 2\n")
    assert packages.located("package:fake") != first


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "def assemble(path):\n    path.write_bytes(b'x' * 9)\n    raise OSError('disk full')",
            "disk",
        ),
        ("def assemble(path):\n    pass", "No such file"),
        ("import fake_missing\ndef assemble(path):\n    pass", "fake_missing"),
        ("def assemble():\n    pass", "positional argument"),
    ],
)
def test_parts_that_do_not_join_leave_nothing(site, tmp_path, capsys, code, reason):
    package(site, "fake", code)
    argv = ["finetune", "--model", "package:fake", "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "the package's own function assemble did not write" in said and reason in said
    assert said.count("\n") == 1
    assert list((tmp_path / "cache/zokernels").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_package_goes_on_and_replays(site, source, tmp_path, capsys):
    in_parts(site, source)
    rows = "sentence\tlabel\n" + "the film was good\t1\nthe plot was bad\t0\n" * 8
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(rows)
    out = str(tmp_path / "run")
    argv = ["--model", "package:fake", "--data", str(tmp_path), "--steps", "3", "--out", out]
    assert main(["finetune", *argv, "--batch-size", "4", "--lr", "1e-3"]) == 0
    assert "`package:fake`" in (tmp_path / "run/report.md").read_text()
    (tmp_path / "run/metrics.json").unlink()
    assert main(["finetune", "--resume", out]) == 0
    assert main(["replay", "package:fake", out, "--verify"]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_the_cache_is_where_the_base_directories_say(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, base in ((str(tmp_path / "x"), "x"), ("", ".cache"), ("relative", ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert packages.cache() == tmp_path / base / "zokernels"

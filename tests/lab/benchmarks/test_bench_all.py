"""`zokernels bench all`: every benchmark into one folder, whatever becomes of one of them."""

import json
import subprocess

import pytest
from conftest import needs_native

from zokernels.lab.benchmarks import suite
from zokernels.lab.cli import main
from zokernels.lab.cli.bench import all as everything

TINY = ("--device", "cpu", "--numel", "3001", "--repeats", "2", "--dtype", "float32")


@needs_native
def test_bench_all_fills_a_folder_and_goes_on_after_a_failure(tmp_path, monkeypatch, capfd):
    runs = [
        suite.Run("ops", ("--dtype", "int8"), 1, "broken"),
        suite.Run("ops", TINY, 1, "ops"),
        suite.Run("step", (), 1, "step", "no_such_package"),
    ]
    monkeypatch.setattr(suite, "runs", lambda full: runs)
    out, answer = tmp_path / "deep" / "out", tmp_path / "out.json"
    assert main(["bench", "all", "--out", str(out), "--json", str(answer)]) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(answer.read_text())
    assert [r["outcome"] for r in summary["runs"]] == ["failed", "done", "left out"]
    assert summary["environment"]["tests"] in ("passed", "failed", "not run", "no checkout")
    for name in summary["runs"][1]["files"]:
        assert (out / name).stat().st_size > 0
    said = capfd.readouterr()
    assert "about 3 minutes on two cores, at most 12" in said.err
    assert "--dtype must be one of" in said.err
    assert "it needs no_such_package: pip install no_such_package" in " ".join(said.out.split())
    assert "add_noise_ float32:" in said.out and "times its floor" in said.out


def test_bench_all_leaves_a_full_folder_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert main(["bench", "all", "--out", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert main(["bench", "all", "--out", str(tmp_path / "mine.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    def slow(command, limit, environment):
        raise subprocess.TimeoutExpired(command, limit)

    monkeypatch.setattr(everything, "_process", slow)
    monkeypatch.setattr(suite, "runs", lambda full: [suite.Run("ops", TINY, 0.5, "ops")])
    assert main(["bench", "all", "--out", str(tmp_path / "out")]) == 1
    (run,) = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert run["outcome"] == "stopped" and run["why"] == "it took more than 120 s"


def test_an_interrupt_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    def interrupted(command, limit, environment):
        raise KeyboardInterrupt

    monkeypatch.setattr(everything, "_process", interrupted)
    assert main(["bench", "all", "--out", str(tmp_path / "out")]) == 130
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["runs"] == []
    assert "what was done before is kept" in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True])
def test_every_run_is_a_command_that_takes_its_options(full, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    runs = suite.runs(full)
    for run in runs:
        assert main(["bench", run.command, "--help"]) == 0
        said = capsys.readouterr().out
        for option in (*run.options, "--csv", "--json", "--plot"):
            assert not option.startswith("--") or option in said, option
    assert len({run.name for run in runs}) == len(runs)

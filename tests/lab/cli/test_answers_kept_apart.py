"""Nothing that a command reads, and nothing of a run, is replaced by an answer or by a new run."""

import json
import shutil

import pytest

from zokernels.lab import files
from zokernels.lab.cli import main

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]

TASK = "prompt: '{sentence} It was'\nwords: [terrible, great]\n"


@pytest.fixture
def here(places, tmp_path, monkeypatch):
    """A folder with a model, data, a task, a grid and a finished run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(places / "opt", "m")
    shutil.copytree(places, "d", ignore=shutil.ignore_patterns("opt", "*bert*"))
    (tmp_path / "t.yaml").write_text(TASK)
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "a film good\t1\n" * 20)
    (tmp_path / "grid.yaml").write_text("base: {model: m, data: d, steps: 1}\n")
    assert main([*ONE, "--out", "r"]) == 0
    return tmp_path


ONE = "finetune --model m --data d --steps 1 --eval-examples 4 --max-length 32".split()
OWN = "finetune --model m --data rows.tsv --eval-data e.tsv --task t.yaml --steps 1".split()


def state(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


REFUSED = [
    ["predict", "r", "rows.tsv", "--out", "rows.tsv"],
    ["predict", "r", "rows.tsv", "--out", "link.tsv"],
    ["predict", "m", "rows.tsv", "--task", "t.yaml", "--out", "t.yaml"],
    ["evaluate", "r", "--json", "d/dev.tsv"],
    ["evaluate", "r", "--data", "rows.tsv", "--json", "rows.tsv"],
    ["evaluate", "r", "--json", "r/trajectory.zk"],
    ["evaluate", "r", "--json", "r/final/config.json"],
    ["evaluate", "m", "--data", "d", "--json", "m/config.json"],
    ["replay", "m", "r", "--verify", "--json", "r/config.json"],
    ["replay", "m", "r/trajectory.zk", "--out", "n", "--json", "r/trajectory.zk"],
    ["sweep", "grid.yaml", "--out", "s", "--json", "grid.yaml"],
    ["sweep", "grid.yaml", "--out", "s", "--json", "m/config.json"],
    [*ONE, "--out", "n", "--json", "d/train.tsv"],
    [*ONE, "--out", "n", "--json", "r/metrics.json"],
    [*ONE, "--out", "empty", "--json", "empty/config.json"],
    [*OWN, "--out", "n", "--json", "e.tsv"],
    [*OWN, "--out", "n", "--json", "t.yaml"],
    ["tune", *ONE[1:5], "--json", "d/train.tsv"],
    ["tune", *ONE[1:5], "--plot", "r/plot.png"],
    ["env", "--json", "r/config.json"],
    [*ONE, "--model", "r/final", "--out", "r", "--overwrite"],
    [*ONE, "--data", "r/final/d", "--out", "../x/r", "--overwrite"],
    [*OWN, "--eval-data", "r/final/e.tsv", "--out", "r", "--overwrite"],
    [*OWN, "--task", "r/merged/t.yaml", "--out", "r", "--overwrite"],
]


def test_what_a_command_reads_stays(here, capsys):
    for name in ("e.tsv", "r/final/e.tsv"):
        shutil.copy("rows.tsv", name)
    (here / "link.tsv").symlink_to("rows.tsv")
    (here / "r" / "merged").mkdir()
    shutil.copy("t.yaml", "r/merged/t.yaml")
    shutil.copytree("d", "r/final/d")
    (here / "empty").mkdir()
    (here.parent / "x").symlink_to(here)
    before = state(here)
    for argv in REFUSED:
        assert main(argv) == 2, argv
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
        assert "reads" in said or "a file of the run in" in said, (argv, said)
        assert state(here) == before, argv


def test_other_files_are_replaced_as_ever(here):
    for path in ("old.json", "r/mine.json", "d/old.json"):
        (here / path).write_text("old")
        assert main(["evaluate", "r", "--eval-examples", "4", "--json", path]) == 0
        assert json.loads((here / path).read_text())["examples"] == 4
    assert main([*ONE, "--out", "r", "--overwrite", "--json", "r/mine.json"]) == 0
    assert (here / "r" / "mine.json").exists()


def test_answers_are_not_lost_where_they_can_not_be_written(here, monkeypatch, capsys):
    assert main(["predict", "r", "rows.tsv", "--out", "/proc/a.jsonl"]) == 2
    assert "--out /proc/a.jsonl cannot be written" in capsys.readouterr().err

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    assert main(["predict", "r", "rows.tsv", "--out", "a.jsonl"]) == 1
    out, err = capsys.readouterr()
    assert err.endswith("No space left on device. The answers are on the screen.\n")
    assert len([json.loads(line) for line in out.splitlines()]) == 20

"""Runs that end in unusual ways end with a sentence, and can go on."""

import errno
import json
import os
from pathlib import Path

import pytest

from zokernels.lab.cli import main
from zokernels.lab.cli import sweep as command
from zokernels.lab.runs import evaluate
from zokernels.lab.runs.folder import RunFolder
from zokernels.lab.runs.lock import NAME

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


def finetune(places, out, *options):
    model = ["--model", str(places / "bert"), "--data", str(places), "--max-length", "32"]
    return ["finetune", *model, "--out", str(out), "--steps", "4", *options]


def last(capsys):
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_log_that_a_full_disk_cut_short_does_not_keep_the_folder(tmp_path):
    """What was not written is tried again when the file is closed."""
    with pytest.raises(OSError, match="No space left"):
        with RunFolder(tmp_path / "run") as run:
            run.begin({})
            run._log = open("/dev/full", "w")
            run.log({"step": 1})
    assert not (tmp_path / "run" / NAME).exists()


def test_a_second_ctrl_c_says_what_is_kept(places, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", evaluate.accuracy

    def accuracy(scorer, *args, **options):
        if evaluated:
            raise KeyboardInterrupt
        evaluated.append(1)
        return real(scorer, *args, **options)

    evaluated = []
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "accuracy", accuracy)
        assert main(finetune(places, out)) == 130
    said = last(capsys)
    assert "after 4 steps" in said and said.endswith(f"zokernels finetune --resume {out}")
    assert main(["finetune", "--resume", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["steps"] == 4


def test_a_ctrl_c_before_the_run_says_that_nothing_is_kept(places, tmp_path, monkeypatch, capsys):
    from zokernels.lab.runs import learner

    def load(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learner, "load", load)
    (tmp_path / "run").mkdir()
    assert main(finetune(places, tmp_path / "run")) == 130
    assert "before there was anything to keep" in last(capsys)
    assert not list((tmp_path / "run").iterdir())


def test_a_step_too_large_for_binary32_ends_the_run(places, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(finetune(places, out, "--lr", "1e38", "--weight-decay", "1e38")) == 1
    assert "must stay finite in binary32" in last(capsys)
    assert json.loads((out / "metrics.json").read_text())["failure"]


def test_a_run_whose_every_loss_is_not_finite_says_so(places, tmp_path, capsys):
    """Even if it has fewer steps than end a run."""
    assert main(finetune(places, tmp_path / "run", "--eps", "1e30")) == 0
    assert "no loss was finite" in capsys.readouterr().out


def test_tables_of_a_sweep_that_cannot_be_written(places, tmp_path, monkeypatch, capsys):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    base = f"model: {places / 'bert'}, data: {places}, steps: 2, max_length: 32"
    grid.write_text(f"base: {{{base}}}\n")

    def write_text(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as patched:
        patched.setattr(command, "write_text", write_text)
        assert main(["sweep", str(grid), "--out", str(out)]) == 1
    assert "tables" in (said := last(capsys)) and "No space left on device. Make room" in said
    assert main(["sweep", str(grid), "--out", str(out)]) == 0
    assert "1 runs: 1 kept" in capsys.readouterr().out
    assert (out / "table.md").exists()

"""A folder has one owner: a run, a sweep or a replay, until that ends or its process dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import environment

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.runs import rebuild
from zokernels.lab.runs.folder import RunFolder
from zokernels.lab.runs.lock import NAME, FolderLock
from zokernels.lab.sweeps.folder import SweepFolder

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


def command(places, out, *options, steps=30):
    model = ["--model", str(places / "bert"), "--data", str(places), "--max-length", "32"]
    return ["finetune", *model, "--out", str(out), "--steps", str(steps), "--lr", "1e-3", *options]


def started(argv):
    """A process of its own with the command."""
    return subprocess.Popen(
        [sys.executable, "-m", "zokernels.lab.cli", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def held(path):
    """What is in a folder, less what a run at work goes on adding to."""
    grows = ("trajectory.zk", "metrics.jsonl")
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name not in grows}


def test_of_two_runs_begun_at_the_same_moment_one_has_the_folder(places, tmp_path):
    out = tmp_path / "run"
    both = [started(command(places, out, "--seed", seed)) for seed in "01"]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    (refused,) = [error for code, error in zip(codes, errors, strict=True) if code]
    # It may come just after the other has ended.
    assert "Another run is at work" in refused or "holds an earlier run" in refused
    assert len(refused.strip().splitlines()) == 1
    kept = json.loads((out / "config.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    assert kept["seed"] == metrics["seed"] == codes.index(0)
    assert metrics["steps"] == 30
    assert main(["replay", str(places / "bert"), str(out), "--verify"]) == 0
    assert not (out / NAME).exists()


def test_beside_a_run_nothing_else_begins_until_it_is_killed(places, tmp_path, capsys):
    out, grid = tmp_path / "run", tmp_path / "grid.yaml"
    grid.write_text(f"base: {{model: {places / 'bert'}, data: {places}, steps: 3}}\n")
    live, deadline = started(command(places, out, steps=10**6)), time.monotonic() + 60
    try:
        while not ((log := out / "metrics.jsonl").exists() and '"loss"' in log.read_text()):
            assert time.monotonic() < deadline and live.poll() is None
            time.sleep(0.05)
        before = held(out)
        for argv, sentence in (
            (command(places, out), f"Another run is at work in {out} (process {live.pid} on "),
            (command(places, out, "--overwrite"), "Another run is at work"),
            (["finetune", "--resume", str(out)], "Another run is at work"),
            (["sweep", str(grid), "--out", str(out)], "not the folder of a sweep"),
        ):
            assert main(argv) == 2
            said = capsys.readouterr().err
            assert sentence in said and said.count("\n") == 1
        assert held(out) == before
        assert live.poll() is None
        # Reading goes on.
        replay = ["replay", str(places / "bert"), str(out), "--until", "1"]
        assert main([*replay, "--out", str(tmp_path / "early")]) == 0
    finally:
        live.kill()
        live.communicate()
    assert (out / NAME).exists()
    assert main(command(places, out, "--overwrite", steps=4)) == 0
    assert json.loads((out / "metrics.json").read_text())["steps"] == 4
    assert not (out / NAME).exists()


def test_what_became_of_a_folder_since_it_was_looked_at_counts(tmp_path):
    """While one process loads its model, another's run begins there and ends."""
    with RunFolder(tmp_path / "run") as late:
        with RunFolder(tmp_path / "run") as early:
            early.begin({"seed": 1})
            with pytest.raises(InputError, match="Another run is at work"):
                late.begin({"seed": 2})
        with pytest.raises(InputError, match="holds an earlier run"):
            late.begin({"seed": 2})
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 1


def test_a_sweep_and_a_run_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with FolderLock(out, "sweep"):
        with pytest.raises(InputError, match="Another sweep is at work"):
            RunFolder(out).__enter__()
        with pytest.raises(InputError, match="Another sweep is at work"):
            SweepFolder(out, "").__enter__()
    with SweepFolder(out, ""):
        with pytest.raises(InputError, match="not a run folder"):
            RunFolder(out, overwrite=True).__enter__()
        # The runs of a sweep are inside, and have folders of their own.
        with RunFolder(out / "grid/cell") as run:
            run.begin({})
    assert {p.name for p in out.iterdir()} == {"sweep.yaml", "grid"}


def test_two_replays_do_not_share_a_folder(places, tmp_path, capsys, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(command(places, run, steps=2)) == 0
    argv = ["replay", str(places / "bert"), str(run), "--out", str(out)]
    with FolderLock(out, "replay"):
        assert main(argv) == 2
    assert "Another replay is at work" in capsys.readouterr().err
    assert not out.exists()

    def full(path, fill):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(rebuild.files, "write_folder", full)
        assert main(argv) == 1
    assert not out.exists()
    assert main(argv) == 0
    assert (out / "model.safetensors").exists() and not (out / NAME).exists()


def test_a_folder_made_for_nothing_goes_with_the_lock(tmp_path):
    with FolderLock(tmp_path / "new", "run"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with FolderLock(tmp_path / "new", "run"):
        (tmp_path / "new/result").write_text("kept")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["result"]


def test_a_killed_process_frees_its_folder_at_once(tmp_path):
    code = (
        "import os, sys, pathlib; from zokernels.lab.runs.lock import FolderLock\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]), 'run')\n"
        "print(os.getpid(), flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], text=True, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert int(process.stdout.readline()) == process.pid
    with pytest.raises(InputError, match=f"process {process.pid}"):
        FolderLock(tmp_path, "run")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # What it left is a file that holds nobody up.
    assert (tmp_path / NAME).exists()
    FolderLock(tmp_path, "run").release()
    assert not (tmp_path / NAME).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    """As a worker of a DataLoader may that its parent's death leaves behind."""
    (hold, let_go), (ready, say) = os.pipe(), os.pipe()
    first = FolderLock(tmp_path, "run")
    if not (child := os.fork()):
        os.close(let_go)
        os.write(say, b"x")
        # The end of what it inherited is not the end of its parent's lock.
        first.release()
        os.read(hold, 1)
        os._exit(0)
    os.close(hold)
    os.read(ready, 1)
    try:
        with pytest.raises(InputError, match="Another run is at work"):
            FolderLock(tmp_path, "run")
        os.close(first._fd)  # As the system does when the process dies.
        with FolderLock(tmp_path, "run"):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        first._fd = -1
        for fd in (let_go, ready, say):
            os.close(fd)
        os.waitpid(child, 0)


def test_a_lock_file_never_leads_elsewhere(tmp_path):
    """Nor is what it leads to written to."""
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(tmp_path / "thesis")
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder(tmp_path / "run").__enter__()
    assert (tmp_path / "thesis").read_text() == "years of work"

"""A run that is killed, again and again, ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import build, environment

import zokernels as zk
from zokernels.lab import files
from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.runs import folder, resume
from zokernels.lab.runs.run import Finetune

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]

# Two queries, 16-bit weights, a schedule, decay and a best step: all that a resume must bring back.
OPTIONS = (
    "--steps 40 --batch-size 6 --lr 2e-2 --eps 1e-2 --num-queries 2 --schedule cosine --seed 3 "
    "--weight-decay 0.1 --rounding stochastic --dtype bfloat16 --eval-every 5 --eval-examples 20 "
    "--keep-best --max-length 16 --balanced"
).split()
LATE = {"saving", "saved", "metrics"}


class Runs:
    """The process of `killed`, which starts runs and tells how they ended."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(),
        )  # fmt: skip

    def run(self, argv, point=None, count=0, kill_after=None):
        """The exit code of a run; −9 where it was killed."""
        order = {"argv": argv, "point": point, "count": count}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def close(self):
        """Ends it."""
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def runs():
    found = Runs()
    yield found
    found.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, runs):
    """A model, data, and the run that nobody killed."""
    root = tmp_path_factory.mktemp("resume")
    build("bert", root / "bert")
    rows = [
        f"the {word} {tail}\t{int(tail in ('good', 'fine'))}\n"
        for word in ("film", "movie", "plot", "heart")
        for tail in ("good", "fine", "bad", "dull")
    ] * 4
    for split in ("train", "dev"):
        (root / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    assert runs.run(begin(root, root / "whole")) == 0
    return root


def begin(root, out):
    model = ["--model", str(root / "bert"), "--data", str(root)]
    return ["finetune", *model, "--out", str(out), *OPTIONS]


def go_on(out):
    return ["finetune", "--resume", str(out)]


def without_times(value):
    if isinstance(value, dict):
        timed = ("seconds", "share_", "outside_", "parts", "step_seconds")
        return {k: without_times(v) for k, v in value.items() if not k.startswith(timed)}
    return value


def assert_same_run(one, other):
    """Weights, trajectory, log and metrics: all but what a clock says."""
    files = sorted(p.name for p in (one / "final").iterdir())
    assert files == sorted(p.name for p in (other / "final").iterdir())
    # The card says where it was saved, and how many bytes the log has.
    for name in set(files) - {"README.md"}:
        assert (one / "final" / name).read_bytes() == (other / "final" / name).read_bytes()
    first, second = (zk.Trajectory(p / "trajectory.zk") for p in (one, other))
    assert (first.passes, first.steps) == (second.passes, second.steps)
    texts = [(p / "metrics.jsonl").read_text().splitlines() for p in (one, other)]
    logs = [[without_times(json.loads(line)) for line in lines] for lines in texts]
    assert logs[0] == logs[1]
    metrics = [without_times(json.loads((p / "metrics.json").read_text())) for p in (one, other)]
    assert metrics[0] == metrics[1]
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}


def test_three_kills_lose_nothing(runs, place, tmp_path):
    """In a forward, in the middle of a record, and while the weights are saved."""
    out = tmp_path / "run"
    assert runs.run(begin(place, out), "forward", 50) == -signal.SIGKILL
    assert runs.run(go_on(out), "record", 9) == -signal.SIGKILL
    assert zk.Trajectory(out / "trajectory.zk").torn > 0
    assert runs.run(go_on(out), "saving") == -signal.SIGKILL
    assert not (out / "final").exists()
    assert runs.run(go_on(out)) == 0
    assert_same_run(out, place / "whole")


@pytest.mark.slow
def test_thirty_kills_lose_nothing(runs, place, tmp_path):
    """At every kind of point, and at moments that nobody chose."""
    chosen, out, killed = random.Random(11), tmp_path / "run", []
    assert runs.run(begin(place, out), "begin") == -signal.SIGKILL
    points = ["forward", "update", "record", "log", "evaluation"] * 4
    chosen.shuffle(points)
    for point in points:
        count = {"forward": 6, "evaluation": 1}.get(point, 2)
        if runs.run(go_on(out), point, chosen.randrange(count)) == -signal.SIGKILL:
            killed.append(point)
    for _ in range(8):
        # A run lives for some 0.4 s here, most of it in steps.
        if runs.run(go_on(out), kill_after=chosen.uniform(0.02, 0.35)) == -signal.SIGKILL:
            killed.append("anywhere")
    for point in sorted(LATE):
        assert runs.run(go_on(out), point) == -signal.SIGKILL
        killed.append(point)
    assert len(killed) >= 20
    assert {"forward", "update", "record", "log", "evaluation", *LATE} <= set(killed)
    assert runs.run(go_on(out)) == 0
    assert_same_run(out, place / "whole")
    assert main(["replay", str(place / "bert"), str(out), "--verify"]) == 0


def test_an_interrupted_run_goes_on(place, tmp_path):
    """Ctrl-C ends a run between two steps, with its weights saved; it need not be the end."""
    settings = resume.read_settings(place / "whole")
    settings.out = tmp_path / "run"
    run = Finetune(settings)
    run.watcher.step = lambda number, *_: run.stopped.set() if number == 13 else None
    assert run.run()["interrupted"]
    again = Finetune(resume.settings_of(settings.out), resume=True)
    assert not again.run()["interrupted"]
    assert_same_run(tmp_path / "run", place / "whole")


@pytest.fixture
def stopped(place, tmp_path):
    """A run that was interrupted after five steps."""
    settings = resume.read_settings(place / "whole")
    settings.out = tmp_path / "run"
    run = Finetune(settings)
    run.watcher.step = lambda number, *_: run.stopped.set() if number == 5 else None
    run.run()
    return settings.out


def test_what_cannot_go_on_is_refused_in_one_sentence(place, stopped, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    whole = (stopped / "trajectory.zk").read_bytes()

    def damage():
        (stopped / "trajectory.zk").write_bytes(whole[:40] + b"x" + whole[41:])

    for argv, sentence, before in (
        (go_on(tmp_path / "gone"), "is not a run folder", None),
        (go_on(tmp_path / "other"), "is not a run folder", None),
        (go_on(place / "whole"), "is finished", None),
        ([*go_on(stopped), "--lr", "1"], "leave out --lr", None),
        (go_on(stopped), "damaged at byte 8", damage),
    ):
        if before:
            before()
        files = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
        assert main(argv) == 2
        assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
        assert files == {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}


def test_other_data_or_another_model_is_refused(place, stopped, monkeypatch):
    settings = resume.settings_of(stopped)
    build("bert", stopped.parent / "bert2", seed=1)
    settings.model = str(stopped.parent / "bert2")
    with pytest.raises(InputError, match="is not what it was"):
        Finetune(settings, resume=True).run()
    settings = resume.settings_of(stopped)
    settings.data = str(stopped.parent)
    for split in ("train", "dev"):
        text = (place / f"{split}.tsv").read_text().replace("heart", "one")
        (stopped.parent / f"{split}.tsv").write_text(text)
    with pytest.raises(InputError, match="training examples are not those"):
        Finetune(settings, resume=True).run()


def test_a_disk_that_fills_up_ends_the_run_with_the_command_that_goes_on(
    place, tmp_path, monkeypatch, capsys
):
    out, real, calls = tmp_path / "run", folder.RunFolder.log, []

    def log(self, record):
        calls.append(record)
        if len(calls) == 9:
            raise OSError(28, os.strerror(28))
        real(self, record)

    monkeypatch.setattr(folder.RunFolder, "log", log)
    assert main(begin(place, out)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in error
    assert error.endswith(f"zokernels finetune --resume {out}")
    monkeypatch.undo()
    assert main(go_on(out)) == 0
    assert_same_run(out, place / "whole")


def test_a_save_that_fails_keeps_what_was_saved_before(tmp_path):
    def good(path):
        (path / "weights").write_text("old")

    def bad(path):
        (path / "weights").write_text("half")
        raise RuntimeError("No space left on device")

    files.write_folder(tmp_path / "final", good)
    with pytest.raises(OSError, match="No space left"):
        files.write_folder(tmp_path / "final", bad)
    assert (tmp_path / "final/weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]

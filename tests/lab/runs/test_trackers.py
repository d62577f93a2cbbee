"""A run's numbers in trackers: the curve that TensorBoard shows is the run's log."""

import json
import subprocess
import sys

import pytest
from tiny import environment

from zokernels.lab.errors import InputError
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.runs.trackers import Trackers, numbers

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


def settings(places, out, **extra):
    given = dict(steps=6, batch_size=8, lr=1e-3, max_length=32, eval_every=3, eval_examples=20)
    return Settings(model=str(places / "opt"), data=str(places), out=out, **{**given, **extra})


def test_tensorboard_has_the_runs_log(places, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    Finetune(settings(places, out, report_to="tensorboard")).run()
    read = EventAccumulator(str(out / "tensorboard/zokernels")).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name, key in (
        ("train/loss", "loss"),
        ("train/outside_forwards", "outside_forwards"),
        ("train/lr", "lr"),
    ):
        found = [(e.step, e.value) for e in read.Scalars(name)]
        assert found == [(r["step"], pytest.approx(r[key])) for r in lines if "loss" in r]
    slopes = [e.value for e in read.Scalars("train/projected_gradient")]
    assert slopes == pytest.approx([r["projected_gradients"][0] for r in lines if "loss" in r])
    dev = [(e.step, e.value) for e in read.Scalars("dev/accuracy")]
    assert dev == [(r["step"], pytest.approx(r["value"])) for r in lines if "split" in r]
    # Begun anew, the old curve is gone.
    Finetune(settings(places, out, overwrite=True)).run()
    assert not (out / "tensorboard").exists()


def test_several_slopes_are_told_by_their_root_mean_square():
    line = dict(step=1, loss=None, lr=1.0, outside_forwards=0.5, seconds=1.0, forwards=4)
    found = numbers({**line, "projected_gradients": [3.0, None, -4.0]})
    assert found["train/projected_gradient"] == pytest.approx(12.5**0.5)
    # JSON has no NaN, and a tracker gets none.
    assert "train/loss" not in found


@pytest.mark.parametrize(
    "names, words",
    [
        ("tensorbord", "--report-to takes .*tensorboard.*; got 'tensorbord'"),
        ("tensorboard, aim", "--report-to aim needs a package that is not installed"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_first(places, tmp_path, names, words):
    pytest.importorskip("tensorboard")
    with pytest.raises(InputError, match=words):
        Finetune(settings(places, tmp_path / "run", report_to=names)).run()
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_end_the_run(places, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator

    said, watcher, calls = [], Watcher(), []
    watcher.say = said.append

    def log(self, values, step):
        calls.append(step)
        if step == 2:
            raise ConnectionError("gone away")

    monkeypatch.setattr(Accelerator, "log", log)
    metrics = Finetune(settings(places, tmp_path / "run", report_to="tensorboard"), watcher).run()
    assert metrics["steps"] == 6 and calls == [0, 1, 2]
    (told,) = [s for s in said if "--report-to" in s]
    assert "tensorboard stopped (ConnectionError: gone away); the run goes on" in told


def test_nothing_is_imported_unless_it_is_asked_for(places, tmp_path):
    code = (
        "import sys\nfrom zokernels.lab.cli import main\n"
        f"assert main(['finetune', '--model', {str(places / 'opt')!r}, '--steps', '1', '--data', "
        f"{str(places)!r}, '--out', {str(tmp_path / 'run')!r}, '--eval-examples', '0']) == 0\n"
        "bad = {'tensorboard', 'wandb', 'mlflow', 'trackio'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_a_tracker_there_is_nothing_to_do(places, tmp_path):
    quiet = Trackers(settings(places, tmp_path / "run"), Watcher())
    quiet.begin(), quiet.log({"step": 0}), quiet.end()
    assert not (tmp_path / "run").exists()

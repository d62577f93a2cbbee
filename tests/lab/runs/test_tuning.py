"""``--lr auto``: a probe before the first step, once, and what it found in the run's folder."""

import itertools
import json

import pytest
import torch
from test_finetune import settings, weights

from zokernels.lab.errors import InputError, RunError
from zokernels.lab.runs import tuning
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.resume import settings_of
from zokernels.lab.runs.run import Finetune
from zokernels.lab.scoring import Scorer
from zokernels.lab.tasks import batches
from zokernels.lab.tasks.task import Example

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
# The loss is convex in a head; of all weights of a random model h is near 0, and no rate is told.
AUTO = dict(lr="auto", scheme="head", batch_size=32, probe_forwards=424, seed=1)


class Hearer(Watcher):
    """Hears what a run says, and may stop it after a step."""

    def __init__(self, stop_after=None):
        self.said, self.probed, self.stop_after = [], [], stop_after
        self.run = None

    def say(self, sentence):
        self.said.append(sentence)

    def probing(self, done, total):
        self.probed.append((done, total))

    def step(self, number, loss, seconds, outside):
        if number == self.stop_after:
            self.run.stopped.set()


def auto(places, out, **extra):
    return settings(places, out, "opt", **{**AUTO, **extra})


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """A run with a rate of its own finding, its metrics, and what it said."""
    out, watcher = tmp_path_factory.mktemp("auto") / "run", Hearer()
    metrics = Finetune(auto(places, out), watcher).run()
    return out, metrics, watcher


def test_the_rate_is_chosen_said_and_written(whole):
    out, metrics, watcher = whole
    config = json.loads((out / "config.json").read_text())
    found = config["tuned"]
    assert config["lr"] == float(f"{found['rate']['value']:.2g}") > 0
    assert 0 < found["rate"]["value"] <= 0.7 * found["best_rate"]["value"]
    assert found["steps"] == config["steps"]
    assert found["forwards"] == 424 == watcher.probed[-1][0]
    assert metrics["probe"] == found
    said = next(s for s in watcher.said if s.startswith("lr "))
    assert f"lr {config['lr']:g} by a probe of 424 forwards" in said
    assert said.removesuffix(".") in (out / "report.md").read_text()
    # The probe's forwards are not the training's.
    assert metrics["forwards"] == 10


def test_the_run_is_that_of_the_rate_given(whole, places, tmp_path):
    out, _, _ = whole
    rate = json.loads((out / "config.json").read_text())["lr"]
    metrics = Finetune(auto(places, tmp_path / "given", lr=rate)).run()
    assert metrics["probe"] is None
    losses = [
        [
            json.loads(line).get("loss")
            for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]
        ]
        for folder in (out, tmp_path / "given")
    ]
    assert losses[0] == losses[1]


def test_a_resumed_run_does_not_probe_again(whole, places, tmp_path, monkeypatch):
    out, watcher = tmp_path / "run", Hearer(stop_after=3)
    run = Finetune(auto(places, out), watcher)
    watcher.run = run
    assert run.run()["interrupted"]
    monkeypatch.setattr(tuning.zk, "probe", lambda *_, **__: pytest.fail("probed again"))
    kept = settings_of(out)
    assert kept.auto_lr and kept.tuned and kept.lr > 0
    metrics = Finetune(kept, resume=True).run()
    assert metrics["steps"] == 5 and metrics["probe"] == whole[1]["probe"]
    assert f"lr {kept.lr:g} by a probe" in (out / "report.md").read_text()
    import safetensors.torch

    one, other = (
        safetensors.torch.load_file(o / "final/model.safetensors") for o in (whole[0], out)
    )
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_sweeps_worker_that_resumes_takes_the_rate_of_the_folder(places, tmp_path, monkeypatch):
    """It has the settings of the sweep's file, in which there is no rate."""
    out, watcher = tmp_path / "run", Hearer(stop_after=2)
    run = Finetune(auto(places, out), watcher)
    watcher.run = run
    run.run()
    monkeypatch.setattr(tuning.zk, "probe", lambda *_, **__: pytest.fail("probed again"))
    rate = json.loads((out / "config.json").read_text())["lr"]
    again = Finetune(auto(places, out), resume=True)
    again.run()
    assert again.settings.lr == rate and again.done == 5


def test_where_no_rate_is_told_nothing_begins(places, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="no rate is advised after 224 forwards: .*give --lr a"):
        Finetune(auto(places, out, scheme="full", eps=100.0, probe_forwards=224)).run()
    assert not out.exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (dict(optimizer="fo-adam"), "--lr auto is for zeroth-order optimizers"),
        (dict(optimizer="forward-grad"), "takes derivatives"),
        (dict(optimizer="zo-adam"), "no rate follows from a probe with --optimizer zo-adam"),
        (dict(blocks="layer"), "no rate follows from a probe with --blocks"),
        (dict(probe_forwards=100), "forwards is 100"),
        (dict(probe_forwards=0), "--probe-forwards must be at least 1"),
    ],
)
def test_what_can_not_be_probed_is_refused(places, tmp_path, extra, words):
    with pytest.raises(InputError, match=words):
        Finetune(auto(places, tmp_path / "run", **extra)).run()
    assert not (tmp_path / "run").exists()


def test_losses_that_are_not_finite_end_it(places, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "loss", lambda self, batch: self.scores(batch).sum() * float("nan"))
    with pytest.raises(RunError, match="not finite at eps"):
        Finetune(auto(places, tmp_path / "run")).run()
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_is_told(places, tmp_path, monkeypatch):
    def loss(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Scorer, "loss", loss)
    with pytest.raises(RunError, match="on a batch of 32 .*lower --batch-size"):
        Finetune(auto(places, tmp_path / "run")).run()


def test_batches_of_a_probe_are_drawn_apart():
    pool = [Example(str(i), i % 2) for i in range(20)]
    drawn = batches.independent(pool, 8, seed=3, balanced=False)
    found = [{e.sentence for e in next(drawn)} for _ in range(400)]
    assert all(len(batch) == 8 for batch in found)
    # One is in a batch with 0.4, and in two in a row with 0.16, ± 0.004; in the order of an epoch
    # it would be with 0.12.
    both = sum(len(one & other) for one, other in itertools.pairwise(found)) / 20 / 399
    assert 0.145 < both < 0.175
    again = batches.independent(pool, 8, seed=3, balanced=False)
    assert [{e.sentence for e in next(again)} for _ in range(3)] == found[:3]
    even = batches.independent(pool, 7, seed=3, balanced=True)
    assert {sum(e.label for e in next(even)) for _ in range(100)} == {3, 4}
    small = batches.independent(pool[:3], 8, seed=3, balanced=False)
    assert len(next(small)) == 8


def test_weights_are_those_of_the_start_after_a_probe(places, tmp_path):
    run = Finetune(auto(places, tmp_path / "run", lr=1e-3, scheme="full", steps=1))
    from zokernels.lab.runs.prepare import prepare

    prepare(run)
    tuning.probe(run, 224, None, lambda *_: None)
    before = weights(places / "opt")
    assert all(torch.equal(before[n], p) for n, p in run.learner.model.named_parameters())

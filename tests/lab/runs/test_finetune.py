"""Whole runs on tiny models: what is learned, what is written, what survives an interruption."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import environment

from zokernels.lab.errors import InputError, RunError
from zokernels.lab.models import loading
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import Scorer

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


FILES = {
    "config.json",
    "metrics.json",
    "metrics.jsonl",
    "plot.png",
    "report.md",
    "final",
    "trajectory.zk",
}


def settings(places, out, kind="bert", **extra):
    given = dict(steps=5, batch_size=8, lr=1e-3, eps=1e-3, max_length=32)
    return Settings(model=str(places / kind), data=str(places), out=out, **{**given, **extra})


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return {n: p.detach() for n, p in loading.load(str(folder)).model.named_parameters()}


@pytest.mark.parametrize("kind", ["opt", "bert", "roberta"])
def test_a_run_of_each_kind_writes_its_folder(places, tmp_path, kind):
    out = tmp_path / "run"
    metrics = Finetune(settings(places, out, kind)).run()
    assert {p.name for p in out.iterdir()} == FILES
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["task"] == "sst2"
    assert metrics["steps"] == 5
    assert 0 <= metrics["dev_accuracy_after"] <= 1
    steps = [r for r in lines(out) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert all(0 <= r["outside_forwards"] <= 1 for r in steps)
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "Dev accuracy" in (out / "report.md").read_text()
    before, after = weights(places / kind), weights(out / "final")
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_a_run_takes_a_rule_sparsity_and_blocks(places, tmp_path):
    options = dict(optimizer="zo-adam", sparsity=0.5, resample_every=2, blocks="layer", steps=3)
    finetune = Finetune(settings(places, tmp_path / "run", "opt", **options))
    finetune.run()
    before, after = weights(places / "opt"), weights(tmp_path / "run" / "final")
    moved = sum(int((after[n] != before[n]).sum()) for n in before)
    # Two masks of a half each leave a quarter of the weights where they were.
    assert 0.6 < moved / sum(w.numel() for w in before.values()) < 0.9
    # Embeddings, layers and head each have a slope of their own.
    slopes = [r["projected_gradients"] for r in lines(tmp_path / "run") if "loss" in r]
    assert len(slopes) == 3 and len(slopes[0]) > 2


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(sparsity=1.5), "between 0 and 1"),
        (dict(resample_every=2), "--sparsity"),
        (dict(blocks="rows"), "layer, module"),
        (dict(block_order="random"), "sequential, simultaneous"),
    ],
)
def test_sparsity_and_blocks_are_checked_before_anything_is_written(
    places, tmp_path, options, words
):
    with pytest.raises(InputError, match=words):
        Finetune(settings(places, tmp_path / "run", "opt", **options)).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there, device", [(True, "cuda"), (False, "cpu")])
def test_a_run_goes_to_a_gpu_where_there_is_one(places, tmp_path, monkeypatch, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert settings(places, tmp_path).device == device
    assert settings(places, tmp_path, device="cpu").device == "cpu"


def test_forward_passes_alone_learn_the_task(places, tmp_path):
    metrics = Finetune(
        settings(
            places,
            tmp_path / "run",
            steps=200,
            lr=1e-2,
            num_queries=2,
            batch_size=16,
            schedule="linear",
        )
    ).run()
    assert metrics["dev_accuracy_after"] >= metrics["dev_accuracy_before"] + 0.15
    assert metrics["mean_loss_last_tenth"] < 0.8 * metrics["mean_loss_first_tenth"]


def test_the_seed_fixes_a_run_to_the_bit(places, tmp_path):
    found = []
    for i, seed in enumerate((3, 3, 4)):
        Finetune(settings(places, tmp_path / str(i), seed=seed)).run()
        found.append([r["loss"] for r in lines(tmp_path / str(i)) if "loss" in r])
    assert found[0] == found[1] != found[2]
    first, second = weights(tmp_path / "0/final"), weights(tmp_path / "1/final")
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_only_the_named_parameters_move(places, tmp_path):
    out = tmp_path / "run"
    Finetune(settings(places, out, train_only="bias|LayerNorm", weight_decay=0.1)).run()
    before, after = weights(places / "bert"), weights(out / "final")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert all("bias" in n or "LayerNorm" in n for n in moved)


def test_lora_saves_an_adapter_that_peft_loads(places, tmp_path):
    from peft import PeftModel

    out = tmp_path / "run"
    Finetune(settings(places, out, "opt", scheme="lora", lr=1e-2)).run()
    assert (out / "final/adapter_config.json").is_file()
    assert not (out / "final/model.safetensors").exists()
    base = loading.load(str(places / "opt")).model
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits.clone()
        adapted = PeftModel.from_pretrained(base, out / "final")(input_ids=ids).logits
    assert not torch.equal(plain, adapted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_train_and_save_as_they_are(places, tmp_path, dtype):
    out = tmp_path / "run"
    Finetune(settings(places, out, dtype=dtype, rounding="stochastic", lr=1e-2)).run()
    saved = loading.load(str(out / "final"), dtype).model
    assert {p.dtype for p in saved.parameters()} == {getattr(torch, dtype)}
    config = json.loads((out / "final/config.json").read_text())
    assert config["dtype"] == dtype


@pytest.mark.parametrize(
    ("own", "loses"),
    [
        (dict(dtype="bfloat16"), True),
        (dict(dtype="bfloat16", rounding="stochastic"), False),
        (dict(dtype="bfloat16", scheme="lora"), False),
        (dict(dtype="bfloat16", optimizer="fo-sgd"), False),
        (dict(), False),
    ],
    ids=str,
)
def test_a_run_says_where_rounding_loses_updates(places, tmp_path, own, loses):
    run = Finetune(settings(places, tmp_path / "run", steps=1, **own))
    run.watcher = told = Watcher()
    said = []
    told.say = said.append
    run.run()
    assert any("--rounding stochastic" in sentence for sentence in said) == loses


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * t / 4) for t in range(4)]),
    ],
)
def test_the_schedule_is_what_the_log_says(places, tmp_path, schedule, expected):
    out = tmp_path / "run"
    Finetune(settings(places, out, schedule=schedule, steps=4, lr=0.5e-3)).run()
    rates = [r["lr"] / 0.5e-3 for r in lines(out) if "loss" in r]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [(0, 160), (2, 160), (4, 160), (6, 160)]),
        (dict(eval_examples=10), [(0, 10), (2, 10), (4, 10), (6, 10)]),
        (dict(eval_examples=10, whole_dev=True), [(0, 160), (2, 10), (4, 10), (6, 160)]),
        (dict(eval_examples=0), []),
    ],
)
def test_evaluations_see_as_much_as_they_are_told(places, tmp_path, options, expected):
    out = tmp_path / "run"
    metrics = Finetune(settings(places, out, steps=6, eval_every=2, **options)).run()
    seen = [(r["step"], r["examples"]) for r in lines(out) if r.get("split") == "dev"]
    assert seen == expected
    report = (out / "report.md").read_text()
    assert metrics["dev_examples"] == (expected[-1][1] if expected else 0)
    assert (metrics["dev_accuracy_after"] is None) == (not expected)
    assert ("reported on 10 of 160 examples" in report) == (options == dict(eval_examples=10))
    assert ("nothing was evaluated" in report) == (not expected)


def test_dev_never_picks_the_checkpoint(places, tmp_path, monkeypatch):
    """With valid best at step 2 and dev best at step 4, the weights of step 2 are kept."""
    from zokernels.lab.runs import evaluate

    run = Finetune(settings(places, tmp_path / "run", steps=6, eval_every=2, keep_best=True))
    answers = {"valid": iter([0.9, 0.1]), "dev": iter([0.1, 0.2, 0.9, 0.5])}
    kept = []

    def accuracy(scorer, examples, **_):
        split = "valid" if len(examples) == len(run.splits.valid) else "dev"
        if split == "valid":
            kept.append([p.detach().clone() for p in run.learner.model.parameters()])
        return evaluate.Mean(next(answers[split]), len(examples))

    monkeypatch.setattr(evaluate, "accuracy", accuracy)
    run.run()
    now = list(run.learner.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept[0], now, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept[1], now, strict=True))
    assert "step 2" in (tmp_path / "run/report.md").read_text()


def test_losses_that_are_not_finite_are_null_and_flagged(places, tmp_path, monkeypatch):
    whole, calls = Scorer.losses, []

    def loss(self, batch):
        calls.append(1)
        return whole(self, batch) * (float("nan") if len(calls) in (3, 4) else 1)

    monkeypatch.setattr(Scorer, "losses", loss)
    out = tmp_path / "run"
    metrics = Finetune(settings(places, out)).run()
    steps = [r for r in lines(out) if "loss" in r]
    assert [r["finite"] for r in steps] == [True, False, True, True, True]
    assert steps[1]["loss"] is None
    assert metrics["non_finite_steps"] == 1


def test_a_run_that_only_gets_nan_fails_and_keeps_its_folder(places, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "losses", lambda self, batch: self.scores(batch).sum(1) * math.nan)
    out = tmp_path / "run"
    with pytest.raises(RunError, match="run"):
        Finetune(settings(places, out, steps=50)).run()
    assert {p.name for p in out.iterdir()} == FILES
    assert json.loads((out / "metrics.json").read_text())["failure"]
    before, after = weights(places / "bert"), weights(out / "final")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_an_earlier_run_is_replaced_only_on_request(places, tmp_path):
    out = tmp_path / "run"
    Finetune(settings(places, out)).run()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        Finetune(settings(places, out)).run()
    Finetune(settings(places, out, steps=2, overwrite=True)).run()
    assert json.loads((out / "metrics.json").read_text())["steps"] == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_a_stop_between_steps_keeps_what_was_done(places, tmp_path):
    class Stopper(Watcher):
        def step(self, number, loss, seconds, outside):
            if number == 3:
                run.stopped.set()

    out = tmp_path / "run"
    run = Finetune(settings(places, out), Stopper())
    metrics = run.run()
    assert metrics["interrupted"]
    assert metrics["steps"] == 3
    assert metrics["dev_accuracy_after"] is None
    Finetune(settings(places, tmp_path / "short", steps=3)).run()
    kept, short = weights(out / "final"), weights(tmp_path / "short/final")
    assert all(torch.equal(kept[n], short[n]) for n in kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_exits_130_and_says_where_things_are(places, tmp_path, number):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "zokernels.lab.cli", "finetune", "--model", str(places / "bert")]
        + ["--data", str(places), "--out", str(out), "--steps", "1000000", "--max-length", "32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    log, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and '"loss"' in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted after" in said
    assert {p.name for p in out.iterdir()} == FILES
    assert json.loads((out / "metrics.json").read_text())["interrupted"]
    assert "interrupted" in (out / "report.md").read_text()


@pytest.mark.parametrize("kind", ["opt", "bert"])
def test_both_points_in_one_forward_make_the_same_run(kind, places, tmp_path):
    losses = {}
    for mode in ("on_entry", "paired"):
        out = tmp_path / mode
        Finetune(settings(places, out, kind, perturb=mode)).run()
        losses[mode] = [r["loss"] for r in lines(out) if "loss" in r]
    # Sums of a doubled batch are taken in another order.
    assert losses["paired"] == pytest.approx(losses["on_entry"], abs=1e-4)

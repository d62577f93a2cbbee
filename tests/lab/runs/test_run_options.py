"""Settings of a run that are about its length, its rate, its evaluations and its adapter."""

import json
import re

import pytest
import torch

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading, schemes
from zokernels.lab.runs import evaluate
from zokernels.lab.runs.history import Mean, Watcher
from zokernels.lab.runs.resume import settings_of
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


def settings(places, out, kind="opt", **extra):
    given = dict(steps=5, batch_size=8, lr=1e-3, eps=1e-3, max_length=32)
    return Settings(model=str(places / kind), data=str(places), out=out, **{**given, **extra})


def weights(folder):
    return {n: p.detach() for n, p in loading.load(str(folder)).model.named_parameters()}


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_the_rate_rises_before_its_schedule_begins(places, tmp_path, schedule, expected):
    out = tmp_path / "run"
    Finetune(settings(places, out, steps=7, warmup=3, schedule=schedule)).run()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["lr"] / 1e-3 for r in records if "loss" in r] == pytest.approx(expected)
    assert "after 3 steps of rising" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    "values, steps, kept",
    [
        ([0.5, 0.9, 0.8, 0.7, 1.0], 4, 2),
        ([0.5, 0.6, 0.6, 0.6, 1.0], 4, 2),
        ([0.5, 0.4, 0.6, 0.5, 0.7], 6, 5),
    ],
)
def test_a_run_ends_when_its_evaluations_get_no_better(
    places, tmp_path, monkeypatch, values, steps, kept
):
    run = Finetune(
        settings(places, tmp_path / "run", steps=6, eval_every=1, keep_best=True, patience=2)
    )
    found = iter(values)

    def accuracy(scorer, examples, **_):
        valid = len(examples) == len(run.splits.valid)
        return Mean(next(found) if valid else 0.5, len(examples))

    monkeypatch.setattr(evaluate, "accuracy", accuracy)
    metrics = run.run()
    assert (metrics["steps"], metrics["weights_of_step"]) == (steps, kept)
    assert metrics["stopped_early"] == (steps < 6) and not metrics["interrupted"]
    said = (tmp_path / "run/report.md").read_text()
    assert ("ended by --patience 2" in said) == (steps < 6)
    # It is finished, so that nothing is left to go on with.
    with pytest.raises(InputError, match="that run is finished"):
        settings_of(tmp_path / "run")


def test_no_steps_evaluate_only(places, tmp_path, capsys):
    options = ["--steps", "0", "--data", str(places), "--out", str(tmp_path / "run")]
    assert main(["finetune", "--model", str(places / "opt"), *options]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["dev_accuracy_before"] == metrics["dev_accuracy_after"] is not None
    assert metrics["steps"] == metrics["forwards"] == 0
    shown = capsys.readouterr().out
    assert shown.count("Step 0: dev accuracy") == 1


@pytest.mark.parametrize("short, long", [("bf16", "bfloat16"), ("fp16", "float16")])
def test_types_have_short_names(places, tmp_path, short, long):
    made = settings(places, tmp_path / "run", dtype=short, rounding="stochastic")
    assert made.dtype == long
    Finetune(made).run()
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == long


@pytest.mark.parametrize(
    "targets, layers",
    [
        (None, "q_proj|v_proj"),
        ("fc1, fc2", "fc1|fc2"),
        ("all-linear", "q_proj|k_proj|v_proj|out_proj|fc1|fc2"),
        (r".*layers\.1\.fc\d", r"layers\.1\.fc[12]"),
    ],
)
def test_lora_sits_where_it_is_told(places, tmp_path, targets, layers):
    model = loading.load(str(places / "opt")).model
    inside = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    wanted = {n for n in inside if re.search(f"({layers})$", n)}
    run = Finetune(
        settings(
            places, tmp_path / "run", scheme="lora", lora_rank=3, lora_alpha=6.0,
            lora_targets=targets,
        )
    )  # fmt: skip
    run.run()
    made = run.learner.parameters()
    placed = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in made}
    assert placed == wanted
    assert all(3 in p.shape for p in made.values())
    config = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)


def test_a_target_that_is_not_there_is_a_sentence(places, tmp_path):
    with pytest.raises(InputError, match="peft cannot place LoRA in this model at --lora-targets"):
        Finetune(settings(places, tmp_path / "run", scheme="lora", lora_targets="gone")).run()
    with pytest.raises(InputError, match="peft cannot place LoRA in this model at --lora-targets"):
        Finetune(settings(places, tmp_path / "run", scheme="lora", lora_targets="(")).run()
    assert not (tmp_path / "run").exists()


DROPPING = dict(scheme="lora", optimizer="fo-adam", lora_dropout=0.5, lr=1e-2)


def test_an_adapters_dropout_acts_in_training_alone(places, tmp_path):
    one = Finetune(settings(places, tmp_path / "one", **DROPPING)).run()
    other = Finetune(settings(places, tmp_path / "two", **{**DROPPING, "lora_dropout": 0.0})).run()
    # Before the first step there is no adapter yet to drop anything.
    assert one["dev_accuracy_before"] == other["dev_accuracy_before"]
    first, second = (tmp_path / name / "final" for name in ("one", "two"))
    from safetensors.torch import load_file

    a, b = (load_file(f / "adapter_model.safetensors") for f in (first, second))
    assert any(not torch.equal(a[n], b[n]) for n in a)
    finetune = Finetune(settings(places, tmp_path / "three", **DROPPING))
    again = finetune.run()
    assert again["dev_accuracy_after"] == one["dev_accuracy_after"]
    batch = finetune.scorer.collate(finetune.pool[:4])
    with torch.no_grad():
        assert torch.equal(finetune.scorer.losses(batch), finetune.scorer.losses(batch))


def test_what_was_dropped_is_dropped_again_on_a_resume(places, tmp_path):
    common = dict(DROPPING, steps=6, eval_every=3)
    Finetune(settings(places, tmp_path / "whole", **common)).run()
    run, watcher = None, Watcher()
    watcher.step = lambda number, *_: run.stopped.set() if number == 4 else None
    run = Finetune(settings(places, tmp_path / "cut", **common), watcher)
    assert run.run()["interrupted"]
    Finetune(settings_of(tmp_path / "cut"), resume=True).run()
    name = "final/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


BAD = [
    (dict(lora_rank=4), "--lora-rank is for --scheme lora; got --scheme full"),
    (dict(scheme="lora", lora_rank=0), "--lora-rank must be at least 1"),
    (dict(scheme="lora", lora_dropout=0.1), "dropout is off in them; got --optimizer zosgd"),
    (dict(scheme="lora", lora_dropout=1.0), "--lora-dropout must lie between 0 and 1"),
    (dict(patience=2), "--patience needs --keep-best"),
    (dict(warmup=5), "--warmup 5 leaves none of the 5 --steps at the full rate"),
    (dict(keep_best=True, eval_every=1, eval_examples=0), "--eval-examples that are not 0"),
    (dict(task="squad", objective="candidates"), "squad are written; take --objective tokens"),
    (dict(data="own.jsonl", objective="accuracy"), "completion are written; take --objective tok"),
    (dict(eval_examples=-1), "--eval-examples must be at least 0"),
]


@pytest.mark.parametrize("options, words", BAD, ids=[w[:24] for _, w in BAD])
def test_what_does_not_go_together_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        Finetune(Settings(model="m", out=tmp_path / "run", **{"steps": 5, **options})).run()


def test_the_schemes_are_those_of_before():
    assert schemes.SCHEMES == ("full", "lora", "bitfit", "prefix", "prompt", "head", "probe")

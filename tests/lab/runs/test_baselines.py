"""First-order baselines and the hybrid, by the same command as the zeroth-order optimizers."""

import json

import pytest
import torch
from tiny import build

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError, RunError
from zokernels.lab.models import loading
from zokernels.lab.runs import checkpoint
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.resume import settings_of
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import SCORERS, Scorer
from zokernels.lab.tasks import get_task
from zokernels.lab.tasks.batches import batches
from zokernels.lab.tasks.data import load

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("baselines")
    build("opt", root / "opt")
    rows = [
        f"{lead} {word} {tail} \t{int(tail in ('good', 'fine'))}\n"
        for lead in ("the", "a very", "this")
        for word in ("film", "movie", "plot", "heart", "one")
        for tail in ("good", "fine", "bad", "dull")
    ]
    for split in ("train", "dev"):
        (root / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return root


def settings(places, out, **extra):
    given = dict(steps=6, batch_size=8, lr=1e-2, eps=1e-3, max_length=32, optimizer="fo-sgd")
    given |= dict(model=str(places / "opt"), data=str(places), out=out)
    return Settings(**{**given, **extra})


HYBRID = dict(optimizer="hybrid", hybrid_split=1, fo_lr=1e-3, lr=1e-3)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return {n: p.detach() for n, p in loading.load(str(folder)).model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "reference"), [("fo-sgd", torch.optim.SGD), ("fo-adam", torch.optim.AdamW)]
)
def test_a_baseline_is_torchs_optimizer_on_the_same_batches(places, tmp_path, name, reference):
    options = dict(optimizer=name, weight_decay=0.1, schedule="linear", seed=5)
    Finetune(settings(places, tmp_path / "run", **options)).run()
    task = get_task("sst2")
    loaded = loading.load(str(places / "opt"))
    scorer = SCORERS["causal"](loaded.model, loaded.tokenizer, task, 32)
    order = batches(load(task, places).train, 8, seed=5, balanced=False)
    opt = reference(loaded.model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(6):
        for group in opt.param_groups:
            group["lr"] = 1e-2 * (1 - step / 6)
        scorer.loss(scorer.collate(next(order))).backward()
        opt.step()
        opt.zero_grad()
    saved = weights(tmp_path / "run/final")
    assert all(torch.equal(p, saved[n]) for n, p in loaded.model.named_parameters())


@pytest.mark.parametrize(
    ("options", "forwards", "backwards"),
    [
        (dict(), 6, 6),
        (dict(optimizer="zo-sgd", num_queries=2), 24, 0),
        (dict(optimizer="zo-sgd", estimator="one_sided"), 12, 0),
        (dict(optimizer="zo-sgd-cons"), 30, 0),
        # One more, which looks for what the model writes.
        (dict(optimizer="forward-grad"), 7, 0),
        (HYBRID, 18, 6),
    ],
    ids=["fo", "two queries", "one-sided", "conservative", "forward gradient", "hybrid"],
)
def test_passes_are_counted(places, tmp_path, options, forwards, backwards):
    metrics = Finetune(settings(places, tmp_path / "run", **options)).run()
    assert (metrics["forwards"], metrics["backwards"]) == (forwards, backwards)
    assert (
        f"{forwards} forwards and {backwards} backwards" in (tmp_path / "run/report.md").read_text()
    )


@pytest.mark.parametrize("scheme", ["full", "lora", "prefix", "prompt", "bitfit", "head", "probe"])
def test_a_baseline_learns_every_scheme(places, tmp_path, scheme):
    options = dict(optimizer="fo-adam", scheme=scheme, steps=40, batch_size=16, lr=3e-2)
    metrics = Finetune(settings(places, tmp_path / "run", **options)).run()
    assert metrics["mean_loss_last_tenth"] < 0.9 * metrics["mean_loss_first_tenth"]
    assert metrics["dev_majority"] == 0.5


def test_the_hybrid_moves_both_parts_and_no_log_claims_to_replay_it(places, tmp_path, capsys):
    out = tmp_path / "run"
    Finetune(settings(places, out, **HYBRID)).run()
    before, after = weights(places / "opt"), weights(out / "final")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert any("layers.0." in n for n in moved) and any("layers.1." in n for n in moved)
    assert not (out / "trajectory.zk").exists() and not (out / "checkpoint.pt").exists()
    code = main(["replay", str(places / "opt"), str(out), "--out", str(tmp_path / "again")])
    assert code == 2
    assert "no log of scalars" in capsys.readouterr().err


class Stopper(Watcher):
    def __init__(self, after):
        self.after, self.run = after, None

    def step(self, number, loss, seconds, outside):
        if number == self.after:
            self.run.stopped.set()


RESUMED = {
    "fo-adam": dict(optimizer="fo-adam", schedule="cosine", weight_decay=0.1),
    "hybrid": dict(HYBRID, schedule="linear"),
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_resumed_run_ends_with_the_bits_of_a_whole_one(places, tmp_path, options, how):
    common = dict(options, steps=9, eval_every=3, eval_examples=20, keep_best=True)
    whole = Finetune(settings(places, tmp_path / "whole", **common)).run()
    out, stopper = tmp_path / "cut", Stopper(5)
    stopper.run = Finetune(settings(places, out, **common), stopper)
    if how == "interrupted":
        stopper.run.run()
    else:

        def die(*_):
            raise KeyboardInterrupt

        stopper.step = lambda number, *_: die() if number == 5 else None
        with pytest.raises(KeyboardInterrupt):
            stopper.run.run()
    said = []
    watcher = Watcher()
    watcher.say = said.append
    resumed = Finetune(settings_of(out), watcher, resume=True).run()
    assert f"Resumed after step {5 if how == 'interrupted' else 3}." in said
    first, second = weights(tmp_path / "whole/final"), weights(out / "final")
    assert all(torch.equal(first[n], second[n]) for n in first)
    losses = [[r["loss"] for r in lines(p) if "loss" in r] for p in (tmp_path / "whole", out)]
    assert losses[0] == losses[1]
    for key in ("forwards", "backwards", "weights_of_step", "dev_accuracy_after"):
        assert whole[key] == resumed[key]


def test_a_damaged_checkpoint_is_a_sentence(places, tmp_path):
    out, stopper = tmp_path / "cut", Stopper(3)
    stopper.run = Finetune(settings(places, out), stopper)
    stopper.run.run()
    (out / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="checkpoint.pt cannot be read"):
        Finetune(settings_of(out), resume=True).run()


def test_a_full_disk_keeps_the_last_checkpoint(places, tmp_path, monkeypatch):
    real, count = torch.save, []

    def save(held, path):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        real(held, path)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    out = tmp_path / "run"
    with pytest.raises(RunError, match="--resume"):
        Finetune(settings(places, out, steps=9, eval_every=3, eval_examples=20)).run()
    monkeypatch.undo()
    assert [p.name for p in out.glob("*checkpoint*")] == ["checkpoint.pt"]
    assert Finetune(settings_of(out), resume=True).run()["steps"] == 9


def test_nothing_that_is_not_finite_reaches_a_weight(places, tmp_path, monkeypatch):
    whole = Scorer.losses
    monkeypatch.setattr(Scorer, "losses", lambda self, batch: whole(self, batch) * float("inf"))
    with pytest.raises(RunError, match="not finite in 10 steps"):
        Finetune(settings(places, tmp_path / "run", steps=50)).run()
    before, after = weights(places / "opt"), weights(tmp_path / "run/final")
    assert all(torch.equal(before[n], after[n]) for n in before)


BAD = [
    (dict(objective="accuracy"), "has no gradient"),
    (dict(num_queries=2), "--num-queries is for zeroth-order optimizers"),
    (dict(sparsity=0.2), "--sparsity is for zeroth-order optimizers"),
    (dict(estimator="one_sided"), "--estimator is for zeroth-order optimizers"),
    (dict(optimizer="hybrid"), "needs --hybrid-split"),
    (dict(optimizer="hybrid", hybrid_split=1), "needs --fo-lr"),
    (dict(HYBRID, hybrid_split=7), "number of layers from 0 to 2"),
    (dict(HYBRID, fo_optimizer="zo-sgd"), "--fo-optimizer must be one of"),
    (dict(HYBRID, fo_lr=-1.0), "--fo-lr must be a number from 0 up"),
    (dict(optimizer="zo-sgd", fo_lr=0.1), "--fo-lr is for --optimizer hybrid"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[b[1] for b in BAD])
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    places, tmp_path, options, words
):
    with pytest.raises(InputError, match=words):
        Finetune(settings(places, tmp_path / "run", **options)).run()
    assert not (tmp_path / "run").exists()

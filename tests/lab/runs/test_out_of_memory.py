"""Memory that does not suffice for a batch: the step is made in halves, or the run says so."""

import json

import pytest
import torch
from conftest import same_bits
from test_finetune import lines, settings, weights

import zokernels as zk
from zokernels.lab.errors import RunError
from zokernels.lab.runs import learner, out_of_memory
from zokernels.lab.runs.run import Finetune
from zokernels.lab.scoring import Scorer

pytestmark = pytest.mark.hf

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to "
        "allocate 8589934592 bytes."
    ),
    "c++": lambda: RuntimeError("std::bad_alloc"),
    "python": MemoryError,
}


def test_torchs_own_refusal_is_known():
    """What this version of torch says when the machine has no such memory."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory.is_out(raised.value)
    for other in (RuntimeError("shapes do not match"), ValueError("not enough memory"), KeyError()):
        assert not out_of_memory.is_out(other)


@pytest.fixture
def small(monkeypatch):
    """Makes scoring fail above a number of examples, and says how large the batches were."""

    def fit(most, error="cuda", after=0):
        seen, real = [], Scorer.losses

        def loss(self, batch):
            found = real(self, batch)
            seen.append(len(batch["labels"]))
            if seen[-1] > most and len(seen) > after:
                raise ERRORS[error]()
            return found

        monkeypatch.setattr(Scorer, "losses", loss)
        return seen

    return fit


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_that_does_not_fit_is_one_step_of_two_halves(places, tmp_path, small, error):
    """The same directions as the whole batch's, and its mean but for the order of a sum."""
    whole = Finetune(settings(places, tmp_path / "whole", "opt", batch_size=7))
    whole.run()
    seen = small(5, error)
    out = tmp_path / "halves"
    metrics = Finetune(settings(places, out, "opt", batch_size=7, retry_oom=True)).run()
    # Each step: one attempt, then both sides on the same halves.
    assert seen == [7, 4, 3, 4, 3] * 5
    assert (metrics["steps"], metrics["halved_steps"], metrics["failure"]) == (5, 5, None)
    one, two = (zk.Trajectory(tmp_path / name / "trajectory.zk") for name in ("whole", "halves"))
    for a, b in zip(one.steps, two.steps, strict=True):
        # lr·d/q, with d a difference of two losses near 1: float32 leaves some 1e-7 of each loss.
        assert a.passes[0].coeffs[0] == pytest.approx(b.passes[0].coeffs[0], abs=1e-3 * 1e-3)
        assert a.passes[0].coeffs != (0.0,)
    for a, b in zip(lines(tmp_path / "whole"), lines(out), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert (a["halved"], b["halved"]) == (False, True)


def test_memory_that_runs_out_on_the_second_side_repeats_the_first(places, tmp_path, small):
    """Both sides of a difference see the same halves."""
    seen = small(5, after=1)
    metrics = Finetune(settings(places, tmp_path / "run", batch_size=6, retry_oom=True)).run()
    assert seen[:7] == [6, 6, 3, 3, 3, 3, 6]
    assert metrics["halved_steps"] == 5


def test_without_the_option_the_run_ends_with_a_sentence_and_whole_weights(places, tmp_path, small):
    small(5, after=4)
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"Step 3 ran out of memory with a batch of 8 .*--retry-oom"):
        Finetune(settings(places, out)).run()
    assert json.loads((out / "metrics.json").read_text())["steps"] == 2
    assert zk.Trajectory(out / "trajectory.zk").end == 2
    twin = learner.load(settings(places, tmp_path / "twin"))
    zk.replay(twin.model, out / "trajectory.zk")
    saved = weights(out / "final")
    assert all(same_bits(p, saved[name]) for name, p in twin.model.named_parameters())


def test_halves_that_do_not_fit_either_end_the_run(places, tmp_path, small):
    small(2)
    with pytest.raises(RunError, match="with a batch of 8, and with halves of it, too"):
        Finetune(settings(places, tmp_path / "run", retry_oom=True)).run()
    before, after = weights(places / "bert"), weights(tmp_path / "run/final")
    assert all(same_bits(before[name], after[name]) for name in before)


def test_a_block_wise_step_that_has_updated_a_block_is_not_taken_again(places, tmp_path, small):
    # Two forwards look whether layers can be returned; the two blocks before take two each.
    seen = small(5, after=6)
    options = dict(blocks="layer", retry_oom=True)
    with pytest.raises(RunError, match="ran out of memory"):
        Finetune(settings(places, tmp_path / "run", "opt", **options)).run()
    assert seen == [8] * 7


def test_an_evaluation_halves_until_it_fits(places, tmp_path, monkeypatch):
    real, sizes = Scorer.predict, []

    def predict(self, examples, calibrate=False):
        sizes.append(len(examples))
        if len(examples) > 9:
            raise ERRORS["cuda"]()
        return real(self, examples, calibrate)

    whole = Finetune(settings(places, tmp_path / "whole", steps=1)).run()
    monkeypatch.setattr(Scorer, "predict", predict)
    with pytest.raises(RunError, match="Memory ran out in an evaluation.*--retry-oom"):
        Finetune(settings(places, tmp_path / "ended", steps=1)).run()
    found = Finetune(settings(places, tmp_path / "run", steps=1, retry_oom=True)).run()
    assert sizes[1:6] == [64, 32, 16, 8, 8]
    for name in ("dev_accuracy_before", "dev_accuracy_after"):
        assert found[name] == whole[name]

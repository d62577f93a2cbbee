"""A run that made its model worse says so; noise does not."""

import json
import math
import random
from itertools import product

import pytest

from zokernels.lab.cli import main
from zokernels.lab.runs import divergence
from zokernels.lab.runs.history import Mean
from zokernels.lab.tasks.metric import ACCURACY

pytestmark = pytest.mark.usefixtures("one_thread")

# Of one step, by a mean: of a batch, of one example, with a heavy tail, among few values.
NOISE = {
    "normal": lambda r, mean: r.gauss(mean, 0.2 * mean),
    "exponential": lambda r, mean: r.expovariate(1 / mean),
    "lognormal": lambda r, mean: mean * math.exp(r.gauss(0, 2)),
    "coarse": lambda r, mean: round(r.random() * 4 * mean) / 4,
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("steps", [20, 60, 1500])
def test_flat_noise_is_no_rise(noise, steps):
    r = random.Random(steps)
    runs = 2000 if steps < 100 else 300
    alarms = sum(
        divergence.rise([NOISE[noise](r, 2.4) for _ in range(steps)]) is not None
        for _ in range(runs)
    )
    # Two of 1,000 are expected; these are more than four standard deviations above.
    assert alarms <= 2 * runs / 1000 + 4 * (2 * runs / 1000) ** 0.5 + 1


RISES = {
    "steadily": lambda t: 2.4 + 14 * t,
    "after it learned": lambda t: max(0.4, 2.4 - 20 * t) if t < 0.5 else 16,
    "without a bound": lambda t: 2.4 * 10 ** (6 * t),
    "at once": lambda t: 2.4 if t < 0.02 else 16,
}


@pytest.mark.parametrize(
    ("noise", "how"),
    # Where a loss of one example rises at once, ten of them before do not tell.
    [pair for pair in product(("normal", "exponential"), RISES) if pair[1:] != ("at once",)]
    + [("normal", "at once")],
)
def test_a_loss_that_goes_from_2_to_16_is_a_rise(noise, how):
    r = random.Random(1)
    for _ in range(20):
        losses = [NOISE[noise](r, RISES[how](i / 600)) for i in range(600)]
        losses[300] = math.nan
        before, after = divergence.rise(losses)
        assert before < 5 < 7 < after


def test_a_run_that_learns_or_hardly_changes_or_is_short_is_no_rise():
    r = random.Random(2)
    assert divergence.rise([r.gauss(2.4 - i / 500, 0.2) for i in range(1000)]) is None
    # Up by two in a hundred, and no two steps in doubt.
    assert divergence.rise([0.69 + i * 2e-5 for i in range(1000)]) is None
    assert divergence.rise([2.4, 16.0] * 9 + [99.0]) is None
    assert divergence.rise([math.nan] * 100) is None


def test_a_metric_falls_by_two_standard_errors():
    for before, after, examples, fallen in (
        (0.75, 0.55, 100, True),
        (0.75, 0.65, 100, False),
        (0.75, 0.70, 2000, True),
        (0.50, 0.45, 160, False),
        (0.55, 0.75, 100, False),
        (1.0, 1.0, 10, False),
    ):
        assert divergence.worse(Mean(before, examples), Mean(after, examples), ACCURACY) is fallen
    assert not divergence.worse(Mean(0.7, 100), None, ACCURACY)


@pytest.mark.hf
def test_a_run_says_on_the_screen_and_in_its_files_that_it_diverged(places, tmp_path, capsys):
    def finetune(lr):
        out = tmp_path / str(lr)
        argv = ["finetune", "--model", str(places / "roberta"), "--data", str(places)]
        argv += ["--out", str(out), "--steps", "60", "--batch-size", "8", "--max-length", "32"]
        assert main([*argv, "--lr", str(lr), "--no-save-weights"]) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        return metrics["diverged"], capsys.readouterr().out, (out / "report.md").read_text()

    sentence, said, report = finetune(0.03)
    assert sentence.startswith("The run diverged: the loss rose from ")
    assert "--lr 0.003;" in sentence
    assert said.strip().endswith(sentence) and said.count(sentence) == 1
    assert f"**{sentence}**" in report
    for lr in (0.0, 1e-4):
        sentence, said, report = finetune(lr)
        assert sentence is None and "diverged" not in said + report

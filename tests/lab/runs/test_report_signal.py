"""What a report says of a run's signal, on runs whose numbers are known."""

import json
import random
from pathlib import Path

import pytest

from zokernels.lab.cli import main
from zokernels.lab.runs import signal
from zokernels.lab.runs.history import History
from zokernels.lab.runs.settings import Settings


def history(gradient=1.0, noise=1.0, spread=1.0, fall=0.0, lr=1e-3, steps=1000, seed=0):
    """A log whose loss falls by so much, and whose steps measure so much of a gradient."""
    chance, found = random.Random(seed), History()
    for step in range(steps):
        found.add(
            dict(
                step=step + 1,
                loss=1 - fall * step / steps + chance.gauss(0, 0.01),
                lr=lr,
                parts=dict.fromkeys(("forwards", "backward", "noise", "update"), 0.0),
                seconds=0.0,
                signal=dict(gradient=chance.gauss(gradient, spread), noise=noise, examples=16),
            )  # fmt: skip
        )
    return found


def told(more=None, **how):
    return " ".join(
        signal.sentences(history(**how), Settings(model="m", out=Path("out"), **(more or {})))
    )


def test_it_says_what_a_slope_is_made_of():
    text = told(gradient=2.0, noise=6.0)
    assert "6 comes from which 16 examples" in text and "1,000 steps" in text
    assert "75% of it is by chance of the examples, so a larger batch helps" in text
    assert "Only 25% of it" in told(gradient=6.0, noise=2.0)


def test_a_gradient_inside_its_error_is_none():
    text = told(gradient=0.01, spread=1.0)
    assert "no gradient that stands out" in text and "--lr" not in text


@pytest.mark.parametrize(
    ("fall", "words"),
    [
        (0.05, "a smaller `--lr` would help"),
        (0.45, "as near the best rate"),
        (0.95, "a larger `--lr` may help"),
    ],
)
def test_the_share_of_the_fall_tells_of_the_rate(fall, words):
    # 1,000 steps of 1e-3 along ‖g‖² = 1: a fall by 1 without curvature.
    assert words in told(gradient=1.0, fall=fall)


def test_a_fall_inside_its_error_tells_nothing():
    assert "a larger `--lr`, or more steps, would tell" in told(gradient=1.0, lr=1e-6)


def test_of_weights_that_lose_updates_nothing_is_said_of_the_rate():
    short = dict(dtype="bfloat16", rounding="nearest")
    text = told(short, gradient=1.0, fall=0.3)
    assert "`--rounding stochastic`" in text and "`--lr`" not in text
    for more in (dict(rounding="stochastic"), dict(scheme="lora")):
        assert "best rate" in told(short | more, gradient=1.0, fall=0.45)


def test_a_gradient_below_zero_is_what_is_left_of_a_square():
    text = told(dict(estimator="population", num_queries=8), gradient=-14.2, noise=123, spread=300)
    assert ": 123 comes" in text and "what is left, -" in text
    assert "`--num-queries`" in text and "--estimator population" not in text


@pytest.mark.parametrize(
    "more",
    [dict(normalize="std", num_queries=2), dict(optimizer="zo-adam"), dict(clip=1.0)],
    ids=str,
)
def test_of_another_rule_nothing_is_said_of_the_rate(more):
    assert "‖g‖² stands for" not in told(more)


def test_of_few_steps_nothing_is_said():
    assert told(steps=10) == ""


@pytest.mark.hf
def test_a_run_logs_it_and_its_report_says_it(places, tmp_path):
    out = tmp_path / "run"
    command = ["finetune", "--model", str(places / "opt"), "--data", str(places), "--steps", "30"]
    command += ["--batch-size", "8", "--num-queries", "4", "--estimator", "population"]
    command += ["--normalize", "std", "--eps-schedule", "linear", "--eps-end", "1e-4"]
    assert main([*command, "--lr", "1e-4", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    signals = [line["signal"] for line in lines if "signal" in line]
    assert len(signals) == 30 and all(s["noise"] > 0 and s["examples"] == 8 for s in signals)
    report = (out / "report.md").read_text()
    assert "comes from which 8 examples are in a batch" in report
    assert "ε 0.001 falling to 0.0001 (linear)" in report
    assert "each compared with the mean of all, slopes over their deviation" in report
    assert [line["forwards"] for line in lines if "signal" in line][-1] == 30 * 4

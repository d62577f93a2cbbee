"""What is measured and not finite is null in every file, and words for whoever reads."""

import json
import math

import pytest
from tiny import build

from zokernels.lab import files
from zokernels.lab.cli import main
from zokernels.lab.runs.history import Mean
from zokernels.lab.tasks.metric import ACCURACY, LOSS

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


def strict(text):
    """JSON as every other program reads it."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """A model of which every score is NaN."""
    from safetensors.torch import load_file, save_file

    path = build("opt", tmp_path_factory.mktemp("lost") / "opt")
    weights = load_file(path / "model.safetensors")
    save_file({k: v * math.nan for k, v in weights.items()}, path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return path


def words(model, places, *more):
    return ["--model", model, "--data", places, "--max-length", 32, "--metric", "loss", *more]


def run(*argv):
    return main([str(a) for a in argv])


def test_a_run_that_loses_its_model_ends_with_a_report_and_resumes(places, tmp_path, capsys):
    out = tmp_path / "run"
    given = words(places / "opt", places, "--dtype", "float16", "--lr", 1e3, "--steps", 8)
    keep = ["--keep-best", "--eval-every", 2, "--eval-examples", 16, "--json", tmp_path / "m.json"]
    assert run("finetune", *given, *keep, "--out", out) == 0
    said = capsys.readouterr().out
    assert "-> not finite" in said and "dev loss is not finite any more" in said
    assert "Kept the weights" not in said
    metrics = strict((tmp_path / "m.json").read_text())
    assert metrics == strict((out / "metrics.json").read_text())
    assert metrics["dev_accuracy_after"] is metrics["dev_standard_error_after"] is None
    assert metrics["dev_accuracy_before"] > 0 and "diverged" in metrics["diverged"]
    assert "**not finite** after" in (out / "report.md").read_text()
    assert (out / "final" / "model.safetensors").exists()
    log = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (out / "metrics.json").unlink()
    assert run("finetune", "--resume", out) == 0
    again = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taken = [[{k: r[k] for k in ("step", "loss", "value") if k in r} for r in of]
             for of in (log, again)]  # fmt: skip
    assert taken[0] == taken[1]
    assert strict((out / "metrics.json").read_text())["weights_of_step"] == 8


def test_a_model_without_a_number_is_evaluated_and_predicts(lost, places, tmp_path, capsys):
    assert run("finetune", *words(lost, places, "--steps", 0, "--out", tmp_path / "run")) == 0
    assert "dev loss not finite -> not finite" in capsys.readouterr().out
    given = [lost, "--task", "sst2"]
    assert run("evaluate", *given, "--data", places, "--metric", "loss", "--eval-examples", 8,
               "--json", tmp_path / "e.json") == 0  # fmt: skip
    assert "loss not finite (8 examples" in capsys.readouterr().out
    assert strict((tmp_path / "e.json").read_text())["value"] is None
    (tmp_path / "rows.jsonl").write_text('{"sentence": "a film"}\n')
    assert run("predict", *given[:1], tmp_path / "rows.jsonl", *given[1:]) == 0
    assert strict(capsys.readouterr().out)["probability"] is None


def test_a_sweep_goes_on_and_has_no_number_in_its_table(lost, places, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "grid.yaml").write_text(
        f"base: {{model: {lost}, data: {places}, metric: loss, steps: 0, eval_examples: 4}}\n"
        "seeds: [0, 1]\n"
    )
    out = tmp_path / "out"
    assert run("sweep", tmp_path / "grid.yaml", "--out", out) == 0
    assert "| – | – | 2 |" in (out / "table.md").read_text()


def test_a_number_is_better_than_none():
    for metric, best in ((ACCURACY, 2), (LOSS, 1)):
        assert metric.best([math.nan, 0.2, 0.5, math.inf]) == best
        assert not metric.better(math.nan, 0.2) and not metric.better(math.inf, math.nan)
    assert math.isnan(Mean(math.inf, 3, math.inf).error)
    assert strict(files.json_of({"a": [math.nan, (-math.inf, 1.5)]})) == {"a": [None, [None, 1.5]]}

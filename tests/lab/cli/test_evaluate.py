"""``zokernels evaluate`` and ``predict``: what a run saved is what it reported."""

import json

import pytest

from zokernels.lab.cli import main
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]

# Most report a loss, which tells weights apart by their bits; the accuracy of a few steps may stay.
RUNS = {
    "full": ("opt", dict(lr=3e-3)),
    "replayed": ("opt", dict(lr=3e-3, save_weights=False, metric="loss")),
    "lora": ("opt", dict(scheme="lora", lr=3e-2, lora_rank=2, metric="loss")),
    "prefix": ("llama", dict(scheme="prefix", lr=3e-2, metric="loss")),
    "prompt": ("opt", dict(scheme="prompt", lr=3e-2, metric="loss")),
    "head": ("opt", dict(scheme="head", lr=3e-2, metric="loss")),
    "probe": ("bert", dict(scheme="probe", lr=1.0, metric="loss")),
    "masked": ("roberta", dict(lr=1e-2, calibrate=True)),
}


@pytest.fixture(scope="module")
def runs(places, tmp_path_factory):
    """A finished run of each kind, and its metrics."""
    from tiny import build

    root = tmp_path_factory.mktemp("runs")
    build("llama", places / "llama")
    given = dict(steps=12, batch_size=8, eps=1e-2, max_length=32, num_queries=2)
    found = {}
    for name, (kind, extra) in RUNS.items():
        made = Settings(
            model=str(places / kind), data=str(places), out=root / name, **{**given, **extra}
        )
        found[name] = (root / name, Finetune(made).run())
    return found


def evaluated(tmp_path, *words):
    path = tmp_path / "found.json"
    assert main(["evaluate", *map(str, words), "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_saved_run_has_the_number_that_it_reported(runs, tmp_path, name, capsys):
    out, metrics = runs[name]
    found = evaluated(tmp_path, out)
    assert found["value"] == metrics["dev_accuracy_after"]
    assert found["standard_error"] == metrics["dev_standard_error_after"]
    assert (found["examples"], found["task"]) == (160, "sst2")
    shown = capsys.readouterr().out
    if found["metric"] == "loss":
        assert metrics["dev_accuracy_after"] != metrics["dev_accuracy_before"]
        assert f"loss {found['value']:.4g} ± " in shown
    else:
        assert f"accuracy {found['value']:.1%} ± " in shown


def test_a_run_that_measured_all_of_dev_at_its_ends_is_measured_so(places, tmp_path):
    given = dict(steps=2, max_length=32, whole_dev=True, eval_examples=10, metric="loss")
    made = Settings(model=str(places / "opt"), data=str(places), out=tmp_path / "run", **given)
    metrics = Finetune(made).run()
    found = evaluated(tmp_path, tmp_path / "run")
    assert (found["value"], found["examples"]) == (metrics["dev_accuracy_after"], 160)
    assert evaluated(tmp_path, tmp_path / "run", "--eval-examples", 10)["examples"] == 10


def test_an_adapter_and_a_model_are_measured_too(runs, places, tmp_path):
    out, metrics = runs["lora"]
    options = ("--data", places, "--max-length", 32, "--metric", "loss")
    assert evaluated(tmp_path, out / "final", *options)["value"] == metrics["dev_accuracy_after"]
    found = evaluated(tmp_path, places / "opt", *options)
    assert found["value"] == metrics["dev_accuracy_before"]


def test_other_rows_and_another_metric_are_measured(runs, tmp_path):
    rows = ["the film good\t1", "the film bad\t0", "the plot dull\t0"]
    (tmp_path / "own.tsv").write_text("sentence\tlabel\n" + "\n".join(rows))
    found = evaluated(tmp_path, runs["full"][0], "--data", tmp_path / "own.tsv")
    assert (found["examples"], found["data"]) == (3, str(tmp_path / "own.tsv"))
    assert found["value"] in (0, 1 / 3, 2 / 3, 1)
    found = evaluated(tmp_path, runs["full"][0], "--metric", "loss", "--eval-examples", 20)
    assert (found["metric"], found["examples"]) == ("loss", 20)


def test_rows_without_labels_are_answered_in_their_order(runs, tmp_path, capsys):
    words = ["predict", str(runs["full"][0]), str(tmp_path / "own.jsonl")]
    (tmp_path / "own.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "sentence": "the film " * i + w})
                  for i, w in ((3, "good"), (1, "dull"), (2, "bad")))
    )  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "said.jsonl"), "--batch-size", "2"]) == 0
    found = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["id"] for line in found] == [3, 1, 2]
    for line in found:
        assert line["prediction"] == ("great" if line["label"] == "1" else "terrible")
        assert 0.5 <= line["probability"] <= 1
    capsys.readouterr()
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert [json.loads(line) for line in shown.splitlines()] == found


def test_columns_of_the_rows_stay_theirs(runs, tmp_path, capsys):
    rows = [{"sentence": "the film good", "label": "mine", "probability": 7, "predicted_label": 1}]
    rows.append({"sentence": "the film bad"})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["predict", str(runs["full"][0]), str(tmp_path / "own.jsonl")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, line in zip(rows, found, strict=True):
        assert {name: line[name] for name in row} == row
        own = {*line} - {*row}
        assert own == {"prediction", "predicted_predicted_label", "predicted_probability"}
        assert line["predicted_predicted_label"] in ("0", "1")


def test_written_answers_are_predicted(places, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text('{"prompt": "the film"}\n{"prompt": "a plot"}\n')
    words = [str(places / "opt"), str(tmp_path / "own.jsonl"), "--task", "completion"]
    assert main(["predict", *words, "--max-new-tokens", "3"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in found] == ["the film", "a plot"]
    assert all(isinstance(line["prediction"], str) for line in found)


BAD = [
    (["evaluate", "gone"], "Model 'gone' is neither a folder nor in the local cache"),
    (["evaluate", "{run}", "--eval-examples", "0"], "leaves nothing to measure"),
    (["evaluate", "{run}", "--metric", "f1"], "--metric f1 does not fit task sst2"),
    (["evaluate", "{run}", "--data", "gone.tsv"], "there is no such file or folder"),
    (["predict", "{run}", "gone.jsonl"], "there is no such file or folder"),
    (["predict", "{run}", "."], "is a folder; name the file in it"),
    (["predict", "{run}", "x.tsv", "--out", "."], "--out . is a folder; name a file"),
    (["evaluate", "{probe}"], "is a probe; name the folder of the run that made it"),
]


@pytest.mark.parametrize("words, said", BAD, ids=[" ".join(w) for w, _ in BAD])
def test_what_cannot_be_asked_is_a_sentence(runs, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    known = {"run": runs["full"][0], "probe": runs["probe"][0] / "final"}
    assert main([word.format(**known) for word in words]) == 2
    assert said in capsys.readouterr().err

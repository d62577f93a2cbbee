"""``zokernels tune`` as a user meets it."""

import inspect
import json
import math

import pytest

from zokernels.lab.cli import finetune, main, tune

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def given(places, tmp_path, monkeypatch):
    """The words that every command here begins with, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--model", str(places / "opt"), "--data", str(places), "--max-length", "32"]
    # The loss is convex in a head; of all weights of a random model h is near 0.
    words += ["--batch-size", "32", "--scheme", "head", "--seed", "1", "--forwards", "424"]
    return ["tune", *words]


def test_it_advises_a_rate_and_writes_what_it_found(given, tmp_path, capsys):
    code = main([*given, "--steps", "10", "--json", "a.json", "--plot", "a.png"])
    said, errors = capsys.readouterr()
    assert code == 0, errors
    found = json.loads((tmp_path / "a.json").read_text())
    rate = found["rate"]["value"]
    assert f"Take --lr {rate:.2g} with --eps 0.001" in said
    assert "(424 forwards)" in said and "and 10 by" in said
    assert found["forwards"] == 424 and found["why"] is None
    assert 0 < rate <= 0.7 * found["best_rate"]["value"]
    assert found["largest_rate"]["value"] == pytest.approx(2 * found["best_rate"]["value"])
    assert found["steps"] == 10 and "for 10 steps" in said
    assert found["verdict"] in " ".join(said.split())
    whole = found["whole"]
    plain = whole["squared_gradient"]["value"] / (
        whole["mean_square"]["value"] * whole["curvature"]["value"]
    )
    assert found["best_rate"]["value"] == pytest.approx(plain)
    assert found["settings"]["model"].endswith("opt") and found["rule"]["name"] == "ZOSGD"
    assert len(found["ladder"]) == 9 and found["eps_range"][0] <= 1e-3 <= found["eps_range"][1]
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "E[d²]" in said and "‖g‖²" in said


def test_parts_are_shown(given, tmp_path, capsys):
    words = [*given, "--scheme", "full", "--batch-size", "4"]
    group = ["--forwards", "624", "--by", "group", "--plot", "p.png", "--json", "p.json"]
    assert main([*words, *group]) == 0
    said, parts = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())["parts"]
    labels = {part["label"] for part in parts}
    assert labels == {"embeddings", "attention", "mlp", "norms", "biases"}
    assert all(label in said for label in labels)
    whole = json.loads((tmp_path / "p.json").read_text())["whole"]
    assert sum(part["weights"] for part in parts) == whole["weights"]
    assert main([*words, "--forwards", "544", "--by", "layer"]) == 0
    assert "layer 2" in capsys.readouterr().out


def test_a_refusal_to_advise_is_said_and_ends_with_0(given, tmp_path, capsys):
    words = ["--optimizer", "zo-adam", "--forwards", "224", "--json", "a.json", "--plot", "a.png"]
    assert main([*given, *words]) == 0
    said = capsys.readouterr().out
    assert "After 224 forwards no rate is advised: ZOAdam's step does not follow" in said
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["rate"] is None and found["why"] in said
    assert (tmp_path / "a.png").exists()


def test_it_takes_finetunes_options_of_a_step():
    options = inspect.signature(tune.command).parameters
    theirs = inspect.signature(finetune.command).parameters
    shared = set(options) & set(theirs)
    assert {"model", "task", "data", "scheme", "batch_size", "optimizer", "dtype", "dist"} <= shared
    assert {"num_queries", "estimator", "normalize", "eps", "preset", "perturb"} <= shared
    assert not {"lr", "out", "resume", "eval_every"} & set(options)
    assert all(options[n].default == theirs[n].default for n in shared)


BAD = [
    (["--model", "./gone"], "There is no model folder ./gone"),
    (["--by", "colour"], "--by must be one of none, group, layer, got 'colour'"),
    (["--forwards", "100"], "forwards is 100"),
    (["--forwards", "many"], "'--forwards'"),
    (["--optimizer", "fo-sgd"], "tune is for zeroth-order optimizers"),
    (["--optimizer", "forward-grad"], "takes derivatives"),
    (["--eps", "0"], "--eps must be a number above 0"),
    (["--plot", "a.jpg"], "--plot a.jpg must end in .png, .svg or .pdf"),
    (["--plot", "gone/a.png"], "its folder does not exist; make it first"),
    (["--json", "gone/a.json"], "does not exist"),
    (["--lr", "1"], "--lr is an option of finetune; tune finds the rate and runs no steps"),
    (["--no-retry-oom"], "--no-retry-oom is an option of finetune"),
    (["--out=runs"], "--out is an option of finetune"),
    (["--colour", "red"], "--colour"),
]


@pytest.mark.parametrize(("extra", "sentence"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_one_sentence(given, tmp_path, capsys, extra, sentence):
    assert main([*given, *extra]) == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_no_model_and_a_list_of_presets(capsys):
    assert main(["tune"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert main(["tune", "--preset", "list"]) == 0
    assert "zo-bench" in capsys.readouterr().out


def test_a_rate_that_is_no_number_is_one_sentence(capsys):
    assert main(["finetune", "--model", "x", "--lr", "fast"]) == 2
    assert "'fast' is neither a number nor auto" in capsys.readouterr().err


def test_the_verdict_has_no_more_than_there_is_to_lower(given, tmp_path):
    assert main([*given, "--json", "a.json", "--steps", "1000000"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert math.isfinite(found["fall"]["value"]) and found["fall"]["value"] < found["loss"]["value"]

"""The benchmark paper's settings by name."""

import json
from pathlib import Path

import pytest
from tiny import build

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.runs import checks, presets
from zokernels.lab.runs.settings import Settings

CELL = "zo-bench/sst2/opt-1.3b/"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora/zo-adam", dict(scheme="lora", optimizer="zo-adam", lr=1e-5, eps=1e-3)),
        ("prefix/zo-sgd", dict(scheme="prefix", lr=1e-3, eps=1e-1, steps=20_000, batch_size=16)),
        ("full/forward-grad", dict(optimizer="forward-grad", lr=5e-7)),
        ("full/zo-sgd-sparse", dict(optimizer="zo-sgd", sparsity=0.2)),
        ("full/zo-sgd-blocks", dict(optimizer="zo-sgd", blocks="layer")),
        ("full/fzoo", dict(estimator="one_sided", normalize="std", num_queries=8, lr=1e-5)),
        ("full/meazo", dict(normalize="ema", lr="auto")),
        ("full/eggroll", dict(estimator="population", dist="rank1", num_queries=128, lr="auto")),
        ("full/es-at-scale", dict(estimator="population", num_queries=30, eps=1e-3, lr=5e-4)),
        ("full/hybrid", dict(optimizer="hybrid", hybrid_split=8)),
    ],
)
def test_a_preset_says_what_the_paper_did(name, expected):
    found = presets.get(CELL + name).settings
    assert {key: found[key] for key in expected} == expected
    assert (found["task"], found["model"]) == ("sst2", "facebook/opt-1.3b")


def test_every_preset_makes_a_run_and_lies_on_its_grid():
    for name in presets.names():
        preset = presets.get(name)
        settings = Settings(out=Path("unused"), **preset.settings)
        checks.check(settings)
        # What has a published value of its own is on no grid.
        assert set(preset.grid) <= {"lr", "eps"}
        assert all(preset.settings[key] in grid for key, grid in preset.grid.items()), name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (CELL + "lora/zo-adm", CELL + "lora/zo-adam"),
        ("zo-bench/sst2/opt-1.3/full/zo-sgd", CELL + "full/zo-sgd"),
        ("something", "--preset list"),
    ],
)
def test_an_unknown_preset_is_a_sentence_with_near_names(name, hint):
    with pytest.raises(InputError, match=hint):
        presets.get(name)


def test_the_list_is_there(capsys):
    assert main(["finetune", "--preset", "list"]) == 0
    said = capsys.readouterr().out
    assert "zo-bench/TASK/MODEL/SCHEME/OPTIMIZER" in said and "winogrande" in said


@pytest.mark.hf
def test_options_given_win_over_the_preset(tmp_path):
    model = build("opt", tmp_path / "opt")
    rows = "".join(f"a {('bad', 'good')[i % 2]} film \t{i % 2}\n" for i in range(40))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    code = main(
        ["finetune", "--preset", CELL + "lora/zo-adam", "--model", str(model), "--steps", "2"]
        + ["--shots", "5", "--lr", "1e-6", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    )
    assert code == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    # 1e-6 is this command's own default too, and was given all the same.
    assert (config["steps"], config["lr"], config["shots"]) == (2, 1e-6, 5)
    assert (config["eps"], config["scheme"], config["optimizer"]) == (1e-3, "lora", "zo-adam")
    assert config["keep_best"] and config["eval_every"] == 500

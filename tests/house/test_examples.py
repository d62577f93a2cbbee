"""The examples run as they stand, on a tiny model and the set that the package ships."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import build

from zokernels.lab.cli import main

pytestmark = pytest.mark.hf
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ZOKERNELS_DATA", raising=False)
    return str(build("opt", tmp_path / "opt"))


def test_a_plain_loop(model, capsys):
    assert 0 <= load("plain_loop").main(model, 100) <= 1
    said = capsys.readouterr().out
    assert "step 100: loss" in said
    assert "dev accuracy" in said


def test_a_reward():
    seen = []
    found = load("reward").main(100, 2, lambda *told: seen.append(told))
    assert [step for step, _ in seen] == [0, 100] and seen[-1][1] == found
    # One in ten is chance.
    assert seen[0][1] < 0.15 < 0.2 < found


def test_lora_in_the_trainer(model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    assert load("trainer_lora").main(model, 3, str(out)) > 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out)


def test_lora_with_a_tokenizer_that_has_no_token_to_pad_with(model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    assert load("trainer_lora").main(model, 3, str(tmp_path / "run")) > 0


def test_supervised_fine_tuning_in_trl(model, tmp_path):
    pytest.importorskip("trl", reason="needs TRL: pip install trl")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    assert load("trl_sft").main(model, 3, str(out)) > 0
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_a_sweep_and_its_table(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL", model)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = (EXAMPLES / "sweep.yaml").read_text().replace("steps: 500", "steps: 2")
    (tmp_path / "sweep.yaml").write_text(text)
    out = tmp_path / "out"
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(out)]) == 0
    assert set(load("read_sweep").main(str(out))) == {"full", "lora"}
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + 2 + 2 + 2 + 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*")), ids=lambda p: p.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60

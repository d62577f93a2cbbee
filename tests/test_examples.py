"""The examples run as they stand, on a tiny model and the set that the package ships."""

import importlib.util
from pathlib import Path

import pytest
from tiny import build

pytestmark = pytest.mark.hf
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


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


def test_lora_in_the_trainer(model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    assert load("trainer_lora").main(model, 3, str(out)) > 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60

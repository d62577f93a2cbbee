"""What others get: code that loads, merged weights, a card, an upload to a stand-in of the hub."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from hub_stand_in import hub
from tiny import build, environment

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.runs import hand_over
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
IDS = torch.tensor([[0, 5, 6, 7, 8]])


def settings(places, out, kind="opt", **extra):
    given = dict(steps=4, batch_size=8, lr=1e-2, max_length=32, eval_examples=20)
    return Settings(model=str(places / kind), data=str(places), out=out, **{**given, **extra})


def logits(model):
    with torch.no_grad():
        out = model.eval()(input_ids=IDS)
    return getattr(out, "logits", None) if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("opt", "full"), ("opt", "lora"), ("llama", "prefix"), ("opt", "prompt"), ("roberta", "lora"),
     ("bert", "bitfit")],
)  # fmt: skip
def test_the_code_of_the_report_loads_what_was_trained(places, tmp_path, kind, scheme):
    if kind == "llama":
        build(kind, places / kind)
    run = Finetune(settings(places, tmp_path / "run", kind, scheme=scheme))
    run.run()
    report = (tmp_path / "run/report.md").read_text()
    code = report.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(run.learner.model))


def test_a_merged_model_is_the_adapted_one(places, tmp_path):
    import transformers

    out = tmp_path / "run"
    run = Finetune(settings(places, out, scheme="lora", merge=True, lr=1e-1))
    run.run()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    transformers.AutoTokenizer.from_pretrained(out / "merged")
    names = {}
    exec(hand_over.code(run), names)
    base = transformers.AutoModelForCausalLM.from_pretrained(places / "opt")
    adapted = logits(names["model"])
    # The product is rounded once more.
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(base), adapted, rtol=1e-3, atol=1e-3)
    # Begun anew without it, nothing of the old one is left.
    Finetune(settings(places, out, scheme="lora", overwrite=True)).run()
    assert not (out / "merged").exists()


def test_the_card_has_the_runs_own_facts(places, tmp_path):
    run = Finetune(settings(places, tmp_path / "run", scheme="lora", lora_rank=2))
    m = run.run()
    text = (tmp_path / "run/final/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "peft" and "zeroth-order" in head["tags"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(m["dev_accuracy_after"], 6)
    assert f"{m['dev_accuracy_after']:.1%} ± {m['dev_standard_error_after']:.1%}" in text
    assert "20 examples of dev" in text and "| `lora_rank` | `2` |" in text
    assert f"zokernels replay opt trajectory.zk --until {m['weights_of_step']}" in text
    # No folder of this machine, but where the code loads from it.
    assert str(tmp_path) not in text.replace(str(tmp_path / "run/final"), "").replace(
        str(places / "opt"), ""
    )


@pytest.fixture
def served(monkeypatch):
    """A stand-in of the hub, at which a process of its own looks."""
    with hub() as server:
        yield server


def finetune(served, places, out, *more):
    """A run as a process: the hub's client reads its address when it is imported."""
    words = ["--steps", "3", "--batch-size", "4", "--eval-examples", "10", "--data", str(places)]
    return subprocess.run(
        [sys.executable, "-m", "zokernels", "finetune", "--model", str(places / "opt"), *words]
        + ["--out", str(out), *more],
        env={**environment(), "HF_ENDPOINT": served.address, "HF_TOKEN": "hf_x"}
        | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_run_goes_to_the_hub_with_its_card_and_its_log(served, places, tmp_path):
    out = tmp_path / "run"
    done = finetune(served, places, out, "--scheme", "lora", "--push-to-hub", "someone/own")
    assert done.returncode == 0, done.stderr
    asked = served.repos[0]
    assert asked["name"] == "own"
    # By the client's version.
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
            "trajectory.zk"} <= set(served.files)  # fmt: skip
    card = served.files["README.md"].decode()
    assert "PeftModel.from_pretrained(base, 'someone/own')" in card
    assert str(tmp_path) not in card
    assert served.files["trajectory.zk"] == (out / "trajectory.zk").read_bytes()
    saved = out / "final/adapter_model.safetensors"
    assert served.files["adapter_model.safetensors"] == saved.read_bytes()
    assert "Uploaded: " in done.stdout


def test_a_hub_that_fails_loses_nothing(served, places, tmp_path):
    served.full = True
    done = finetune(served, places, tmp_path / "run", "--push-to-hub", "someone/own")
    assert done.returncode == 1
    assert "zokernels: --push-to-hub someone/own:" in done.stderr
    assert "Traceback" not in done.stderr and "hf upload someone/own" in done.stderr
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 3


BAD = [
    (["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: the hub does not take it"),
    (["--push-to-hub", "a/b", "--no-save-weights"], "--push-to-hub needs the weights"),
    (["--push-to-hub", "a/b", "--scheme", "probe"], "a probe is no model that others can load"),
    (["--merge"], "--merge joins an adapter of --scheme lora to its base; got full"),
    (["--merge", "--scheme", "lora", "--no-save-weights"], "--merge writes weights"),
]


@pytest.mark.parametrize("words, said", BAD, ids=[" ".join(w) for w, _ in BAD])
def test_what_could_not_be_handed_over_is_said_first(places, tmp_path, capsys, words, said):
    base = ["finetune", "--model", str(places / "opt"), "--out", str(tmp_path / "run")]
    assert main([*base, *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_a_login_nothing_begins(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="--push-to-hub a/b: the hub does not take it"):
        Finetune(settings(places, tmp_path / "run", push_to_hub="a/b")).run()

"""Runs of the command line on a GPU: what they say of themselves holds, there and on a CPU."""

import json

import pytest
from device import DEVICE, marks

from zokernels.lab.cli import main

pytestmark = [*marks, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

RUNS = {
    "rank1": dict(dist="rank1", estimator="population", num_queries=4, normalize="std"),
    "adapter": dict(scheme="lora", perturb="in_place", optimizer="zo-adam"),
    "paired": dict(perturb="paired", eval_every=2),
}


def words(**options):
    return [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_replayed_by_a_cpu_and_evaluated_to_its_number(name, places, tmp_path, capsys):
    run, model = tmp_path / "run", str(places / "opt")
    given = dict(data=places, max_length=32, dtype="bfloat16")
    settings = dict(steps=4, batch_size=4, lr=1e-3, eps=1e-2, eval_examples=16, device=DEVICE)
    assert main(["finetune", *words(model=model, out=run, **given, **settings, **RUNS[name])]) == 0
    assert main(["replay", model, str(run), "--verify"]) == 0
    assert "the saved weights are the same, bit for bit" in capsys.readouterr().out
    answer = tmp_path / "answer.json"
    assert main(["evaluate", str(run), "--device", DEVICE, "--json", str(answer)]) == 0
    after = json.loads((run / "metrics.json").read_text())["dev_accuracy_after"]
    assert json.loads(answer.read_text())["value"] == after

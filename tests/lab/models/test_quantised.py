"""A frozen base of 8 or 4 bits: trained beside, recorded, replayed, evaluated and loaded."""

import json

import pytest
import torch
from tiny import SPECIAL, WORDS, build

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading, quantised
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings

pytest.importorskip("bitsandbytes", reason="needs the extra quantised")
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model with layers of a size that bitsandbytes takes."""
    import transformers as t

    folder = build("opt", tmp_path_factory.mktemp("wide") / "opt")
    config = t.OPTConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=64, word_embed_proj_dim=64, ffn_dim=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, init_std=0.2,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t.OPTForCausalLM(config).save_pretrained(folder)
    return folder


def settings(wide, places, out, **extra):
    given = dict(steps=4, batch_size=8, lr=3e-2, eps=1e-2, num_queries=2, max_length=32)
    return Settings(model=str(wide), data=str(places), out=out, **{**given, **extra})


@pytest.mark.parametrize("scheme", quantised.SCHEMES)
@pytest.mark.parametrize("kind", quantised.KINDS)
def test_a_run_beside_a_quantised_base(wide, places, tmp_path, kind, scheme):
    out = tmp_path / "run"
    options = dict(load_in=kind, scheme=scheme, eval_examples=40, metric="loss")
    run = Finetune(settings(wide, places, out, **options))
    metrics = run.run()
    packed = [p for p in run.learner.model.parameters() if not p.is_floating_point()]
    # Six matrices in each of two layers.
    assert len(packed) == 12 and not any(p.requires_grad for p in packed)
    plain = sum(p.numel() for p in run.learner.model.parameters() if p.is_floating_point())
    assert metrics["all_weights"] == plain + 2 * (4 * 64 * 64 + 2 * 64 * 128)
    # The log gives the same weights onto the base as it is read again.
    assert main(["replay", str(wide), str(out), "--verify"]) == 0
    found = tmp_path / "found.json"
    assert main(["evaluate", str(out), "--json", str(found)]) == 0
    assert json.loads(found.read_text())["value"] == metrics["dev_accuracy_after"]


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize("perturb", ["on_entry", "paired", "in_place"])
def test_every_mode_sees_the_same_slopes(wide, places, tmp_path, kind, perturb):
    def slopes(out, **extra):
        Finetune(settings(wide, places, out, load_in=kind, scheme="lora", **extra)).run()
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [d for line in lines for d in json.loads(line).get("projected_gradients", [])]

    one, other = slopes(tmp_path / "a"), slopes(tmp_path / "b", perturb=perturb)
    # In 8 bits inputs are rounded by the greatest of a row, and sums are taken in another order.
    assert one == pytest.approx(other, rel=1e-3, abs=2e-2)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_saving_a_base_leaves_it_as_it_is(wide, kind):
    """Packed for a CPU with bfloat16 products, 4-bit weights were others after it."""
    ids = torch.arange(5, 15)[None]
    model = loading.load(str(wide), "float32", kind, "cpu").model
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.state_dict()
        assert torch.equal(model(input_ids=ids).logits, before)


BAD = [
    (dict(load_in="2bit", scheme="lora"), "--load-in must be one of 8bit, 4bit"),
    (dict(load_in="4bit"), "quantises what stays frozen, and --scheme full trains it"),
    (dict(load_in="4bit", scheme="probe"), "take one of lora, prefix, prompt, bitfit"),
    (dict(load_in="4bit", scheme="lora", merge=True), "--merge writes a whole model"),
]


@pytest.mark.parametrize("options, words", BAD, ids=[w[:24] for _, w in BAD])
def test_what_cannot_be_quantised_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        Finetune(Settings(model="m", out=tmp_path / "run", **options)).run()


def test_layers_that_do_not_fit_are_a_sentence():
    class Odd(torch.nn.Linear):
        def forward(self, input_ids):
            raise AssertionError("N must be divisible by block_n")

    with pytest.raises(InputError, match="does not take this model's layers .N must be divisible"):
        quantised.settle(Odd(3, 3))


def test_without_the_package_it_is_a_sentence(wide, places, tmp_path, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'zokernels\[quantised\]'"):
        Finetune(settings(wide, places, tmp_path / "run", load_in="8bit", scheme="lora")).run()

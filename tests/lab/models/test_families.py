"""Every family by every scheme: what is trained, where it starts, and what is saved."""

import pytest
import torch
from tiny import build

import zokernels as zk
from zokernels.lab.errors import InputError
from zokernels.lab.models import families, loading, schemes, soft
from zokernels.lab.scoring import SCORERS
from zokernels.lab.scoring.probe import ProbeScorer
from zokernels.lab.tasks import SST2, Example

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("peft", reason="pip install 'zokernels[hf]'")

CAUSAL = ["opt", "llama", "mistral", "gpt2", "qwen", "gemma", "gemma3"]
MASKED = ["bert-mlm", "roberta"]
EXAMPLES = [Example("a fine film with heart", 1), Example("dull", 0), Example("bad movie", 0)]
# Every scheme but those that a kind of model cannot have.
CASES = [(k, s) for k in CAUSAL for s in schemes.SCHEMES]
CASES += [(k, s) for k in MASKED for s in schemes.SCHEMES]
CASES += [("bert", s) for s in schemes.SCHEMES if s != "head"]
TOKENS = torch.tensor([[7, 9, 11, 13, 8, 12, 20, 21, 14, 6]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: str(build(kind, root / kind)) for kind in (*CAUSAL, *MASKED, "bert")}


def scorer_of(loaded, model, scheme, task=SST2):
    common = (model, loaded.tokenizer, task, 64)
    if scheme == "probe":
        return ProbeScorer(*common, kind=loaded.kind)
    return SCORERS[loaded.kind](*common)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_a_few_steps_move_what_the_scheme_trains_and_nothing_else(folders, kind, scheme):
    loaded = loading.load(folders[kind])
    model, trained = schemes.apply(loaded.model, scheme, seed=3, classes=2)
    scorer = scorer_of(loaded, model, scheme)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    batch = scorer.collate(EXAMPLES)
    opt = zk.ZOSGD(model, lr=1e-2, eps=1e-3, seed=5)
    losses = [float(opt.step(lambda: scorer.loss(batch))) for _ in range(3)]
    assert all(loss == loss for loss in losses)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == moving
    assert trained.weights == sum(before[n].numel() for n in moving)


@pytest.mark.parametrize("kind", CAUSAL + ["bert", *MASKED])
def test_the_table_names_modules_that_are_there(folders, kind):
    import re

    model = loading.load(folders[kind]).model
    found = families.of(model)
    assert len(model.get_submodule(found.layers)) == 2
    names = [n for n, _ in model.named_modules() if re.fullmatch(found.queries_and_values, n)]
    assert len(names) == (2 if kind == "gpt2" else 4)
    if kind != "bert":
        inside = {id(m) for m in model.get_submodule(found.head).modules()}
        assert id(model.get_output_embeddings()) in inside


def test_a_family_that_the_table_lacks_is_named(folders):
    model = loading.load(folders["opt"]).model
    model.config.model_type = "mamba"
    with pytest.raises(InputError, match="has no 'mamba'; it has opt, llama"):
        schemes.apply(model, "head")


@pytest.mark.parametrize("scheme", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_soft_tokens_start_as_the_real_tokens_they_were_made_of(folders, monkeypatch, kind, scheme):
    """The adapted model on a text is the plain one on some real tokens and the text.

    This holds only if keys, values, heads and positions are where the model looks for them, also
    where queries share them.
    """
    monkeypatch.setattr(soft, "_real_tokens", lambda model, count: TOKENS[:, :count])
    count = {"prefix": soft.PREFIX_TOKENS, "prompt": soft.PROMPT_TOKENS}[scheme]
    plain, loaded = loading.load(folders[kind]).model, loading.load(folders[kind]).model
    model, _ = schemes.apply(loaded, scheme)
    text = torch.tensor([[5, 8, 10, 17], [9, 9, 22, 6]])
    with torch.no_grad():
        whole = torch.cat([TOKENS[:, :count].expand(2, -1), text], 1)
        want = plain(input_ids=whole).logits[:, -4:]
        got = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[:, -4:]
    # Sums of attention in another order.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("kind", ["opt", "mistral", "roberta"])
def test_an_adapter_is_loaded_by_peft_as_it_was_saved(folders, tmp_path, kind, scheme):
    from peft import PeftModel

    loaded = loading.load(folders[kind])
    model, _ = schemes.apply(loaded.model, scheme, seed=3)
    scorer = scorer_of(loaded, model, scheme)
    batch = scorer.collate(EXAMPLES)
    zk.ZOSGD(model, lr=0.1, eps=1e-3).step(lambda: scorer.loss(batch))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loading.load(folders[kind]).model, tmp_path)
    with torch.no_grad():
        assert torch.equal(
            scorer_of(loaded, again.eval(), scheme).scores(batch), scorer.scores(batch)
        )


@pytest.mark.parametrize("kind", ["opt", "gpt2", "roberta", "bert-mlm", "llama"])
def test_a_trained_head_leaves_the_embedding_and_survives_a_save(folders, tmp_path, kind):
    loaded = loading.load(folders[kind])
    embedding = loaded.model.get_input_embeddings().weight.detach().clone()
    model, _ = schemes.apply(loaded.model, "head")
    scorer = scorer_of(loaded, model, "head")
    batch = scorer.collate(EXAMPLES)
    zk.ZOSGD(model, lr=0.1, eps=1e-3).step(lambda: scorer.loss(batch))
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = loading.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(
            scorer_of(again, again.model, "head").scores(batch), scorer.scores(batch)
        )


def test_a_probe_starts_undecided_and_saves_its_layer(folders, tmp_path):
    from safetensors.torch import load_file

    loaded = loading.load(folders["llama"])
    model, _ = schemes.apply(loaded.model, "probe", classes=2)
    scorer = scorer_of(loaded, model, "probe")
    batch = scorer.collate(EXAMPLES)
    assert scorer.scores(batch).abs().max() == 0
    opt = zk.ZOSGD(model, lr=0.05, eps=1e-3)
    losses = [float(opt.step(lambda: scorer.loss(batch))) for _ in range(60)]
    # Two weights rows, three examples: separable, and so learned.
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "probe.safetensors")["weight"], model.linear.weight)
    with pytest.raises(InputError, match="needs a task with label words"):
        schemes.apply(loading.load(folders["llama"]).model, "probe", classes=0)


@pytest.mark.parametrize("kind", [*MASKED, "bert"])
def test_an_encoders_prefix_is_the_keys_and_values_of_real_tokens(folders, monkeypatch, kind):
    """With one layer, a text after a prefix is the text in a row that also holds its tokens."""
    monkeypatch.setattr(soft, "_real_tokens", lambda model, count: TOKENS[:, :count])
    plain, loaded = (loading.load(folders[kind]).model for _ in range(2))
    for model in (plain, loaded):
        inner = model.base_model.encoder
        inner.layer = inner.layer[:1]
        model.config.num_hidden_layers = 1
    model, _ = schemes.apply(loaded, "prefix")
    text = torch.tensor([[5, 8, 10, 17, 2], [9, 9, 22, 6, 2]])
    with torch.no_grad():
        whole = torch.cat([TOKENS[:, : soft.PREFIX_TOKENS].expand(2, -1), text], 1)
        want = plain(input_ids=whole)[0][:, -5:]
        got = model(input_ids=text, attention_mask=torch.ones_like(text))[0]
    # Sums of attention in another order.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_prefix_for_a_model_that_takes_none_is_refused():
    import transformers as t

    model = t.DistilBertForMaskedLM(
        t.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=32, n_heads=2, n_layers=1)
    )
    with pytest.raises(InputError, match="DistilBertForMaskedLM takes none; use prompt"):
        schemes.apply(model, "prefix")


def test_the_seed_fixes_where_an_adapter_starts(folders):
    starts = []
    for seed in (1, 1, 2):
        model, _ = schemes.apply(loading.load(folders["opt"]).model, "prompt", seed=seed)
        starts.append(next(p for p in model.parameters() if p.requires_grad).detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])

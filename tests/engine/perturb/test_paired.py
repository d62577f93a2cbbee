"""Perturbed forwards of language models: every way of running them is the same forward."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokernels as zk
from zokernels.backends import native
from zokernels.estimators import derive_seed
from zokernels.perturb import Direction, Move
from zokernels.perturb.filling import Filler

pytestmark = pytest.mark.hf
hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

VOCABULARY = 9000  # large enough for logits to wait


def families():
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, init_std=0.3,
    )  # fmt: skip
    inner = dict(shape, intermediate_size=48)
    grouped = dict(inner, num_key_value_heads=2)
    opt = dict(shape, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
    gpt2 = dict(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    return {
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**opt)),
        "opt-untied": lambda: hf.OPTForCausalLM(hf.OPTConfig(**opt, tie_word_embeddings=False)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)),
        "llama-tied": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**grouped, tie_word_embeddings=True)
        ),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**grouped, sliding_window=4)),
        "qwen": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**grouped)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**inner, pad_token_id=1)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**inner)),
        "bert-classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**inner)),
    }  # fmt: skip


def build(name, dtype=torch.float32, lora=False):
    torch.manual_seed(0)
    model = families()[name]().to(dtype).eval()
    if lora:
        peft = pytest.importorskip("peft", reason="needs peft: pip install '.[hf]'")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        ).eval()
    return model


def batch(name, rows=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 9:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :4] = -100
    if name == "bert-classifier":
        labels = torch.arange(rows) % 2
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def step(model, closure, mode, quiet=True, **options):
    """One step at lr 0: its loss, its projected gradients, and why it did not share forwards."""
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=5, perturb=mode, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if quiet else "ignore")
        loss = opt.step(closure).item()
    (perturber,) = opt._perturbers.all()
    return loss, opt.projected_gradients, getattr(perturber, "off", None)


def assert_same(found, expected, dtype=torch.float32):
    # A loss of about 10 is rounded in its last place, and sums are taken in another order; a
    # slope is a difference of two of them over 2 ε = 0.02.
    rounding = 4e-6 if dtype is torch.float32 else 2e-3
    assert found[0] == pytest.approx(expected[0], abs=rounding)
    assert found[1] == pytest.approx(expected[1], abs=2 * rounding / 0.02)
    assert found[2] is None


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", list(families()))
def test_every_mode_has_the_loss_and_the_slope_of_weights_written_in_place(name, lora):
    model, inputs = build(name, lora=lora), batch(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = step(model, lambda: model(**inputs).loss, "in_place")
    assert abs(expected[1][0]) > 1e-2
    for mode in ("on_entry", "paired"):
        assert_same(step(model, lambda: model(**inputs).loss, mode), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        dict(num_queries=3),
        dict(num_queries=3, estimator="one_sided"),
        dict(dist="rademacher"),
        dict(dist="rank1"),
        dict(dist="rank1", mask=zk.masks.Magnitude(0.2)),
        dict(mask=zk.masks.Random(0.5, seed=3)),
        dict(mask=zk.masks.Magnitude(0.2)),
        dict(lazy_logits=False),
        dict(backend="reference"),
    ],
    ids=str,
)
def test_every_mode_has_the_same_directions(options):
    model, inputs = build("opt"), batch("opt")
    expected = step(model, lambda: model(**inputs).loss, "in_place", **options)
    for mode in ("on_entry", "paired"):
        assert_same(step(model, lambda: model(**inputs).loss, mode, **options), expected)


def test_bits_masks_and_groups_with_scales_of_their_own():
    model, inputs = build("llama"), batch("llama")
    first = [p for n, p in model.named_parameters() if "layers.0" in n]
    rest = [p for n, p in model.named_parameters() if "layers.0" not in n]
    masks = [zk.masks.Bits([torch.rand(p.shape) < 0.5 for p in ps]) for ps in (first, rest)]
    groups = [
        {"params": first, "eps": 2e-2, "mask": masks[0]},
        {"params": rest, "eps": 5e-3, "mask": masks[1]},
    ]
    results = []
    for mode in ("in_place", "on_entry", "paired"):
        opt = zk.ZOSGD([dict(g) for g in groups], lr=0.0, seed=5, perturb=mode, model=model)
        loss = opt.step(lambda: model(**inputs).loss).item()
        results.append((loss, opt.projected_gradients, None))
    # The first group's ε is four times as large as the other's, and d is over that.
    for found in results[1:]:
        assert_same(found, results[0])


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_bfloat16_on_a_small_part_of_the_logits(name):
    model, inputs = build(name, torch.bfloat16), batch(name)
    del inputs["labels"]

    def closure():
        logits = model(**inputs).logits[:, -1].float().log_softmax(-1)
        return -logits[:, [100, 200]].mean()

    expected = step(model, closure, "in_place")
    for mode in ("on_entry", "paired"):
        assert_same(step(model, closure, mode), expected, torch.bfloat16)


def closures(model, inputs):
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]

    def shifted(logits):
        return F.cross_entropy(
            logits[..., :-1, :].contiguous().view(-1, VOCABULARY), labels[:, 1:].reshape(-1)
        )

    return {
        "labels by hand": lambda: shifted(model(ids, mask).logits),
        "sum": lambda: F.cross_entropy(
            model(ids, mask).logits.float().view(-1, VOCABULARY), labels.view(-1), reduction="sum"
        ),
        "some rows": lambda: model(ids, mask).logits[torch.arange(3), -1].logsumexp(-1).mean(),
        "some words": lambda: model(ids, mask).logits[:, -1:].gather(
            -1, torch.tensor([[[5, 7]], [[8, 5]], [[0, 9]]])
        ).mean(),
        "all logits": lambda: model(ids, mask).logits.square().mean(),
        "smoothed": lambda: F.cross_entropy(
            model(ids, mask).logits.view(-1, VOCABULARY), labels.view(-1), label_smoothing=0.1
        ),
        "two forwards": lambda: model(**inputs).loss + shifted(model(ids.flip(0), mask).logits),
        "accuracy too": lambda: _with_accuracy(model(**inputs), labels),
        "hidden states": lambda: model(
            ids, mask, output_hidden_states=True
        ).hidden_states[-1].square().mean(),
        "positions": lambda: model(
            input_ids=ids, attention_mask=mask, position_ids=torch.arange(12)[None], labels=labels
        ).loss,
        "embeddings": lambda: model(
            inputs_embeds=torch.ones(3, 12, 32), attention_mask=mask, labels=labels
        ).loss,
        "items": lambda: model(**inputs, num_items_in_batch=torch.tensor(7)).loss,
        "tuple": lambda: model(**inputs, return_dict=False)[0],
    }  # fmt: skip


def _with_accuracy(output, labels):
    hits = (output.logits.argmax(-1) == labels).float().mean()
    return output.loss + hits


@pytest.mark.parametrize("name", list(closures(None, batch("llama"))))
def test_whatever_a_closure_makes_of_the_outputs(name):
    model, inputs = build("llama"), batch("llama")
    closure = closures(model, inputs)[name]
    expected = step(model, closure, "in_place")
    scale = max(1.0, abs(expected[0]) / 10)
    for mode in ("on_entry", "paired"):
        found = step(model, closure, mode)
        assert_same((found[0] / scale, [d / scale for d in found[1]], found[2]),
                    (expected[0] / scale, [d / scale for d in expected[1]], None))  # fmt: skip


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
def test_logits_that_a_closure_keeps_are_those_of_its_forward(mode):
    model, inputs = build("opt"), batch("opt", rows=2)
    kept = []

    def closure():
        kept.append(model(**inputs).logits)
        return kept[-1].float().square().mean()

    def beyond():
        output = model(**inputs)
        kept.append(output.logits)
        return output.loss

    for one in (closure, beyond):
        kept.clear()
        zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=5, perturb=mode).step(one)
        seed = derive_seed(5, 0, 0)
        with zk.perturbed(model, seed, 1e-2, perturb="in_place"), torch.no_grad():
            expected = model(**inputs).logits
        # Sums of 32 products of about 1, in another order.
        torch.testing.assert_close(torch.clone(kept[-2]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("mode", "at"), [("on_entry", 1), ("on_entry", 2), *(("paired", k) for k in range(1, 4))]
)
def test_an_exception_leaves_the_model_as_it_was(mode, at):
    model, inputs, calls = build("opt"), batch("opt"), []
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def closure():
        calls.append(1)
        output = model(**inputs)
        if len(calls) == at:
            raise KeyError("mine")
        return output.loss

    opt = zk.ZOSGD(model, lr=1e-3, perturb=mode)
    with pytest.raises(KeyError, match="mine"):
        opt.step(closure)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "forward" not in vars(model)
    opt.step(lambda: model(**inputs).loss)


def test_a_batch_that_changes_between_the_two_forwards_cannot_be_paired():
    model, calls = build("opt"), []

    def closure():
        calls.append(1)
        ids = torch.full((2, 5), 3 + len(calls))
        return model(input_ids=ids, labels=ids).loss

    with pytest.warns(UserWarning, match="same batch"):
        zk.ZOSGD(model, lr=0.0, perturb="paired").step(closure)


def test_a_token_beyond_the_embedding_is_a_sentence():
    model = build("opt")
    ids = torch.tensor([[3, VOCABULARY]])
    with pytest.raises(IndexError, match="tokenizer that belongs to this model"):
        zk.ZOSGD(model).step(lambda: model(ids).logits.mean())


@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_a_label_that_is_no_token_is_a_sentence(label):
    model, ids = build("opt"), torch.tensor([[3, 4, 5]])
    with pytest.raises(IndexError, match=f"head has {VOCABULARY} rows"):
        zk.ZOSGD(model).step(
            lambda: model(input_ids=ids, labels=torch.tensor([[3, 4, label]])).loss
        )


def test_a_frozen_head_and_frozen_layers():
    model, inputs = build("opt-untied"), batch("opt")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name or "norm" in name)
    expected = step(model, lambda: model(**inputs).loss, "in_place")
    for mode in ("on_entry", "paired"):
        assert_same(step(model, lambda: model(**inputs).loss, mode), expected)


def test_neither_the_head_nor_the_logits_are_whole_in_memory():
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=60_000, hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=128, word_embed_proj_dim=128, max_position_embeddings=64,
    )  # fmt: skip
    model = hf.OPTForCausalLM(config).eval()
    ids = torch.randint(3, 60_000, (2, 32))
    opt = zk.ZOSGD(model, lr=0.0)
    opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    with torch.profiler.profile(profile_memory=True) as profile:
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    largest = max(e.cpu_memory_usage for e in profile.events())
    # The head has 30.7 MB, the logits of both rows 15.4.
    assert largest < 4e6


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seeds", [[7], [7, 8, 9]], ids=len)
def test_two_sides_of_one_draw_are_two_passes(dtype, dist, seeds):
    if native.why_missing() is not None:
        pytest.skip(f"needs the native backend: {native.why_missing()}")
    params = [nn.Parameter(torch.randn(n, 24).to(dtype)) for n in (1, 3, 700, 12_000)]
    coeffs = [3e-3, -2e-3, 1e-40][: len(seeds)]
    sides = [
        Direction(params, [1, 5, 6, 9], [Move(tuple(s * c for c in coeffs))] * 4, seeds, dist)
        for s in (1, -1)
    ]
    rows = [torch.tensor([2, 0, 2]), torch.tensor([2, 0, 2])]
    filler = Filler(params)
    filler.begin(sides)
    for i, p in enumerate(params):
        found = [v.clone() for v in filler.values([i])[0]]
        part = [v.clone() for v in filler.part(i, 0, 1)]
        for k, side in enumerate(sides):
            expected = torch.empty_like(p.detach())
            side.fill([p.detach()], [expected], [i])
            assert torch.equal(found[k], expected)
            assert torch.equal(part[k], expected[:1])
            if i == 2:
                assert torch.equal(filler.rows(i, rows)[k], expected[rows[0]])
                assert torch.equal(filler.part(i, 5, 400)[k], expected[5:400])

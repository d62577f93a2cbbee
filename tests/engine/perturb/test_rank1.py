"""Forwards along directions of rank one: by the stored weights, what whole weights would give."""

import warnings
from statistics import median

import pytest
import torch

import zokernels as zk
from zokernels.estimators import derive_seed

hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

VOCABULARY = 9000  # large enough for logits to wait
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.2, init_std=0.2,
)  # fmt: skip
INNER = dict(SHAPE, intermediate_size=48)
GROUPED = dict(INNER, num_key_value_heads=2)
OPT = dict(SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
T5 = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
)
MOE = dict(GROUPED, num_local_experts=4, num_experts_per_tok=2)
VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    image_size=16, patch_size=8, initializer_range=0.2,
)  # fmt: skip
MAMBA = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4,
    initializer_range=0.2, use_cache=False,
)  # fmt: skip
WHISPER = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    max_source_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip
CONVNEXT = dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, num_labels=3)


def language():
    return {
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
        "opt-untied": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, tie_word_embeddings=False)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4)),
        "qwen": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=8)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**INNER, pad_token_id=1)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**INNER)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MOE)),
        "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)),
    }


def others():
    return {
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
        "convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**CONVNEXT)),
        "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
    }


FAMILIES = {**language(), **others()}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = FAMILIES[name]().to(dtype).eval()
    if name == "mixtral" and dtype is torch.float64:
        # torch multiplies groups of rows in shorter types only.
        model.set_experts_implementation("eager")
    return model


def batch(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    if name in ("vit", "convnext"):
        size = 16 if name == "vit" else 32
        pixels = torch.randn(2, 3, size, size, generator=generator)
        return dict(pixel_values=pixels.to(dtype), labels=torch.tensor([0, 1]))
    if name == "whisper":
        heard = torch.randn(3, 8, 32, generator=generator)
        return dict(input_features=heard.to(dtype), labels=ids)
    if name == "mamba":
        return dict(input_ids=ids, labels=ids)
    mask = torch.ones_like(ids)
    mask[-1, 9:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100))


def step(model, closure, mode, **options):
    """An optimizer after a step at lr 0, and the step's loss."""
    options = dict(eps=1e-2, dist="rank1") | options
    opt = zk.ZOSGD(model, lr=0.0, seed=5, perturb=mode, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = opt.step(closure).item()
    (perturber,) = opt._perturbers.all()
    assert getattr(perturber, "off", None) is None
    return opt, loss


def squashed(model, inputs):
    """A loss of all logits that stays in their type."""
    return lambda: model(**inputs).logits.tanh().mean() * 100


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_is_that_of_whole_weights(name):
    model, inputs = build(name), batch(name)

    def closure():
        return model(**inputs).loss

    expected, loss = step(model, closure, "in_place")
    assert abs(expected.projected_gradients[0]) > 1e-3
    for mode in ("on_entry", "paired"):
        opt, found = step(model, closure, mode)
        # A loss of some 10 is rounded in its last place, and sums are taken in another order; a
        # slope is a difference of two of them over 2 ε = 0.02.
        assert found == pytest.approx(loss, abs=4e-6)
        assert opt.projected_gradients == pytest.approx(expected.projected_gradients, abs=4e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_slope_is_the_derivative_that_autograd_has(name):
    model, inputs = build(name, torch.float64), batch(name, torch.float64)
    closure = squashed(model, inputs)
    closure().backward()
    seed = derive_seed(5, 0, 0)
    slope = sum(
        (p.grad * zk.noise.rank1(p.shape, seed=seed, stream=i)).sum().item()
        for i, p in enumerate(model.parameters())
        if p.grad is not None
    )
    model.zero_grad()
    # Which rows an expert gets is known on the host only, which points can't share.
    for mode in ("on_entry",) if name == "mixtral" else ("on_entry", "paired"):
        opt, _ = step(model, closure, mode, eps=1e-4)
        # Of a central difference ε² times a third derivative is left, in what casts to float32 on
        # the way also its rounding over 2 ε.
        assert opt.projected_gradients[0] == pytest.approx(slope, rel=2e-4, abs=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_in_16_bits_it_errs_no_more_than_whole_weights_do(name, dtype):
    model, inputs = build(name, dtype), batch(name, dtype)
    exact, wide = build(name, torch.float64), batch(name, torch.float64)
    exact.load_state_dict(model.state_dict())
    errors = {"on_entry": [], "in_place": []}
    # Both round to the type in some 20 places, and which of the two is nearer along one direction
    # is chance: by three times either way, and more where a router takes another expert.
    for seed in range(3, 10):
        where = dict(seed=seed, scale=1e-2, dist="rank1")
        with torch.no_grad(), zk.perturbed(exact, **where):
            expected = exact(**wide).logits
        for mode, found in errors.items():
            with torch.no_grad(), zk.perturbed(model, **where, perturb=mode):
                found.append((model(**inputs).logits - expected).pow(2).mean().sqrt().item())
    assert median(errors["on_entry"]) < 1.4 * median(errors["in_place"])

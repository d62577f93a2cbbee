"""What belongs to a point in a forward that several share, on models of many kinds.

The batch divides every first dimension that a layer may meet, so that no shape tells.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokernels as zk

ROWS, LENGTH, WORDS = 2, 8, 64


def run(model, closure, mode, eps=1e-2):
    """The loss and the slope of a step's batch, and why its points did not share a forward."""
    opt = zk.ZOSGD(model, lr=0.0, eps=eps, seed=3, perturb=mode)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = float(opt.step(closure))
    (perturber,) = opt._perturbers.all()
    return loss, opt.projected_gradients[0], getattr(perturber, "off", None)


def assert_all_modes_agree(model, closure, shares=True):
    loss, slope, _ = run(model, closure, "in_place")
    for mode in ("on_entry", "paired"):
        found = run(model, closure, mode)
        # Losses of some 4 are rounded in binary32; a slope is their difference over 2 ε = 0.02.
        assert found[0] == pytest.approx(loss, abs=4e-6)
        assert found[1] == pytest.approx(slope, abs=4e-4)
    assert (found[2] is None) is shares, found[2]


SIZES = dict(
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, initializer_range=0.3,
)  # fmt: skip


def encoder(hf, name, **more):
    config = getattr(hf, f"{name}Config")(**{**SIZES, "max_position_embeddings": 32, **more})
    return getattr(hf, f"{name}ForSequenceClassification")(config)


def decoder(hf, name, **more):
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**{**SIZES, **more}))


def sequence(hf, name, **more):
    sizes = dict(vocab_size=WORDS, d_model=16, decoder_start_token_id=0, pad_token_id=0, **more)
    return getattr(hf, f"{name}ForConditionalGeneration")(getattr(hf, f"{name}Config")(**sizes))


LANGUAGE = {
    "bert": lambda hf: encoder(hf, "Bert"),
    "mpnet": lambda hf: encoder(hf, "MPNet"),
    "deberta": lambda hf: encoder(
        hf, "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
    ),
    "xlnet": lambda hf: hf.XLNetForSequenceClassification(
        hf.XLNetConfig(vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=32)
    ),
    "gpt2": lambda hf: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH)
    ),
    "gptj": lambda hf: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    ),
    "bloom": lambda hf: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2)
    ),
    "llama": lambda hf: decoder(hf, "Llama", num_key_value_heads=1),
    "gemma": lambda hf: decoder(hf, "Gemma", num_key_value_heads=1, head_dim=8),
    "neox": lambda hf: decoder(hf, "GPTNeoX"),
    "t5": lambda hf: sequence(hf, "T5", d_kv=8, d_ff=32, num_layers=2, num_heads=2),
    "bart": lambda hf: sequence(
        hf, "Bart", encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=32, init_std=0.3,
    ),
}  # fmt: skip


@pytest.mark.hf
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", list(LANGUAGE))
def test_language_models(name, padded):
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    model = LANGUAGE[name](hf).eval()
    ids = torch.randint(3, WORDS, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:] = 0
    labels = ids if hasattr(model, "lm_head") or name in ("neox",) else torch.arange(ROWS) % 2
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = 0
    # An activation of Bloom's is an autograd.Function without a rule for vmap.
    assert_all_modes_agree(
        model,
        lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss,
        shares=name != "bloom",
    )


@pytest.mark.hf
def test_autocast():
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    model, ids = LANGUAGE["llama"](hf).eval(), torch.randint(3, WORDS, (ROWS, LENGTH))

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    loss, slope, _ = run(model, closure, "in_place")
    found = run(model, closure, "paired")
    # Products are rounded to 8 bits.
    assert found[:2] == pytest.approx((loss, slope), rel=5e-3) and found[2] is None


@pytest.mark.hf
def test_an_image_model():
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    images, labels = torch.randn(ROWS, 3, 8, 8), torch.arange(ROWS)
    assert_all_modes_agree(model, lambda: model(pixel_values=images, labels=labels).loss)


@pytest.mark.hf
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_experts_go_on_one_forward_a_point(name):
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    more = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = decoder(
        hf, name, num_key_value_heads=1, **(more if name == "Qwen2Moe" else {}),
        **{"num_local_experts" if name == "Mixtral" else "num_experts": 4},
        output_router_logits=True, experts_implementation="eager",
    ).eval()  # fmt: skip
    ids = torch.randint(3, WORDS, (ROWS, LENGTH))
    assert_all_modes_agree(model, lambda: model(input_ids=ids, labels=ids).loss, shares=False)


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["PromptTuning", "PromptEncoder", "PrefixTuning"])
def test_prompts_made_of_one_row(kind):
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[hf]'")
    torch.manual_seed(0)
    more = {"encoder_hidden_size": 16} if kind == "PromptEncoder" else {}
    config = getattr(peft, f"{kind}Config")(num_virtual_tokens=4, task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(decoder(hf, "Llama", num_key_value_heads=2), config)
    ids = torch.randint(3, WORDS, (4, LENGTH))
    mask = torch.ones_like(ids)
    assert_all_modes_agree(
        model, lambda: model(input_ids=ids, attention_mask=mask, labels=ids).loss
    )


class LabelQueries(nn.Module):
    """Rows are scored against embeddings of all labels, as many as rows, or twice as many."""

    def __init__(self, labels):
        super().__init__()
        self.words, self.labels = nn.Embedding(WORDS, 8), nn.Embedding(labels, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        queries = self.out(self.norm(self.labels.weight))
        return self.norm(self.words(x).mean(1)) @ queries.t()


@pytest.mark.parametrize("labels", [2, 4, 8])
def test_embeddings_of_labels(labels):
    torch.manual_seed(0)
    model, x = LabelQueries(labels), torch.randint(WORDS, (4, LENGTH))
    assert_all_modes_agree(model, lambda: F.cross_entropy(model(x), torch.arange(4) % labels))


class Statistics(nn.Module):
    """Mixes the rows of a batch inside of the model, and keeps a part of the loss for later."""

    def __init__(self, what):
        super().__init__()
        self.words, self.inner, self.what = nn.Embedding(WORDS, 8), nn.Linear(8, 8), what
        self.kept = None

    def forward(self, x):
        h = self.inner(self.words(x))
        if self.what == "mean of the batch":
            h = h + 0.1 * h.mean(0)
        elif self.what == "largest of the batch":
            h = h / h.abs().max()
        elif self.what == "one scalar":
            return h.square().mean()
        self.kept = 0.01 * h.abs().mean()
        return h.square().mean(-1)


@pytest.mark.parametrize("what", ["mean of the batch", "largest of the batch", "one scalar"])
def test_what_mixes_rows_mixes_those_of_its_point(what):
    torch.manual_seed(0)
    model, x = Statistics(what), torch.randint(WORDS, (4, LENGTH))
    assert_all_modes_agree(model, lambda: model(x).mean())


def test_what_a_model_leaves_in_an_attribute_is_not_shared():
    torch.manual_seed(0)
    model, x = Statistics("nothing"), torch.randint(WORDS, (4, LENGTH))
    assert_all_modes_agree(model, lambda: model(x).mean() + model.kept, shares=False)


class ReadsValues(nn.Module):
    """Decides by a value that hangs on the weights."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        h = self.inner(x)
        if self.how == "condition":
            return h if h.mean() > 0 else -h
        if self.how == "item":
            return h * h.mean().item()
        if self.how == "numpy":
            return h + torch.from_numpy(h.numpy().copy())
        return nn.functional.relu(h)[h[:, 0] > 0]


@pytest.mark.parametrize("how", ["condition", "item", "numpy", "rows"])
def test_what_reads_values_goes_on_one_forward_a_point_with_one_message(how):
    torch.manual_seed(0)
    model, x = ReadsValues(how), torch.randn(8, 8)
    expected = run(model, lambda: model(x).square().mean(), "in_place")
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=3, perturb="paired")
    with pytest.warns(UserWarning, match="goes on as 'on_entry', one forward a point") as seen:
        losses = [float(opt.step(lambda: model(x).square().mean())) for _ in range(3)]
    assert len([w for w in seen if "goes on" in str(w.message)]) == 1
    assert losses[0] == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTM(8, 8, batch_first=True), lambda: nn.GRU(8, 8, 2), lambda: nn.RNN(8, 8)],
    ids=["LSTM", "GRU", "RNN"],
)
def test_recurrent_layers(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 4, 8)
    loss, slope, _ = run(model, lambda: model(x)[0].square().mean(), "in_place")
    for mode in ("on_entry", "paired"):
        found = run(model, lambda: model(x)[0].square().mean(), mode)
        assert found[:2] == pytest.approx((loss, slope), abs=1e-4)


def test_dropout_and_noise_of_the_model_are_the_same_at_each_point():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(F.dropout(x + torch.randn_like(x), 0.5, training=True))

    torch.manual_seed(0)
    model, x = nn.Sequential(Noisy(8, 8), Noisy(8, 8)), torch.randn(4, 8)
    assert_all_modes_agree(model, lambda: model(x).square().mean())


def test_a_closures_own_error_is_raised_and_nothing_is_said():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    opt = zk.ZOSGD(model, lr=0.0, perturb="paired")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                opt.step(lambda: model(torch.randn(4, 9)).mean())
            opt.step(lambda: model(x).square().mean())
    (perturber,) = opt._perturbers.all()
    assert perturber.off is None

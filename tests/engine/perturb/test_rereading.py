"""A weight that a forward reads again and again is made once, within a bound, or that is said."""

import warnings

import pytest
import torch
from torch import nn

import zokernels as zk
from zokernels.backends import native
from zokernels.perturb import drawing, filling

CELLS = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell}


class Loop(nn.Module):
    """A cell in a loop, a layer in a loop, or experts read one by one."""

    def __init__(self, kind, times=12, width=160):
        super().__init__()
        self.kind, self.times = kind, times
        if kind in CELLS:
            self.cell = CELLS[kind](width, width)
        elif kind == "layers":
            self.layers = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        else:
            self.experts = nn.Parameter(torch.randn(times, width, width) / 16)

    def forward(self, x):
        if self.kind == "layers":
            for _ in range(self.times):
                x = self.layers(x).tanh()
            return x
        if self.kind == "experts":
            return sum(x @ self.experts[k] for k in range(self.times))
        if self.kind == "experts by tensor":
            return sum(x @ self.experts[k].t() for k in torch.arange(self.times))
        state = None
        for _ in range(self.times):
            state = self.cell(x, state)
        return state[0] if self.kind == "lstm" else state


@pytest.fixture
def elements(monkeypatch):
    """How many elements forwards have drawn."""
    drawn = [0]
    fill, fill_range = drawing.Drawing.fill, drawing.Drawing.fill_range

    def count(self, what, chosen, out):
        drawn[0] += sum(self.sources[i].numel() for i in chosen)
        fill(self, what, chosen, out)

    def count_range(self, what, i, first, last, out):
        drawn[0] += last - first
        fill_range(self, what, i, first, last, out)

    monkeypatch.setattr(drawing.Drawing, "fill", count)
    monkeypatch.setattr(drawing.Drawing, "fill_range", count_range)
    return drawn


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", [*CELLS, "layers", "experts", "experts by tensor"])
def test_a_weight_is_drawn_once_a_forward(kind, backend, elements):
    if backend == "native" and native.why_missing() is not None:
        pytest.skip(f"needs the native backend: {native.why_missing()}")
    torch.manual_seed(0)
    model, x = Loop(kind), torch.randn(2, 160)
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, backend=backend)
    size = sum(p.numel() for p in model.parameters())
    for step in range(3):
        elements[0] = 0
        opt.step(lambda: model(x).square().mean())
        # The first forward learns what is read again when it is.
        assert elements[0] <= (3 if step == 0 else 2) * size


@pytest.mark.parametrize("kind", ["gru", "layers", "experts"])
def test_what_is_kept_has_the_loss_of_weights_in_place(kind):
    slopes = []
    for mode in ("in_place", "on_entry", "paired"):
        torch.manual_seed(0)
        model, x = Loop(kind, times=4), torch.randn(2, 160)
        opt = zk.ZOSGD(model, lr=1e-3, eps=1e-2, perturb=mode)
        for _ in range(3):
            opt.step(lambda: model(x).square().mean())  # noqa: B023
        slopes += opt.projected_gradients
    assert slopes[1:] == pytest.approx(slopes[:1] * 2, rel=2e-3)


def test_beyond_the_bound_weights_are_made_again_and_that_is_said_once(monkeypatch, elements):
    monkeypatch.setattr(filling, "_KEPT", 160 * 160 * 4)
    torch.manual_seed(0)
    model, x = Loop("layers"), torch.randn(2, 160)
    opt = zk.ZOSGD(model, lr=0.0, eps=1e-2)
    with pytest.warns(UserWarning, match="makes them . times.*perturb='in_place'") as seen:
        for _ in range(3):
            opt.step(lambda: model(x).square().mean())
    assert len(seen) == 1
    # One of the two layers fits.
    elements[0] = 0
    opt.step(lambda: model(x).square().mean())
    assert elements[0] == pytest.approx(2 * (1 + 12) * 160 * 160, rel=0.02)


def test_a_head_whose_logits_are_read_twice_is_drawn_once(elements):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(64, 32), nn.Linear(32, 8192)

        def get_output_embeddings(self):
            return self.head

        def forward(self, x):
            return self.head(self.words(x))

    torch.manual_seed(0)
    model, x, found = Model(), torch.randint(64, (2, 4)), []

    def closure():
        # As text that is generated, each word with a forward of its own.
        return sum(model(x[:, : k + 1])[:, -1].logsumexp(-1).mean() for k in range(4))

    for mode in ("in_place", "on_entry", "paired"):
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, perturb=mode)
        opt.step(closure)
        elements[0] = 0
        opt.step(closure)
        found += opt.projected_gradients
        if mode != "in_place":
            size = sum(p.numel() for p in model.parameters())
            assert elements[0] <= 2 * size
    assert found[1:] == pytest.approx(found[:1] * 2, abs=2e-3)


@pytest.mark.hf
def test_text_that_is_generated_says_which_mode_to_take(monkeypatch):
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=160,
    )  # fmt: skip
    model, ids = hf.LlamaForCausalLM(config).eval(), torch.randint(3, 64, (2, 4))

    def reward():
        made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return (made[:, 4:] % 7).float().mean()

    found = []
    for mode in ("in_place", "on_entry"):
        opt = zk.ZOSGD(model, lr=0.0, eps=0.1, perturb=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(float(opt.step(reward)))
    assert found[0] == found[1]
    monkeypatch.setattr(filling, "_KEPT", 0)
    with pytest.warns(UserWarning, match="generates text"):
        zk.ZOSGD(model, lr=0.0, eps=0.1).step(reward)

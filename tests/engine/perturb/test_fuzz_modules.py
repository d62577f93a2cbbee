"""Models put together at random: every mode has the loss and the slope of weights moved in place.

Batches, lengths and widths share their divisors, so that no shape tells what a dimension is.
"""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokernels as zk

ROWS, LENGTH, WIDTH, WORDS = 4, 8, 16, 24


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1]))


class Attention(nn.Module):
    """With a bias by distance, made of a table alone, and causal or not."""

    def __init__(self, causal):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.distance = nn.Embedding(2 * LENGTH, 2)
        self.causal = causal

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if self.causal:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            at = torch.arange(LENGTH)
            bias = self.distance(at[:, None] - at + LENGTH).permute(2, 0, 1)[None]
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.out(h.transpose(1, 2).flatten(2))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.inner(x.transpose(0, 1)).tanh().transpose(0, 1)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=random.choice([1, 4]))

    def forward(self, x):
        return x + self.inner(x.transpose(1, 2)).transpose(1, 2)


class Prompt(nn.Module):
    """Vectors looked up for one row and repeated for all, in the place of the first words."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, WIDTH)

    def forward(self, x):
        prompt = self.table(torch.arange(2)[None])
        prompt = random.choice([prompt.repeat(len(x), 1, 1), prompt.expand(len(x), -1, -1)])
        return torch.cat([prompt, x[:, 2:]], 1)


class AcrossRows(nn.Module):
    """What the rows of a batch have in common goes to each of them."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.kind = random.choice(["mean", "max", "sort"])

    def forward(self, x):
        h = self.inner(x)
        if self.kind == "mean":
            return x + h.mean(0, keepdim=True)
        if self.kind == "max":
            return x / h.abs().max()
        return x + h.sort(0).values


class Pieces(nn.Module):
    """Weights by index, by einsum, in a list of their own, and a product of two of them."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.other = [self.gain]

    def forward(self, x):
        h = F.linear(x, self.stack[0]) + torch.einsum("btc,dc->btd", x, self.stack[1])
        return (x + h @ (self.stack[2] * self.other[0])).mul(self.gain) / 4


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = random.choice([nn.LayerNorm, nn.RMSNorm])(WIDTH)
        self.groups = nn.GroupNorm(4, WIDTH)

    def forward(self, x):
        return self.inner(x) + self.groups(x.transpose(1, 2)).transpose(1, 2)


class Written(nn.Module):
    """Writes into tensors that it has made of perturbed ones."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.inner(x)
        h[:, 0] = 0.5
        h.clamp_(-2, 2)
        h += x
        return h


class Experts(nn.Module):
    """Chosen row by row, by weights: no forward of all points can follow."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        flat, out = x.flatten(0, 1), torch.zeros(x.shape[:2].numel(), WIDTH, dtype=x.dtype)
        chosen = self.router(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            at = (chosen == number).nonzero()[:, 0]
            out.index_add_(0, at, expert(flat[at]))
        return x + out.view_as(x)


SHARED = [Positions, lambda: Attention(True), lambda: Attention(False), TimeFirst, Convolution,
          Prompt, AcrossRows, Pieces, Norm, Written]  # fmt: skip


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.kind = random.choice(["loss", "logits", "both"])
        if random.random() < 0.5:
            self.head.weight = self.words.weight

    def forward(self, numbers, labels):
        h = self.words(numbers)
        for block in self.blocks:
            h = block(h)
        logits = self.head(h / h.std())
        # A part of the loss that the closure finds in an attribute, if it looks for it.
        self.extra = h.square().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "both": (loss, [logits])}[self.kind]


def build(seed, blocks):
    random.seed(seed)
    torch.manual_seed(seed)
    model = Model([make() for make in random.choices(blocks, k=3)]).double().eval()
    x, y = torch.randint(WORDS, (ROWS, LENGTH)), torch.randint(WORDS, (ROWS, LENGTH))
    reads_extra = random.random() < 0.3

    def closure():
        random.seed(seed)
        found = model(x, y)
        if model.kind == "logits":
            found = F.cross_entropy(found.flatten(0, 1), y.flatten())
        elif model.kind == "both":
            found = found[0] + found[1][0].square().mean()
        return found + 0.01 * model.extra if reads_extra else found

    return model, closure, reads_extra


def steps(seed, blocks, mode):
    """Losses and slopes of two steps that train, and whether a forward was shared by points."""
    model, closure, reads_extra = build(seed, blocks)
    found = []
    opt = zk.ZOSGD(model, lr=1e-3, eps=1e-2, seed=seed, perturb=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            found += [float(opt.step(closure)), *opt.projected_gradients]
    (perturber,) = opt._perturbers.all()
    return found, getattr(perturber, "off", None), reads_extra


# The reference draws float64 weights exactly and adds in float64, so that all modes agree to its
# rounding; a slope is a difference of losses of about 3 over 2 ε = 0.02.
ROUNDING = 1e-9


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(k, marks=pytest.mark.slow) for k in range(12, 100))]
)
def test_a_random_model(seed):
    expected, _, _ = steps(seed, SHARED, "in_place")
    for mode in ("on_entry", "paired"):
        found, off, reads_extra = steps(seed, SHARED, mode)
        assert found == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    # What a model leaves in an attribute belongs to all points, and the closure may not use it.
    assert (off is not None) == reads_extra


@pytest.mark.parametrize("seed", range(2))
def test_a_random_model_of_experts(seed):
    expected, _, _ = steps(seed, [*SHARED, *[Experts] * 20], "in_place")
    for mode in ("on_entry", "paired"):
        found, _, _ = steps(seed, [*SHARED, *[Experts] * 20], mode)
        assert found == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)

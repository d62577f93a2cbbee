"""Logits that wait are logits: whatever is written into them, through whatever view, is seen."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokernels as zk

ROWS, LENGTH, VOCABULARY = 3, 4, 8192  # the smallest vocabulary whose logits wait


class Model(nn.Module):
    def __init__(self, inside=None, bias=False):
        super().__init__()
        self.words, self.body = nn.Embedding(64, 8), nn.Linear(8, 8)
        self.head, self.inside = nn.Linear(8, VOCABULARY, bias=bias), inside

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        logits = self.head(self.body(self.words(x)))
        return logits if self.inside is None else self.inside(logits)


def setting(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model(**options).to(dtype)
    return model, torch.randint(64, (ROWS, LENGTH))


def losses(model, closure):
    found = {}
    for name, how in (
        ("in_place", dict(perturb="in_place")),
        ("whole", dict(lazy_logits=False)),
        ("on_entry", {}),
        ("paired", dict(perturb="paired")),
    ):
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=1, **how)
        found[name] = (float(opt.step(closure)), opt.projected_gradients[0])
    return found


def assert_same(found, rounding=1e-5):
    # A loss of about 9 by sums in another order; a slope is a difference over 2 ε = 0.02.
    for name, (loss, slope) in found.items():
        assert loss == pytest.approx(found["in_place"][0], abs=rounding), name
        assert slope == pytest.approx(found["in_place"][1], abs=rounding / 0.01), name


def loss_of(logits, x):
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), x[:, 1:].reshape(-1))


def set_words(t):
    t[..., 64:] = float("-inf")


def divide(t):
    t /= 4.0


def through_a_slice(t):
    t[:, 1:].mul_(0.5)


def through_a_view(t):
    t.view(-1, VOCABULARY).clamp_(-0.1, 0.1)


def through_a_view_of_a_part(t):
    t[:, :-1].transpose(1, 2).add_(torch.arange(64.0).repeat(128)[None, :, None])


def through_one_position(t):
    t[:, 0].unsqueeze(1).div_(8)


def through_data(t):
    t.data.masked_fill_(torch.arange(VOCABULARY) > 100, -1.0)


def by_a_flag(t):
    F.relu(t, inplace=True)


def by_out(t):
    torch.mul(t, 0.25, out=t)


def by_an_index(t):
    t.index_fill_(2, torch.tensor([1, 5]), -3.0)


def by_chunks(t):
    for k, piece in enumerate(t.chunk(2, dim=-1)):
        piece.mul_(1.0 + k)


WRITES = [
    set_words, divide, through_a_slice, through_a_view, through_a_view_of_a_part,
    through_one_position, through_data, by_a_flag, by_out, by_an_index, by_chunks,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", ["closure", "model"])
def test_a_write_is_seen(write, where):
    def written(logits):
        write(logits)
        return logits

    model, x = setting(inside=written if where == "model" else None)

    def closure():
        logits = model(x)
        if where == "closure":
            write(logits)
        return loss_of(logits, x)

    assert_same(losses(model, closure))


@pytest.mark.parametrize("first", [True, False], ids=["view before", "view after"])
def test_a_view_that_was_taken_before_a_write_sees_it(first):
    model, x = setting(bias=True)

    def closure():
        logits = model(x)
        view = logits[:, :-1] if first else None
        flat = logits.view(-1, VOCABULARY) if first else None
        logits.mul_(3.0)
        view = logits[:, :-1] if view is None else view
        flat = logits.view(-1, VOCABULARY) if flat is None else flat
        return loss_of(logits, x) + view.amax(-1).mean() + flat.logsumexp(-1).mean()

    assert_same(losses(model, closure), rounding=3e-5)


def test_a_copy_that_was_taken_before_a_write_does_not_see_it():
    model, x = setting(torch.bfloat16)

    def closure():
        logits = model(x)
        wide = logits.float()
        logits.mul_(3.0)
        wide.div_(2.0)
        return loss_of(logits, x) + loss_of(wide, x)

    # The sums of a product of bfloat16 are rounded to 8 bits.
    assert_same(losses(model, closure), rounding=4e-3)


def test_a_write_of_one_closure_is_not_seen_by_the_next():
    model, x = setting()

    def closure():
        logits = model(x)
        before = loss_of(logits, x)
        logits.zero_()
        return before + loss_of(logits, x)

    assert_same(losses(model, closure))


def test_hidden_states_that_are_written_after_the_head_are_a_sentence():
    class Writes(Model):
        def forward(self, x):
            hidden = self.body(self.words(x))
            logits = self.head(hidden)
            hidden.zero_()
            return logits

    torch.manual_seed(0)
    model, x = Writes(), torch.randint(64, (ROWS, LENGTH))
    with pytest.raises(RuntimeError, match="lazy_logits=False"):
        zk.ZOSGD(model, lr=0.0).step(lambda: loss_of(model(x), x))
    zk.ZOSGD(model, lr=0.0, lazy_logits=False).step(lambda: loss_of(model(x), x))


STEPS = {
    "slice": lambda t: t[:, : max(1, t.shape[1] - 1)],
    "tail": lambda t: t[:, 1:] if t.shape[1] > 1 else t,
    "rows": lambda t: t[1:] if t.shape[0] > 1 else t,
    "same": lambda t: t.contiguous(),
    "whole": lambda t: t[...],
    "detach": lambda t: t.detach(),
    "wide": lambda t: t.float(),
    "flat": lambda t: t.reshape(1, -1, VOCABULARY),
    "words": lambda t: t[..., 8:] if t.shape[-1] == VOCABULARY else t,
    "unsqueeze": lambda t: t.unsqueeze(0).squeeze(0),
    "write": lambda t: t.mul_(0.75),
    "set": lambda t: (t.__setitem__((slice(None), 0), 0.25), t)[1],
    "clone": lambda t: t.clone(),
}


@pytest.mark.parametrize("seed", range(12))
def test_random_views_and_writes(seed):
    pick = random.Random(seed)
    plan = [(pick.choice(list(STEPS)), pick.random()) for _ in range(7)]
    model, x = setting(bias=seed % 2 == 0)

    def closure():
        known, total = [model(x)], 0.0
        for name, at in plan:
            known.append(STEPS[name](known[int(at * len(known))]))
        for t in known:
            total = total + t.float().logsumexp(-1).mean() + 0.1 * t[..., -1].mean()
        return total

    # Some ten losses of about 9 are added.
    assert_same(losses(model, closure), rounding=1e-4)

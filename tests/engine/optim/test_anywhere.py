"""A model trains wherever and however its weights lie, to the bits of one in row-major order."""

import pytest
import torch
from anywhere import LAYOUTS, Net, There, plain, relaid
from conftest import same_bits
from torch import nn

import zokernels as zk
from zokernels.backends import reference
from zokernels.optim.forward import same_randomness

BITS = [
    torch.rand(p.shape, generator=torch.manual_seed(i)) < 0.7
    for i, p in enumerate(Net().parameters())
]
RULES = {
    "sgd": (zk.ZOSGD, {}),
    "sign": (zk.ZOSGDSign, dict(num_queries=2)),
    "momentum": (zk.ZOSGDMomentum, {}),
    "window": (zk.ZOSGDMomentum, dict(window=3)),
    "conservative": (zk.ZOSGDConservative, {}),
    "adam": (zk.ZOAdam, dict(bias_correction=True)),
    "amsgrad in 16 bits": (zk.ZOAdam, dict(state_dtype=torch.bfloat16)),
    "random mask": (zk.ZOSGD, dict(mask=zk.masks.Random(0.6, 4))),
    "small weights": (zk.ZOAdam, dict(mask=zk.masks.Magnitude(0.1))),
    "chosen weights": (zk.ZOSGDMomentum, {}),
    "sparsity": (zk.ZOSGD, dict(sparsity=0.3, resample_every=2)),
    "blocks": (zk.ZOSGD, dict(blocks="module")),
    "rank one": (zk.ZOSGD, dict(dist="rank1", num_queries=2)),
    "rank one adam": (zk.ZOAdam, dict(dist="rank1")),
    "signs": (zk.ZOSGD, dict(dist="rademacher", estimator="one_sided", maximize=True)),
}


def losses_of(model, numbers):
    """A closure that runs the model and gives the next of these losses."""
    numbers = iter(numbers)

    def closure():
        model()
        return next(numbers)

    return closure


SOME = [1.5, 1.25, 0.5, 0.75, 0.875, 0.25, 1.125, 0.375, 2.0] * 12


def trained(model, rule, mode, **options):
    make, own = RULES[rule]
    if rule == "chosen weights":
        pairs = zip(zk.masks.Bits(BITS).packed, model.parameters(), strict=True)
        packed = [b.as_subclass(There) if isinstance(p, There) else b for b, p in pairs]
        own = dict(mask=zk.masks.Bits(packed))
    opt = make(model, lr=0.02, eps=0.01, weight_decay=0.1, seed=7, perturb=mode, **own, **options)
    opt.step(losses_of(model, SOME))
    for _ in range(3):
        opt.step(losses_of(model, SOME[1:]))
    return opt


def assert_equal(model, twin):
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert same_bits(plain(p), plain(q[1])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["on_entry", "in_place"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", LAYOUTS)
def test_steps_have_the_bits_of_row_major_weights_on_one_device(where, rule, mode, dtype):
    rounding = "stochastic" if dtype is torch.bfloat16 else "nearest"
    start, twin, model = Net(dtype), Net(dtype), LAYOUTS[where](Net(dtype))
    placed = [(p.data_ptr(), p.stride(), p.device) for p in model.parameters()]
    opts = [trained(m, rule, mode, rounding=rounding) for m in (twin, model)]
    assert_equal(model, twin)
    assert not torch.equal(plain(model.large.weight), start.large.weight)
    # Where they lay they lie, and a state is saved as that of any model.
    assert placed == [(p.data_ptr(), p.stride(), p.device) for p in model.parameters()]
    mine, other = ({i: s for i, s in o.state_dict()["state"].items()} for o in opts[::-1])
    assert mine.keys() == other.keys()
    for i, state in mine.items():
        for name, t in state.items():
            if isinstance(t, torch.Tensor):
                assert t.is_contiguous() and torch.equal(plain(t), other[i][name])


class Exact(nn.Module):
    """Sums and products of small integers, exact in any order: its losses can't be rounded."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        for i, p in enumerate(self.net.parameters()):
            with torch.no_grad():
                p.copy_(torch.randint(-2, 3, p.shape, generator=torch.manual_seed(i)))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self):
        h = self.net.large(self.net.first(self.net.x)).flatten(1)
        h = self.net.wide(self.net.matrix(h) * self.net.norm.weight + self.net.norm.bias)
        return h.as_subclass(torch.Tensor).double().sum(1).mean() / 4096


MODES = {
    "on_entry": (zk.ZOSGD, dict(perturb="on_entry")),
    "in_place": (zk.ZOSGD, dict(perturb="in_place")),
    "forward gradient": (zk.ForwardGrad, {}),
    "forward gradient in place": (zk.ForwardGrad, dict(perturb="in_place")),
}


def exact_step(where, kind):
    make, own = MODES[kind]
    model = Exact()
    LAYOUTS.get(where, lambda net: net)(model.net)
    opt = make(model, lr=2.0**-10, eps=2.0**-3, dist="rademacher", seed=3, **own)
    with torch.backends.mkldnn.flags(enabled=False):
        loss = opt.step(model)
    return model, loss, opt.projected_gradients


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("where", LAYOUTS)
def test_a_forward_sees_the_same_weights_wherever_they_lie(where, kind):
    twin, expected, slopes = exact_step("row-major", kind)
    model, loss, found = exact_step(where, kind)
    assert loss == expected and found == slopes != [0.0]
    assert_equal(model, twin)


@pytest.mark.parametrize("where", LAYOUTS)
def test_both_parts_of_a_hybrid_train_wherever_they_lie(where):
    found = []
    for place in (lambda net: net, LAYOUTS[where]):
        model = Exact()
        place(model.net)
        opt = zk.HybridZO(
            model, lambda name: "first" in name or "wide" in name,
            lambda deep: torch.optim.SGD(deep, lr=2.0**-12),
            lr=2.0**-10, eps=2.0**-3, dist="rademacher",
        )  # fmt: skip
        with torch.backends.mkldnn.flags(enabled=False):
            opt.step(model)
        found.append(model)
    assert_equal(*found)


class Tied(nn.Module):
    """A language model whose head is its embedding, and all of its matrices transposed."""

    def __init__(self, transposed, width=32, words=700):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.hidden = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        for p in self.parameters():
            # Multiples of 1/8, so that a product of two layers is exact.
            p.data = (p.data * 8).round() / 8
            if transposed and p.dim() == 2:
                p.data = p.data.t().contiguous().t()

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.hidden(self.embed(ids)))


@pytest.mark.parametrize("mode", ["on_entry", "paired", "in_place"])
def test_a_transposed_embedding_and_head_train(mode, recwarn):
    ids, found = torch.arange(24).view(4, 6), []
    for transposed in (False, True):
        model = Tied(transposed)
        opt = zk.ZOSGD(model, lr=2.0**-12, eps=2.0**-3, dist="rademacher", perturb=mode)
        loss = opt.step(lambda model=model: model(ids).double().sum() / 4096)
        found.append((model, loss.item(), opt.projected_gradients))
    (twin, *expected), (model, *got) = found
    assert got == expected and got[1] != [0.0]
    assert not recwarn.list
    assert_equal(model, twin)


@pytest.mark.parametrize("mode", ["on_entry", "in_place"])
def test_a_model_may_be_laid_out_anew_between_two_steps(mode):
    model, twin = Net(), Net()
    opts = [zk.ZOAdam(m, lr=0.02, eps=0.01, perturb=mode) for m in (model, twin)]
    for after in (lambda m: m, relaid, lambda m: m.to(memory_format=torch.contiguous_format)):
        after(model)
        for opt, m in zip(opts, (model, twin), strict=True):
            opt.step(losses_of(m, SOME))
        assert_equal(model, twin)


def test_a_channels_last_convolution_gets_channels_last_values():
    model, seen = relaid(Net()), []
    large = model.large
    large.forward = lambda x: (
        seen.append((large.weight + 0).stride()) or large._conv_forward(x, large.weight, large.bias)
    )
    with zk.perturbed(model, 3, 0.5):
        model()
    assert seen == [large.weight.stride()]
    assert seen[0] != large.weight.contiguous().stride()


def test_a_device_takes_one_pass_and_what_is_not_row_major_one_each(monkeypatch):
    run, sizes = reference.add_noise, []
    monkeypatch.setattr(
        reference, "add_noise", lambda plan: sizes.append(len(plan.params)) or run(plan)
    )
    for where, expected in (("devices", [4, 5]), ("layouts", [1, 1, 1, 1, 5]), (None, [9])):
        model = LAYOUTS.get(where, lambda net: net)(Net())
        opt = zk.ZOSGD(model, lr=0.1, backend="reference")
        opt._update(opt.param_groups[0], list(range(9)), [3], [0.5])
        assert sorted(sizes) == expected
        sizes.clear()


@pytest.mark.parametrize("held", ["trained", "frozen"])
def test_dropout_is_replayed_on_every_device_of_the_model(held, monkeypatch):
    class Second(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 1))

    class Third(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 2))

    counters = {1: 40, 2: 50}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda on: counters[on.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, on: counters.update({on.index: s}))
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(2).as_subclass(Second))
    model.b = nn.Parameter(torch.ones(2).as_subclass(Third), requires_grad=held == "trained")
    params = [p for p in model.parameters() if p.requires_grad]
    with same_randomness(model, params) as replay:
        counters.update({1: 41, 2: 52})
        replay()
        assert counters == {1: 40, 2: 50}

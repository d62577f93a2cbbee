"""Block-wise: each block perturbed alone, and what it can't change not run again."""

import warnings

import pytest
import torch
from test_optim import Small, batch, state, unchanged
from torch import nn

import zokernels as zk
from zokernels.estimators import derive_seed
from zokernels.optim.blocks import by_layer


class Counted(nn.Module):
    """An embedding, six equal layers that count their runs, a head."""

    def __init__(self, layers=6):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.Linear(8, 11)
        self.runs = 0
        for layer in self.layers:
            layer.forward = self._counting(layer.forward)

    def _counting(self, forward):
        def run(h):
            self.runs += 1
            return forward(h)

        return run

    def forward(self, x, y):
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return nn.functional.cross_entropy(self.head(h), y)


X, Y = torch.arange(22) % 11, (torch.arange(22) * 3 + 1) % 11


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
def test_steps_equal_a_textbook_version(order, estimator):
    # Whole forwards, one block after the other, with the library's z: equal to the last bit.
    model, twin = Small().eval(), Small().eval()
    (x, y), lr, wd, eps, seed = batch(), 0.03, 0.2, 2e-3, 2**63 + 1
    two_sided = estimator == "two_sided"
    opt = zk.ZOSGD(
        model, lr=lr, eps=eps, weight_decay=wd, seed=seed, estimator=estimator,
        blocks="module", block_order=order,
    )  # fmt: skip
    named = [(i, p) for i, p in enumerate(twin.parameters()) if p.requires_grad]
    numbers = opt.param_groups[0]["blocks"]
    blocks = [
        [pair for pair, n in zip(named, numbers, strict=True) if n == block]
        for block in sorted(set(numbers))
    ]

    def moved(p, i, s, c, decay=1.0):
        z = zk.noise.gaussian(p.numel(), seed=s, stream=i).view_as(p)
        w = (p * torch.tensor(decay)).double()
        return (w + torch.tensor(c).double() * z.double()).float()

    for step in range(50):
        opt.step(lambda: model(x, y))
        updates, base = [], twin(x, y).item()
        for number, block in zip(sorted(set(numbers)), blocks, strict=True):
            s = derive_seed(seed, step, 0, block=number)
            stored, sides = [p.detach().clone() for _, p in block], []
            for side in (eps, -eps) if two_sided else (eps,):
                for (i, p), w in zip(block, stored, strict=True):
                    p.data = moved(w, i, s, side)
                sides.append(twin(x, y).item())
            for (_, p), w in zip(block, stored, strict=True):
                p.data = w
            d = (sides[0] - sides[1]) / 2 / eps if two_sided else (sides[0] - base) / eps
            new = [(p, moved(p.detach(), i, s, -lr * d, 1 - lr * wd)) for i, p in block]
            updates += new
            if order == "sequential":
                for p, w in new:
                    p.data = w
                base = twin(x, y).item()
        for p, w in updates:
            p.data = w
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_a_sweep_runs_about_half_of_the_layers(order):
    n = 12
    model = Counted(n)
    opt = zk.ZOSGD(model, lr=1e-3, blocks="layer", block_order=order)
    opt.step(lambda: model(X, Y))
    model.runs = 0
    opt.step(lambda: model(X, Y))
    # Embeddings, n layers, head, two forwards each: whole, they would run 2n (n + 2) layers.
    assert model.runs <= 0.62 * 2 * n * (n + 2)
    assert model.runs >= 2 * sum(range(1, n + 1))


@pytest.mark.hf
@pytest.mark.parametrize("name", ["opt", "llama", "roberta", "gpt2"])
def test_each_family_goes_by_embeddings_layers_and_head(name):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    small = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    config = {
        "opt": lambda: transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **small),
        "llama": lambda: transformers.LlamaConfig(intermediate_size=32, **small),
        "roberta": lambda: transformers.RobertaConfig(intermediate_size=32, **small),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2),
    }[name]()
    torch.manual_seed(0)
    kind = "AutoModelForMaskedLM" if name == "roberta" else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_config(config).eval()
    numbers = by_layer(model)
    assert sorted(set(numbers.values())) == [0, 1, 2, 3, 4]
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for whole in (False, True):
        model.load_state_dict(results[0][1] if results else model.state_dict())
        start = {k: v.clone() for k, v in model.state_dict().items()}
        opt = zk.ZOSGD(model, lr=0.0, blocks="layer", seed=3)
        if whole:
            opt._perturbers.prefix.off = "a test wants whole forwards"
        with warnings.catch_warnings():
            # That forwards run whole is said by a warning, and would be wrong here.
            warnings.simplefilter("error")
            opt.step(lambda: model(input_ids=ids, labels=ids).loss)
        results.append((opt.projected_gradients, start))
    assert len(results[0][0]) == 5
    assert results[0][0] == results[1][0]


def test_a_list_and_a_function_say_the_blocks():
    model = Small()
    first, second = list(model.first.parameters()), list(model.second.parameters())
    rest = [
        p for p in model.parameters()
        if p.requires_grad and not any(p is q for q in (*first, *second))
    ]  # fmt: skip
    lists = zk.ZOSGD(model, blocks=[first, second, rest]).param_groups[0]["blocks"]
    named = zk.ZOSGD(
        model, blocks=lambda name: name.split(".")[0] if name[0] in "fs" else "rest"
    ).param_groups[0]["blocks"]
    assert len(set(lists)) == 3
    assert len(set(named)) >= 3
    assert all(isinstance(n, int) for n in (*lists, *named))


@pytest.mark.parametrize("masked", [False, True], ids=["whole two-sided", "masked one-sided"])
def test_the_mean_of_many_estimates_is_the_gradient(masked):
    # On a quadratic: a step of lr 1 along the mean of 2,500 estimates for each of two blocks.
    generator, runs = torch.Generator().manual_seed(0), 2_500
    a, b = (nn.Parameter(torch.randn(5, generator=generator)) for _ in range(2))
    scale = torch.tensor([1.0, 2.0, 0.5, 1.5, 0.25])
    start = torch.stack([a, b]).detach()
    expected = torch.stack([2 * scale * a + b, a + b]).detach()
    if masked:
        kept = torch.stack([zk.noise.mask(5, 0.6, seed=5, stream=i) for i in range(2)])
        assert 0 < kept.sum() < 10
        expected = expected * kept
    opt = zk.ZOSGD(
        [a, b], lr=1.0, eps=1e-2, blocks=[[a], [b]], block_order="simultaneous", num_queries=runs,
        estimator="one_sided" if masked else "two_sided", seed=1,
        mask=zk.masks.Random(0.6, seed=5) if masked else None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: (scale * a**2 + a * b + b**2 / 2).sum())
    found = start - torch.stack([a, b]).detach()
    # (g·z) zᵢ has the variance |g|² + gᵢ², g being the block's gradient. What eps adds to it
    # one-sided is of the order of its square, and what the losses' rounding adds is 1e-4.
    error = ((expected.square().sum(1, keepdim=True) + expected.square()) / runs).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-5).all()


class Winding(nn.Module):
    """Layers that run twice, write into their input, or are skipped; a tied, a passed-by weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.layers[3].requires_grad_(False)

    def forward(self, x, y):
        h = self.embed(x)[None]
        kept = []
        for i in (2, 0, 1, 0, 3):
            out = self.layers[i](h)
            kept.append(out)
            h = out.tanh_().add_(h)
        h = self.norm(self.encoder[0](h) + kept[0] + kept[3])
        return nn.functional.cross_entropy(self.head(h)[0], y)


@pytest.mark.parametrize("mode", ["on_entry", "in_place"])
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.parametrize("rule", ["two_sided", "one_sided", "conservative", "forward"])
def test_what_is_not_run_again_changes_no_bit(rule, order, mode):
    more = dict(eps=0.03, perturb=mode)
    if rule == "one_sided":
        more["estimator"] = "one_sided"
    kind = {"conservative": zk.ZOSGDConservative, "forward": zk.ForwardGrad}.get(rule, zk.ZOSGD)
    results = []
    for whole in (False, True):
        model = Winding().eval()
        opt = kind(
            model, lr=0.05, blocks="module", block_order=order, num_queries=2, weight_decay=0.1,
            seed=8, **more,
        )  # fmt: skip
        if whole:
            opt._perturbers.prefix.off = "a test wants whole forwards"
        losses = [opt.step(lambda model=model: model(X, Y)).item() for _ in range(4)]
        assert (opt._perturbers.prefix.off is None) != whole
        results.append((losses, state(model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])


class Router(Counted):
    """Its loss needs what its layers leave elsewhere, as a mixture's needs its router's logits."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        for layer in self.layers:
            layer.forward = self._leaving(layer.forward)

    def _leaving(self, forward):
        def run(h):
            out = forward(h)
            self.left.append(out.square().mean())
            return out

        return run

    def forward(self, x, y):
        self.left = []
        loss = super().forward(x, y)
        return loss + (torch.stack(self.left).sum() if self.fails else sum(self.left))


class Listing:
    """A cache that every layer adds to in its turn, and that does not know its length."""

    def __init__(self):
        self.states = []

    def get_seq_length(self):
        return None


class Filling(Counted):
    def _counting(self, forward):
        def run(h, cache, i):
            cache.states.append(h)
            return forward(cache.states[i])

        return run

    def forward(self, x, y):
        h, cache = self.embed(x), Listing()
        for i, layer in enumerate(self.layers):
            h = h + layer(h, cache, i).tanh()
        return nn.functional.cross_entropy(self.head(h), y)


def test_layers_that_fill_a_cache_of_unknown_length_run_whole():
    model, twin = Filling(), Counted()
    opt = zk.ZOSGD(model, lr=0.01, blocks="layer")
    other = zk.ZOSGD(twin, lr=0.01, blocks="layer")
    with pytest.warns(UserWarning, match="run whole.*goes on from a cache"):
        opt.step(lambda: model(X, Y))
    other.step(lambda: twin(X, Y))
    assert opt.projected_gradients == other.projected_gradients


@pytest.mark.parametrize("fails", [True, False])
def test_layers_that_do_more_run_whole_and_it_is_said_once(fails):
    model, twin = Router(fails), Router(fails)
    opt = zk.ZOSGD(model, lr=0.01, blocks="layer")
    other = zk.ZOSGD(twin, lr=0.01, blocks="layer")
    other._perturbers.prefix.off = "a test wants whole forwards"
    with pytest.warns(UserWarning, match="run whole.*do more") as said:
        for _ in range(3):
            opt.step(lambda: model(X, Y))
            other.step(lambda: twin(X, Y))
    assert len(said) == 1
    assert opt.projected_gradients == other.projected_gradients
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_an_exception_leaves_whole_updates_only(order):
    model, (x, y), calls = Small().eval(), batch(), 0
    before = state(model)

    def closure():
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyError
        return model(x, y)

    opt = zk.ZOSGD(model, lr=0.1, blocks="module", block_order=order)
    with pytest.raises(KeyError):
        opt.step(closure)
    changed = unchanged(model, before)
    assert changed == [] if order == "simultaneous" else len(changed) < len(before)


def test_given_parameters_only_it_says_that_forwards_run_whole():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = zk.ZOSGD([a, b], lr=0.1, blocks=[[a], [b]])
    with pytest.warns(UserWarning, match="run whole.*pass the module"):
        opt.step(lambda: (a * b).sum())


def test_blocks_are_plain_numbers_in_a_state_dict(tmp_path):
    model, (x, y) = Small().eval(), batch()
    opt = zk.ZOSGD(model, lr=0.1, blocks="module")
    opt.step(lambda: model(x, y))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    other = zk.ZOSGD(Small(), lr=0.1, blocks="module")
    other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert other.param_groups[0]["blocks"] == opt.param_groups[0]["blocks"]


BAD = {
    "name": (lambda m: "rows", TypeError, "'layer', 'module'"),
    "missing": (lambda m: [list(m.first.parameters())], ValueError, "in none of the 1 blocks"),
    "twice": (
        lambda m: [list(m.parameters()), list(m.first.parameters())],
        ValueError,
        "in one only",
    ),
    "no layers": (lambda m: "layer", ValueError, "has none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_blocks_get_a_sentence(name):
    make, error, words = BAD[name]
    model = Small()
    with pytest.raises(error, match=words):
        zk.ZOSGD(model, blocks=make(model))


def test_an_unknown_order_gets_a_sentence():
    with pytest.raises(ValueError, match="sequential, simultaneous"):
        zk.ZOSGD(Small(), blocks="module", block_order="random")

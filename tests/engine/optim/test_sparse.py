"""Sparse ZO: the threshold, the shares, and the same mask in the perturbations and the update."""

import math

import pytest
import torch
from conftest import bits
from test_optim import APART, MODES, Small, batch, state, unchanged
from test_rules import RULES, Odd
from textbook import Textbook
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zokernels as zk
from zokernels.estimators import SPARSITY, derive_seed
from zokernels.optim import selection


def weights(dtype, sizes=(0, 1, 257, 1000), seed=0):
    """Weights of several scales, with zeros and repeats."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=generator) * 0.3**i for i, n in enumerate(sizes)]
    made[2][::3] = 0.0
    made[3][::5] = -0.001
    return [w.to(dtype) for w in made]


@pytest.mark.parametrize("share", [1e-9, 0.05, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_threshold_is_that_of_sorting(dtype, share, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 100)
    tensors = weights(dtype)
    every = torch.cat([t.abs().double() for t in tensors]).sort().values
    expected = every[max(1, round(share * len(every))) - 1].item()
    assert selection.magnitude_at(tensors, share) == expected
    for t in tensors:
        count = (t.double().abs() <= expected).sum().item()
        assert selection.share_at_most(t, expected) == count / max(1, t.numel())


def test_subnormal_and_neighbouring_magnitudes_are_told_apart():
    w = torch.tensor([1e-45, -3e-45, 1.0, 1.0 + 2.0**-23, -1.0 - 2.0**-22])
    assert [selection.magnitude_at([w], k / 5) for k in range(1, 6)] == w.abs().tolist()
    wide = torch.tensor([1.0 + 2.0**-52, -1.0], dtype=torch.float64)
    assert selection.magnitude_at([wide], 0.5) == 1.0


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes, but views of a given one."""

    def __init__(self, given):
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.given:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_more_weights_than_quantile_takes_and_no_copy_of_them():
    w = torch.rand(2**24 + 12345, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        torch.quantile(w.float(), 0.2)
    with Largest(w) as seen:
        found = selection.magnitude_at([w], 0.2)
    # A chunk of 2²⁰ as int64 is what bincount takes, and some room.
    assert 0 < seen.bytes <= 2**20 * 8
    assert found == w.kthvalue(round(0.2 * w.numel())).values.item()


@pytest.mark.parametrize("bad", [[torch.empty(0)], [torch.full((4,), math.nan)]])
def test_nothing_to_judge_is_refused(bad):
    with pytest.raises(ValueError, match="empty|finite"):
        selection.magnitude_at(bad, 0.5)


class Uneven(nn.Module):
    """Layers of very different magnitudes, and a norm whose weights are all equal."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
        for i, layer in enumerate(self.layers):
            layer.weight.data *= 2.0**i
        self.norm = nn.LayerNorm(64)
        self.to(dtype)

    def forward(self, x):
        return self.norm(self.layers(x)).square().mean()


@pytest.mark.parametrize("sparsity", [0.01, 0.2, 0.75])
def test_the_expected_and_the_realised_share_are_the_stated_one(sparsity):
    model = Uneven()
    opt = zk.ZOSGD(model, sparsity=sparsity, seed=3)
    found = opt.sparsity_report()
    n = sum(p.numel() for p in model.parameters())
    pruned = sum((p.abs().double() <= found.threshold).sum().item() for p in model.parameters())
    assert found.asked == sparsity and found.stated == pruned / n
    # Of the 25,000 weights the norm's 64 zeros are the only ties.
    assert abs(found.stated - sparsity) <= 65 / n
    assert abs(found.expected - found.stated) < 2.0**-16
    assert 0 < abs(found.realised - found.expected) < 5 * found.deviation
    keeps = opt.param_groups[0]["mask"]["keep"]
    assert keeps[:6] == sorted(keeps[:6]) and keeps[0] < keeps[5]
    # What is reported is what the passes do.
    before = [p.detach().clone() for p in model.parameters()]
    opt.param_groups[0]["lr"] = 1.0
    opt.step(lambda: model(torch.ones(3, 64)) * 1e3)
    still = sum((p == b).sum().item() for p, b in zip(model.parameters(), before, strict=True))
    assert still / n == pytest.approx(found.realised, abs=1e-12)


def test_ties_at_the_threshold_count_as_pruned():
    a, b = nn.Parameter(torch.full((60,), 0.5)), nn.Parameter(torch.arange(1.0, 41.0))
    report = zk.ZOSGD([a, b], sparsity=0.2).sparsity_report()
    assert report.threshold == 0.5 and report.stated == 0.6
    assert report.expected == report.realised == 0.6 and report.deviation == 0


@pytest.mark.parametrize("name", [name for name in RULES if name != "conservative"])
def test_the_rules_follow_the_paper_with_a_redrawn_mask(name):
    make, rule, own = RULES[name]
    h, every, share = dict(lr=0.01, eps=2e-3, weight_decay=0.1, **own), 4, 0.3
    common = dict(seed=21, estimator="two_sided", dist="gaussian", maximize=False)
    model, twin = Odd(torch.float32), Odd(torch.float32)
    params = [(i, p, h) for i, p in enumerate(twin.parameters()) if p.requires_grad]
    judged = torch.cat([p.detach().abs().flatten() for _, p, _ in params]).sort().values
    threshold = judged[round(share * len(judged)) - 1]
    keeps = [1 - ((p.abs() <= threshold).sum().item() / max(1, p.numel())) for _, p, _ in params]
    masks = lambda t: (keeps, derive_seed(21, t // every, 0, SPARSITY))  # noqa: E731
    opt = make(model, num_queries=3, sparsity=share, resample_every=every, **h, **common)
    book = Textbook(rule, params, twin, q=3, masks=masks, **common)
    for t in range(10):
        opt.step(model)
        book.step(t)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("mask", ["sparsity", "magnitude", "bits"])
@pytest.mark.parametrize("mode", APART)
def test_both_sides_and_the_update_see_one_mask(mode, mask):
    model = Uneven(torch.bfloat16)
    generator = torch.Generator().manual_seed(8)
    given = {
        "sparsity": dict(sparsity=0.4),
        # ε is of the weights' own size: a mask judged on perturbed weights would flip.
        "magnitude": dict(mask=zk.masks.Magnitude([0.05 * 2.0**i for i in range(8)])),
        "bits": dict(
            mask=zk.masks.Bits(
                [torch.rand(p.shape, generator=generator) < 0.5 for p in model.parameters()]
            )
        ),
    }[mask]
    opt = zk.ZOSGDMomentum(model, lr=0.5, eps=0.25, num_queries=2, perturb=mode, **given)
    before, seen = model.layers[1].weight.detach().clone(), []

    def closure():
        # Put first, it looks before the optimizer's own hook restores the weights.
        handle = model.layers[1].register_forward_hook(
            lambda m, *_: seen.append(m.weight.detach().clone()), prepend=True
        )
        try:
            return model(torch.ones(3, 64, dtype=torch.bfloat16) / 7) * 1e4
        finally:
            handle.remove()

    opt.step(closure)
    seen.append(model.layers[1].weight.detach().clone())
    moved = [w != before for w in seen]
    # ε z is lost to rounding in few weights: the sides agree in all but those.
    for other in moved[1:]:
        assert (moved[0] != other).float().mean() < 0.05
    share = moved[0].float().mean()
    assert 0.1 < share < 0.9 and all((m & ~allowed(opt, before, mask)).sum() == 0 for m in moved)


def allowed(opt, before, mask):
    plain = opt.param_groups[0]["mask"]
    if mask == "magnitude":
        return before.abs() <= plain["threshold"][1]
    every = torch.zeros(before.numel())
    one = zk.masks.take(zk.masks.from_plain(plain), [1])
    zk.ops.add_noise_([every], [0], [1.0], streams=[1], dist="rademacher", mask=one)
    return every.view_as(before) != 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resume_at", [3, 4, 5])
@pytest.mark.parametrize("kind", ["sparsity", "magnitude", "bits"])
def test_a_resumed_run_goes_on_bit_for_bit(kind, resume_at, mode, tmp_path):
    x, y = batch()
    given = {
        "sparsity": dict(sparsity=0.3, resample_every=4),
        "magnitude": dict(mask=zk.masks.Magnitude(0.2)),
        "bits": dict(
            mask=zk.masks.Bits([torch.arange(p.numel()) % 3 > 0 for p in parameters(Small())])
        ),
    }[kind]
    kw = dict(lr=0.05, eps=1e-2, seed=9, num_queries=2, **given)
    model = Small()
    opt = zk.ZOSGDMomentum(model, perturb=mode, **kw)
    for _ in range(resume_at):
        opt.step(lambda: model(x, y))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    twin = Small()
    twin.load_state_dict(model.state_dict())
    # The weights have moved since they were judged: the masks must come from the file.
    resumed = zk.ZOSGDMomentum(twin, perturb=mode, **{**kw, "lr": 1.0})
    resumed.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for _ in range(6):
        assert torch.equal(opt.step(lambda: model(x, y)), resumed.step(lambda: twin(x, y)))
    assert unchanged(twin, state(model)) == []


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_the_mask_is_drawn_again_every_r_steps_and_not_between():
    model = Uneven()
    opt, seeds = zk.ZOSGD(model, sparsity=0.2, resample_every=3), []
    for _ in range(7):
        opt.step(lambda: model(torch.ones(64)))
        seeds.append(opt.param_groups[0]["mask"]["seed"])
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[5] != seeds[6] != seeds[0]


def test_a_group_that_joins_is_judged_by_the_threshold_of_the_others():
    a, b = nn.Parameter(torch.arange(1.0, 11.0)), nn.Parameter(torch.arange(1.0, 5.0))
    opt = zk.ZOSGD([a], sparsity=0.2)
    opt.add_param_group({"params": [b], "sparsity": 0.9})
    assert [g["mask"]["keep"] for g in opt.param_groups] == [[0.8], [0.5]]
    c = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="one of the two"):
        opt.add_param_group({"params": [c], "mask": zk.masks.Random(0.5, 1)})
    assert len(opt.param_groups) == 2


BAD = {
    "above 1": (dict(sparsity=1.5), "sparsity is 1.5"),
    "0": (dict(sparsity=0.0), "between 0 and 1"),
    "NaN": (dict(sparsity=math.nan), "sparsity is nan"),
    "with a mask": (dict(sparsity=0.2, mask=zk.masks.Random(0.5, 1)), "one of the two"),
    "resample": (dict(sparsity=0.2, resample_every=0), "at least 1 step"),
    "resample nothing": (dict(resample_every=10), "no sparsity"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name):
    change, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        zk.ZOSGD([nn.Parameter(torch.ones(4))], **change)


def test_without_sparsity_there_is_nothing_to_report():
    with pytest.raises(ValueError, match="no sparsity"):
        zk.ZOSGD([nn.Parameter(torch.ones(4))]).sparsity_report()

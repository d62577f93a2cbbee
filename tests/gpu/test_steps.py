"""Whole steps on a GPU: every mode, a log that a CPU replays, and weights that nothing moves."""

import copy
import itertools

import pytest
import torch
from device import DEVICE, DRY, assert_same, marks, some
from test_replay import TOKENS, Net
from tiny import models

import zokernels as zk
from zokernels.perturb import Direction, Move, OnEntry

pytestmark = marks
hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

MODES = ["in_place", "on_entry", "paired"]
FAMILIES = ["opt", "llama", "bert-mlm"]


def model_of(family, dtype=torch.float32):
    torch.manual_seed(0)
    return few_trained(models()[family]()).to(dtype).eval()


def few_trained(model):
    """Tried out, three tensors in the middle are trained: each takes a program of its own."""
    trained = list(model.parameters())
    for p in trained[: len(trained) // 2] + trained[len(trained) // 2 + 3 :]:
        p.requires_grad_(not DRY)
    return model


def batch_on(device):
    ids = torch.randint(5, 30, (4, 12), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def step_of(model, mode, device, **options):
    batch = batch_on(device)
    opt = zk.ZOSGD(model, **{"lr": 1e-2, "eps": 1e-2, "seed": 5, "perturb": mode, **options})
    return opt, lambda: opt.step(lambda: model(**batch).loss)


@pytest.mark.parametrize("sides", [(1,), (1, -1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16, torch.float16], 1), ids=str)
def test_a_forward_sees_the_cpus_weights(dtype, sides):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(130, 130), torch.nn.LayerNorm(130)).to(dtype)
    weights = [p.detach().clone() for p in model.parameters()]
    params, streams = list(model.to(DEVICE).parameters()), [7, 0, 2**32 - 1, 3]
    layers = OnEntry(model, params)
    for seed, eps in ((3, 1e-3), (2**64 - 1, 1e-2), (4, 1e-2)):
        lanes = [
            Direction(params, streams, [Move((side * eps,))] * 4, [seed], backend="triton")
            for side in sides
        ]
        with layers.standing(lanes) as entry:
            found = [[v.clone() for v in entry.filler.values([i])[0]] for i in range(4)]
        for lane, side in enumerate(sides):
            expected = [torch.empty_like(w) for w in weights]
            zk.ops.add_noise(weights, expected, [seed], [side * eps], streams=streams)
            assert_same(expected, [values[lane] for values in found])


@pytest.mark.parametrize("family, mode", some(itertools.product(FAMILIES, MODES), 4))
def test_a_step_has_the_cpus_losses(family, mode):
    base = model_of(family)
    found = []
    for device, backend in (("cpu", None), (DEVICE, "triton")):
        model = copy.deepcopy(base).to(device)
        opt, step = step_of(model, mode, device, backend=backend)
        found.append((step().item(), opt.projected_gradients[0], opt))
    (loss, slope, _), (loss_there, slope_there, opt) = found
    # A loss is rounded in its last places, by sums in another order, and a slope is a difference
    # of two over 2 ε = 0.02.
    assert loss_there == pytest.approx(loss, rel=1e-5)
    assert slope_there == pytest.approx(slope, abs=4e-3)
    assert opt.perturb == mode


@pytest.mark.parametrize("dist", ["rademacher" if DRY else "gaussian", "rank1"])
@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16], 1), ids=str)
def test_every_mode_has_the_same_slope(dtype, dist):
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=50 if DRY else 9000, hidden_size=16 if DRY else 64, num_hidden_layers=1,
        num_attention_heads=4, ffn_dim=32 if DRY else 128, word_embed_proj_dim=16 if DRY else 64,
        max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    model = few_trained(hf.OPTForCausalLM(config)).to(DEVICE, dtype).eval()
    ids = torch.randint(3, config.vocab_size, (3, 12), device=DEVICE)
    before = [p.clone() for p in model.parameters()]
    slopes = []
    for mode in MODES:
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=5, perturb=mode, dist=dist, backend="triton")
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
        slopes += opt.projected_gradients
    # The loss is rounded in its last places, and a slope is a difference over 2 ε.
    rounding = 1e-3 if dtype is torch.float32 else 0.3
    assert slopes[1:] == pytest.approx(slopes[:1] * 2, abs=rounding)
    assert_same(before, list(model.parameters()))


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_weight_that_is_read_twice_and_too_large_to_keep_is_made_twice(mode, monkeypatch):
    from zokernels.perturb import filling

    # Of no size are weights small, or kept: as a tied embedding of a large model is not.
    monkeypatch.setattr(filling, "SMALL", 0)
    monkeypatch.setattr(filling, "_KEPT", 0)
    torch.manual_seed(0)
    one_of, x = torch.nn.Linear(8, 8, bias=False), torch.randn(2, 8, device=DEVICE)
    other = torch.nn.Linear(8, 8, bias=False)
    model = torch.nn.Sequential(one_of, torch.nn.Tanh(), other, one_of).to(DEVICE)
    slopes = []
    for one in ("in_place", mode):
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=5, perturb=one, backend="triton")
        for _ in range(4):
            opt.step(lambda: model(x).square().mean())
        slopes += opt.projected_gradients
    # The loss is rounded in its last places, and a slope is a difference over 2 ε.
    assert slopes[1] == pytest.approx(slopes[0], abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float16], 1), ids=str)
def test_two_hundred_steps_at_rate_0_change_no_bit(dtype, mode):
    model = model_of("opt", dtype).to(DEVICE)
    before = [p.clone() for p in model.parameters()]
    opt, step = step_of(model, mode, DEVICE, lr=0.0, backend="triton")
    for _ in range(2 if DRY else 200):
        step()
    assert opt.param_groups[0]["step"] == (2 if DRY else 200)
    assert_same(before, list(model.parameters()))


@pytest.mark.parametrize("dist", ["rank1", "gaussian"])
def test_members_in_the_rows_of_a_batch_are_what_each_is_by_itself(dist):
    model = model_of("llama").to(DEVICE)
    batch = {k: v for k, v in batch_on(DEVICE).items() if k != "labels"}
    opt = zk.ZOSGD(model, lr=0.0, eps=0.1, num_queries=2, estimator="population", dist=dist)

    def twice(first):
        # The second forward goes on from the first one's cache, with other words for each member.
        out = model(**first, use_cache=True)
        words = out.logits[:, -1:].argmax(-1)
        return model(input_ids=words, past_key_values=out.past_key_values).logits

    with opt.ask() as population:
        found = population.split(twice(population.repeat(batch)))
    for member, one in zip(opt.ask(), found, strict=True):
        with member:
            torch.testing.assert_close(one, twice(batch), rtol=1e-3, atol=1e-3)
    assert not torch.equal(*found)


RULES = {
    "plain": (zk.ZOSGD, torch.float32, dict(num_queries=2, weight_decay=0.1)),
    "stochastic": (zk.ZOSGD, torch.bfloat16, dict(rounding="stochastic", dist="rademacher")),
    "half": (zk.ZOSGD, torch.float16, dict(rounding="stochastic", estimator="one_sided")),
    "mask": (zk.ZOSGD, torch.bfloat16, dict(mask=zk.masks.Random(0.5, 7))),
    "population": (
        zk.ZOSGD,
        torch.bfloat16,
        dict(num_queries=3, estimator="population", normalize="std"),
    ),
    "sign": (zk.ZOSGDSign, torch.float32, dict(lr=1e-3)),
    "momentum": (zk.ZOSGDMomentum, torch.bfloat16, dict(state_dtype=torch.bfloat16)),
    "adam": (zk.ZOAdam, torch.float32, dict(lr=1e-3, weight_decay=0.1)),
    "rank1": (zk.ZOSGD, torch.bfloat16, dict(num_queries=2, dist="rank1", weight_decay=0.1)),
}


@pytest.mark.parametrize("name", some(RULES, 4))
def test_a_run_on_the_device_is_replayed_by_a_cpu(name, tmp_path):
    rule, dtype, options = RULES[name]
    if DRY:
        # An interpreted program of signs takes a third of one of normals.
        options = {"dist": "rademacher"} | options
    base = Net(dtype)
    model = copy.deepcopy(base).to(DEVICE)
    x, y = (t.to(DEVICE) for t in TOKENS)
    opt = rule(model, **{"lr": 1e-2, "eps": 1e-2, "seed": 3, "backend": "triton", **options})
    log = opt.record(tmp_path / "run")
    for _ in range(2 if DRY else 40):
        opt.step(lambda: model(x, y))
    log.close()
    again = copy.deepcopy(base)
    zk.replay(again, tmp_path / "run")
    assert_same(list(again.parameters()), list(model.parameters()))
    same = map(torch.equal, again.parameters(), base.parameters())
    assert list(same).count(False) >= 3

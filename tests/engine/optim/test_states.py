"""States of the rules: types, bits and counts, through files, other optimizers and bad losses."""

import math

import pytest
import torch
from conftest import bits
from test_optim import state, unchanged
from test_rules import RULES, Odd
from torch import nn

import zokernels as zk


def with_states(name, dtype, **own):
    model = Odd(dtype)
    opt = RULES[name][0](model, lr=1e-2, eps=1e-2, seed=7, **{**RULES[name][2], **own})
    return model, opt


def states(opt):
    tensors = torch.Tensor
    return [{k: t for k, t in s.items() if isinstance(t, tensors)} for s in opt.state.values()]


@pytest.mark.parametrize(
    "dtype, state_dtype, expected",
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["momentum", "amsgrad", "adam"])
def test_a_state_keeps_its_type_and_bits_through_a_file(
    name, dtype, state_dtype, expected, tmp_path
):
    model, opt = with_states(name, dtype, state_dtype=state_dtype)
    for _ in range(3):
        opt.step(model)
    names = {"momentum": {"m"}, "adam": {"m", "v"}, "amsgrad": {"m", "v", "v_max"}}[name]
    assert all(set(s) == names for s in states(opt))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    twin, resumed = with_states(name, dtype)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for a, b in zip(states(opt), states(resumed), strict=True):
        assert all(b[k].dtype is expected and torch.equal(bits(a[k]), bits(b[k])) for k in names)
    then = state(model)
    for _ in range(4):
        assert torch.equal(opt.step(model), resumed.step(twin))
    assert unchanged(twin, state(model)) == [] and unchanged(model, then) != []


@pytest.mark.parametrize("name", ["momentum", "amsgrad", "adam"])
def test_a_round_trip_within_the_process_shares_no_state(name):
    model, opt = with_states(name, torch.bfloat16)
    opt.step(model)
    twin, other = with_states(name, torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    before = [{k: t.clone() for k, t in s.items()} for s in states(other)]
    opt.step(model)
    for a, b in zip(before, states(other), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    # Loading one's own state, as accelerate does, copies nothing.
    held = [t.data_ptr() for s in states(other) for t in s.values()]
    other.load_state_dict(other.state_dict())
    assert held == [t.data_ptr() for s in states(other) for t in s.values()]


def test_a_run_can_go_on_with_another_rule():
    model = Odd(torch.float32)
    opt = zk.ZOSGD(model, lr=1e-3, seed=4)
    opt.step(model)
    after = zk.ZOAdam(model, betas=(0.5, 0.75))
    after.load_state_dict(opt.state_dict())
    after.step(model)
    group = after.param_groups[0]
    assert (group["betas"], group["seed"], group["step"], group["lr"]) == ((0.5, 0.75), 4, 2, 1e-3)
    assert all(set(s) == {"m", "v", "v_max"} for s in states(after))


LOST = {
    "states": (zk.ZOAdam, zk.ZOSGD),
    "states of the same name": (zk.ZOSGDMomentum, zk.ZOAdam),
    "sides": (zk.ZOSGD, zk.ForwardGrad),
    "an eps of 1": (zk.ForwardGrad, zk.ZOSGD),
    "a way to judge": (zk.ZOSGDConservative, zk.ZOSGDSign),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", LOST)
def test_a_state_of_another_rule_is_refused_and_changes_nothing(name, steps):
    saved, loads = LOST[name]
    model = Odd(torch.float32)
    opt, other = saved(model, lr=0.5), loads(model, lr=0.25)
    for _ in range(steps):
        opt.step(model)
    words = f"saved by {saved.__name__}.*mean nothing to {loads.__name__}"
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.25 and not other.state
    other.step(model)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_of_one_of_torchs_optimizers_is_refused(kind):
    model = Odd(torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = zk.ZOSGD(model)
    for state_dict in (kind(trained, lr=0.1).state_dict(), model.state_dict()):
        with pytest.raises(ValueError, match="not saved by an optimizer of zokernels"):
            opt.load_state_dict(state_dict)


@pytest.mark.parametrize("name", ["momentum", "amsgrad", "adam"])
def test_a_state_that_does_not_name_its_rule_is_known_by_its_numbers(name):
    # As older versions saved it, without the numbers that came later.
    model, opt = with_states(name, torch.float32)
    opt.step(model)
    older = opt.state_dict()
    del older["rule"]
    for group in older["param_groups"]:
        for later in ("state_dtype", "block_order", "window", "resample_every"):
            group.pop(later, None)
    twin, resumed = with_states(name, torch.float32)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(older)
    assert torch.equal(opt.step(model), resumed.step(twin))
    assert unchanged(twin, state(model)) == []
    with pytest.raises(ValueError, match="saved by another rule"):
        zk.ZOSGD(model).load_state_dict(older)


def test_a_class_derived_from_a_rule_goes_on_from_it():
    class Watched(zk.ZOAdam):
        pass

    model, opt = with_states("adam", torch.float32)
    opt.step(model)
    derived = Watched(model)
    derived.load_state_dict(opt.state_dict())
    assert derived.param_groups[0]["step"] == 1


@pytest.mark.hf
def test_accelerate_leaves_float32_states_of_bfloat16_weights_alone():
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    (model, opt), (twin, plain) = (with_states("adam", torch.bfloat16) for _ in range(2))
    for m, o in ((model, opt), (twin, plain)):
        o.step(m)
    accelerator.prepare(opt)
    assert any(t.any() for s in states(opt) for t in s.values())
    for _ in range(3):
        assert torch.equal(opt.step(model), plain.step(twin))
    assert all(t.dtype is torch.float32 for s in states(opt) for t in s.values())
    assert unchanged(twin, state(model)) == []


def test_a_step_with_a_bad_loss_leaves_states_and_adams_count_alone():
    model, opt = with_states("adam", torch.float32)
    opt.step(model)
    before = [{k: t.clone() for k, t in s.items()} for s in states(opt)]
    opt.step(lambda: math.nan)
    assert {s["step"] for s in opt.state.values()} == {1}
    for a, b in zip(before, states(opt), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_bias_correction_counts_the_updates_of_each_parameter():
    # At its first update a parameter moves by lr · sign(g), however late that is.
    a, b = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.zeros(9), requires_grad=False)
    opt = zk.ZOAdam([a, b], lr=0.01, amsgrad=False, bias_correction=True, adam_eps=0.0)
    for step in range(4):
        b.requires_grad_(step == 3)
        opt.step(lambda: (a + b).sum())
    assert [opt.state[p]["step"] for p in (a, b)] == [4, 1]
    assert torch.allclose(b.abs(), torch.full((9,), 0.01), rtol=1e-5)


@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
def test_bfloat16_states_follow_the_float32_ones(name):
    ends = []
    for kind in (torch.float32, torch.bfloat16):
        model, opt = with_states(name, torch.float32, state_dtype=kind)
        start = model.hidden.weight.detach().clone()
        for _ in range(40):
            opt.step(model)
        ends.append(model.hidden.weight.detach() - start)
    # A bfloat16 holds 8 bits: each m is off by up to 2⁻⁷ of itself, a walk's sum by less than
    # that on average; v_max, the running maximum of noisy v, is biased up by as much.
    assert 0 < (ends[0] - ends[1]).norm() < 0.03 * ends[0].norm()

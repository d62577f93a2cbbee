"""The model between two steps: parameters replaced, resized, thawed, frozen, gone."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokernels as zk
from zokernels.estimators import derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["on_entry", "paired", "in_place"]
RULES = {
    "sgd": zk.ZOSGD,
    "sign": zk.ZOSGDSign,
    "momentum": zk.ZOSGDMomentum,
    "momentum by a window": lambda model, **how: zk.ZOSGDMomentum(model, window=3, **how),
    "adam": zk.ZOAdam,
    "conservative": zk.ZOSGDConservative,
    "blocks": lambda model, **how: zk.ZOSGD(model, blocks="module", **how),
    "sparse": lambda model, **how: zk.ZOSGD(model, sparsity=0.3, **how),
    "hybrid": lambda model, **how: zk.HybridZO(
        model, lambda name: name < "2", lambda deep: torch.optim.Adam(deep, lr=1e-2), **how
    ),
    "forward gradient": zk.ForwardGrad,
}


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def closure_of(model):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=generator), torch.arange(8) % 3
    return lambda: F.cross_entropy(model(x), y)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, expected):
    return all(torch.equal(p, w) for p, w in zip(model.parameters(), expected, strict=True))


def slope_by_hand(model, closure, step, eps=1e-2):
    """Of the step's direction, with each weight moved from a copy."""
    seed, losses, before = derive_seed(0, step, 0), [], weights(model)
    with torch.no_grad():
        for side in (1, -1):
            for i, (p, w) in enumerate(zip(model.parameters(), before, strict=True)):
                z = zk.noise.gaussian(p.numel(), seed=seed, stream=i).view(p.shape)
                p.copy_(w + side * eps * z)
            losses.append(float(closure()))
        for p, w in zip(model.parameters(), before, strict=True):
            p.copy_(w)
    return (losses[0] - losses[1]) / (2 * eps)


def run(rule, replace, mode=None, first=2):
    """Weights after two more steps from weights that were loaded between two steps."""
    model = made()
    how = {} if mode is None else dict(perturb=mode)
    opt, closure = RULES[rule](model, lr=1e-2, weight_decay=0.1, **how), closure_of(model)
    for _ in range(first):
        opt.step(closure)
    best = {name: t * 1.5 for name, t in made().state_dict().items()}
    model.load_state_dict(best, assign=replace)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            opt.step(closure)
    return weights(model), [str(w.message) for w in said if "replaced" in str(w.message)]


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("rule", RULES)
def test_loaded_by_assignment_is_as_loaded_into_the_parameters(rule, first):
    expected, nothing = run(rule, replace=False, first=first)
    found, said = run(rule, replace=True, first=first)
    assert all(map(torch.equal, found, expected)) and not nothing
    (message,) = said
    assert "'0.weight' (and 3 more) was replaced" in message


@pytest.mark.parametrize("mode", MODES)
def test_it_is_so_in_every_mode(mode):
    found, said = run("momentum", replace=True, mode=mode)
    assert all(map(torch.equal, found, run("momentum", replace=False, mode=mode)[0]))
    assert len(said) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_new_head_of_another_size_is_trained(mode):
    model = made()
    opt, closure = zk.ZOSGD(model, lr=1e-2, eps=1e-2, perturb=mode), closure_of(model)
    opt.step(closure)
    model[2] = nn.Linear(9, 5)
    head, expected = model[2].weight.detach().clone(), slope_by_hand(model, closure, 1)
    with pytest.warns(UserWarning, match=r"'2.weight' \(and 1 more\) was replaced"):
        opt.step(closure)
    # The losses are of about 1 and differ by units of 2⁻²³ where sums are taken in another order.
    assert opt.projected_gradients[0] == pytest.approx(expected, abs=1e-4)
    assert not torch.equal(model[2].weight, head)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_grew_between_two_steps(mode, large):
    """Small ones lie side by side in scratch, a large one has its own."""
    torch.manual_seed(0)
    rows = 2300 if large else 5
    model = nn.Sequential(nn.Embedding(rows, 8), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    ids = torch.arange(5)
    opt = zk.ZOSGD(model, lr=1e-3, eps=1e-2, perturb=mode)

    def closure():
        return F.cross_entropy(model(ids), ids % 3)

    opt.step(closure)
    model[0].weight.data = torch.randn(rows + 9, 8)
    ids = ids + rows
    expected = slope_by_hand(model, closure, 1)
    opt.step(closure)
    assert opt.projected_gradients[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rule", ["momentum", "adam", "hybrid"])
def test_a_shape_that_its_state_does_not_have_is_refused(rule):
    model = made()
    opt, closure = RULES[rule](model, lr=1e-2), closure_of(model)
    opt.step(closure)
    model[2].weight = nn.Parameter(torch.zeros(5, 9))
    model[2].bias.data = torch.zeros(5)
    before, number = weights(model), opt.param_groups[0]["step"]
    with pytest.raises(RuntimeError, match=r"'2.weight' has the shape \(5, 9\).*opt.state.clear"):
        opt.step(closure)
    assert same(model, before) and opt.param_groups[0]["step"] == number
    if rule != "hybrid":
        opt.state.clear()
        with pytest.warns(UserWarning, match="replaced"):
            opt.step(closure)
        assert not same(model, before)


@pytest.mark.parametrize("rule", ["sgd", "adam", "forward gradient", "hybrid"])
def test_a_parameter_that_left_the_model_is_named(rule):
    model = made()
    opt, closure = RULES[rule](model, lr=1e-2), closure_of(model)
    opt.step(closure)
    model[0] = nn.Linear(6, 9, bias=False)
    before = weights(model)
    with pytest.raises(RuntimeError, match="'0.bias' of the optimizer is no longer in the model"):
        opt.step(closure)
    assert same(model, before)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_put_around_another_is_seen(mode):
    """The parameters stay and the modules do not."""
    model = made()
    opt, closure = zk.ZOSGD(model, lr=1e-2, eps=1e-2, perturb=mode), closure_of(model)
    opt.step(closure)
    twin = nn.Linear(9, 3)
    twin.weight, twin.bias = model[2].weight, model[2].bias
    model[2] = twin
    expected = slope_by_hand(model, closure, 1)
    opt.step(closure)
    assert opt.projected_gradients[0] == pytest.approx(expected, abs=1e-4)


def test_a_trajectory_refuses_what_it_can_not_know(tmp_path):
    for change in ("replaced", "resized"):
        model = made()
        opt, closure = zk.ZOSGD(model, lr=1e-2), closure_of(model)
        opt.record(tmp_path / f"{change}.zk")
        opt.step(closure)
        if change == "replaced":
            model[2].weight = nn.Parameter(torch.ones(3, 9))
        else:
            model[2].weight.data, model[2].bias.data = torch.ones(4, 9), torch.ones(4)
        before = weights(model)
        with pytest.raises(zk.TrajectoryError, match=f"'2.weight' was {change}.*begin a new one"):
            opt.step(closure)
        assert same(model, before)
        base = copy.deepcopy(model)
        opt.record(tmp_path / f"{change} again.zk")
        opt.step(closure)
        opt.trajectory.close()
        zk.replay(base, tmp_path / f"{change} again.zk")
        assert same(base, weights(model)) and not same(model, before)


def test_what_joined_later_is_replayed_with_its_own_noise(tmp_path):
    model = made()
    model[0].requires_grad_(False)
    opt = zk.ZOSGD(model, lr=1e-2)
    model.insert(0, nn.Linear(6, 6))
    opt.add_param_group({"params": list(model[0].parameters())})
    base = copy.deepcopy(model)
    opt.record(tmp_path / "run.zk")
    for _ in range(2):
        opt.step(closure_of(model))
    opt.trajectory.close()
    zk.replay(base, tmp_path / "run.zk")
    assert same(base, weights(model))


@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_train_is_said(rule):
    model = made()
    opt = RULES[rule](model, lr=1e-2)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter.*is trainable. Unfreeze.*add_param_group"):
        opt.step(closure_of(model))
    # The others train, but not here.
    model[1] = nn.Linear(9, 9)
    with pytest.raises(ValueError, match=r"'1.weight' \(and 1 more\) of the model is trainable"):
        opt.step(closure_of(model))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_thawed_later_is_named_once_and_trains_when_added(mode):
    model = made()
    model[0].requires_grad_(False)
    opt, closure = zk.ZOSGD(model, lr=1e-2, perturb=mode), closure_of(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opt.step(closure)
        model[0].requires_grad_(True)
        for _ in range(3):
            opt.step(closure)
    (message,) = [str(w.message) for w in said if "trainable" in str(w.message)]
    assert "'0.weight' (and 1 more)" in message and 'add_param_group({"params": [...]})' in message
    before = model[0].weight.detach().clone()
    opt.add_param_group({"params": list(model[0].parameters())})
    opt.step(closure)
    assert not torch.equal(before, model[0].weight)


def test_tied_weights_that_a_load_took_apart_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    opt = zk.ZOSGD(model, lr=1e-2)
    model.load_state_dict(model.state_dict(), assign=True)

    def closure():
        return model(torch.arange(3)).square().mean()

    with pytest.warns(UserWarning, match="'1.weight' lies in the memory of.*tie_weights"):
        opt.step(closure)
    model[1].weight = model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)


def test_what_was_left_out_on_purpose_is_not_named():
    model = made()
    opt = zk.ZOSGD(model[2].parameters(), lr=1e-2, model=model)
    hybrid = RULES["hybrid"](model, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            opt.step(closure_of(model))
            hybrid.step(closure_of(model))


def test_a_member_that_is_thawed_trains():
    model = made()
    model[0].requires_grad_(False)
    opt, closure = zk.ZOSGD(model.parameters(), lr=1e-2), closure_of(model)
    before = weights(model)
    opt.step(closure)
    assert torch.equal(before[0], model[0].weight)
    model[0].requires_grad_(True)
    opt.step(closure)
    assert not torch.equal(before[0], model[0].weight)


def test_a_captured_step_does_not_go_on_with_what_was_replaced():
    model = made()
    opt, closure = zk.ZOSGD(model, lr=1e-2), closure_of(model)
    step = zk.GraphedStep(opt, lambda _: closure(), {"x": torch.ones(1)}, capture=False)
    model[2].weight = nn.Parameter(torch.ones(3, 9))
    with (
        pytest.warns(UserWarning, match="'2.weight' was replaced"),
        pytest.raises(RuntimeError, match="new GraphedStep"),
    ):
        step({"x": torch.ones(1)})

"""What an optimizer is made of: modules and their generators, lists, and what no step can move."""

import copy
import warnings

import pytest
import torch
from torch import nn

import zokernels as zk

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


class Net(nn.Module):
    """A frozen layer between two, dropout, and a parameter of the root's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.frozen, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self):
        h = self.dropout(self.frozen(self.first(X).tanh()))
        return nn.functional.cross_entropy(self.last(h) * self.scale, Y)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def stepped(model, opt, steps=3):
    for _ in range(steps):
        opt.step(model)
    return weights(model)


GENERATORS = {
    "parameters": lambda m: m.parameters(),
    "named_parameters": lambda m: m.named_parameters(),
}


@pytest.mark.parametrize("kind", [zk.ZOSGD, zk.ZOAdam, zk.ForwardGrad])
@pytest.mark.parametrize("name", GENERATORS)
def test_the_line_of_every_torch_user_is_the_module_itself(name, kind):
    ends = []
    for given in (lambda m: m, GENERATORS[name]):
        model = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            opt = kind(given(model), lr=0.02, seed=4)
        assert opt.model is model and opt.perturb == "on_entry"
        ends.append(stepped(model, opt))
    assert all(map(torch.equal, *ends))


def test_frozen_parameters_stay_in_the_group_and_train_when_thawed():
    model = Net()
    opt = zk.ZOSGD(model.parameters(), lr=0.5)
    assert len(opt.param_groups[0]["params"]) == 7
    before = weights(model.frozen)
    stepped(model, opt, 1)
    assert all(map(torch.equal, before, weights(model.frozen)))
    model.frozen.requires_grad_(True)
    stepped(model, opt, 1)
    assert not any(map(torch.equal, before, weights(model.frozen)))


def test_a_part_of_a_model_and_its_own_parameters_only():
    model = Net()
    opt = zk.ZOSGD(model.last.parameters(), lr=0.1)
    assert opt.model is model.last
    before = weights(model)
    after = stepped(model, opt, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [n.startswith("last") for n, _ in model.named_parameters()]
    own = zk.ZOSGD(model.parameters(recurse=False), lr=0.1)
    assert own.model is model and own.param_groups[0]["params"] == [model.scale]


def test_a_way_of_perturbing_that_was_asked_for_is_kept():
    assert zk.ZOSGD(Net().parameters(), perturb="paired").perturb == "paired"
    assert zk.ZOSGD(Net().parameters(), perturb="in_place").perturb == "in_place"
    # A compiled model's generator is its own: hooks would be ignored, and that is said.
    with pytest.warns(UserWarning, match="compiled"):
        assert zk.ZOSGD(torch.compile(Net()).parameters()).perturb == "in_place"


LISTS = {
    "list": lambda m: list(m.parameters()),
    "filter": lambda m: filter(lambda p: p.requires_grad, m.parameters()),
    "generator": lambda m: (p for p in m.parameters() if p.requires_grad),
    "groups": lambda m: [{"params": m.first.parameters()}, {"params": m.last.parameters()}],
}


@pytest.mark.parametrize("name", LISTS)
def test_parameters_without_their_module_are_perturbed_in_place_and_it_is_said(name):
    model = Net()
    with pytest.warns(UserWarning, match=r"without their module.*ZOAdam\(model\)") as said:
        opt = zk.ZOAdam(LISTS[name](model), lr=0.1)
    assert opt.perturb == "in_place" and len(said) == 1
    # At the line that made it, whatever lies between.
    assert said[0].filename == __file__
    before = model.first.weight.detach().clone()
    stepped(model, opt, 1)
    assert not torch.equal(before, model.first.weight)


def test_who_asked_for_it_or_gave_the_module_hears_nothing():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zk.ZOSGD(list(model.parameters()), perturb="in_place")
        zk.ZOSGD([{"params": model.first.parameters()}], model=model)


def test_a_generator_that_has_begun_is_a_list_of_what_is_left():
    model = Net()
    generator = model.parameters()
    next(generator)
    with pytest.warns(UserWarning, match="without their module"):
        assert len(zk.ZOSGD(generator).param_groups[0]["params"]) == 6


def complex_one():
    model = Net()
    model.filter = nn.Parameter(torch.ones(4, dtype=torch.cfloat))
    return model


def eight_bits():
    model = Net()
    model.filter = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn))
    return model


def empty_weights():
    model = Net()
    model.filter = nn.Linear(3, 3, device="meta").weight
    return model


def made_for_inference():
    model = Net()
    with torch.inference_mode():
        model.filter = nn.Parameter(torch.ones(4))
    return model


REFUSED = {
    complex_one: (TypeError, "has type complex64.*view_as_real"),
    eight_bits: (TypeError, "has type float8_e4m3fn.*bfloat16"),
    empty_weights: (ValueError, "meta device.*model.to"),
    made_for_inference: (ValueError, "inference_mode.*copy.deepcopy"),
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("given", [lambda m: m, lambda m: m.parameters()], ids=["module", "list"])
def test_a_parameter_that_no_step_can_move_is_refused_by_name(make, given):
    error, words = REFUSED[make]
    model = make()
    with pytest.raises(error, match=f"Parameter 'filter' is trainable.*{words}"):
        zk.ZOSGD(given(model))
    model.filter.requires_grad_(False)
    stepped(model, zk.ZOSGD(given(model)), 1)


def test_of_a_list_it_is_refused_by_its_place_and_a_group_that_is_refused_does_not_join():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.cfloat))]
    with pytest.raises(TypeError, match="Parameter 1 is trainable"):
        zk.ZOSGD(params, perturb="in_place")
    opt = zk.ZOSGD(params[:1], perturb="in_place")
    with pytest.raises(TypeError, match="Parameter 0 is trainable"):
        opt.add_param_group({"params": params[1:]})
    assert len(opt.param_groups) == 1


def test_the_ways_that_the_refusals_name_work():
    with torch.inference_mode():
        built = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="inference_mode"):
        zk.ZOSGD(built)
    model = copy.deepcopy(built)
    zk.ZOSGD(model).step(lambda: model(X).square().mean())

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = nn.Parameter(torch.view_as_real(torch.ones(4, dtype=torch.cfloat)))

        def forward(self):
            spectrum = torch.fft.rfft(X) * torch.view_as_complex(self.filter)
            return torch.fft.irfft(spectrum, n=6).square().mean()

    model = Spectral()
    opt = zk.ZOSGD(model, perturb="in_place")
    opt.step(model)
    assert opt.projected_gradients[0] != 0


@pytest.mark.hf
def test_weights_that_accelerate_has_offloaded_are_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Parameter '[\w.]+' is trainable, but on the meta"):
        zk.ZOSGD(model)


SCRIPTED = {
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))),
    "trace": lambda: torch.jit.trace(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), X),
    "a part of a model": lambda: nn.Sequential(torch.jit.script(nn.Linear(6, 5)), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_goes_on_in_place_and_it_is_said(name):
    model = SCRIPTED[name]()
    with pytest.warns(UserWarning, match="model is scripted.*in place"):
        opt = zk.ZOSGD(model, lr=0.1)
    before = weights(model)
    opt.step(lambda: nn.functional.cross_entropy(model(X), Y))
    assert opt.projected_gradients[0] != 0
    assert not any(map(torch.equal, before, model.parameters()))
    with pytest.raises(ValueError, match="scripted.*in_place"):
        zk.ZOSGD(model, perturb="on_entry")


def test_an_optimizer_prints_its_settings_and_no_number_a_parameter():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)])
    opt = zk.ZOAdam(model, lr=0.25, mask=zk.masks.Random([0.5] * 80, 6), blocks="module")
    lines = str(opt).splitlines()
    assert lines[0] == "ZOAdam (" and "Parameter Group 0" in lines
    assert {"    lr: 0.25", "    blocks: 40", "    params: 80 tensors, 480 weights"} < set(lines)
    assert "    mask: random, keep 80 values, seed 6" in lines
    assert len(lines) < 40 and max(map(len, lines)) < 60

"""Frozen parameters that are no dense tensors: quantised, sparse, nested, offloaded."""

import warnings

import pytest
import torch
from conftest import same_bits
from torch import nn

import zokernels as zk

aten = torch.ops.aten


class Halves(torch.Tensor):
    """A weight kept as integers and a scale, which can multiply and little else."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].whole, args[0].scale)
        if func is aten.t.default:
            return (args[0].whole * args[0].scale).t()
        raise NotImplementedError(f"{func} of halves")


class Parted(Halves):
    """One that says its parts."""

    def __tensor_flatten__(self):
        return ["whole", "scale"], None


class Plain(nn.Parameter):
    """A class of one's own whose memory is that of any tensor."""


def integers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 9, (6, 6), generator=generator, dtype=torch.int8)


def numbers(seed=0):
    return integers(seed) * torch.tensor(0.3)


def channels(seed=0):
    scales, zeros = torch.linspace(0.1, 0.2, 6), torch.arange(6)
    return torch.quantize_per_channel(numbers(seed), scales, zeros, 0, torch.qint8)


def nested(seed=0, layout=torch.strided):
    return torch.nested.nested_tensor([numbers(seed), numbers(seed)[:3]], layout=layout)


READABLE = {
    "a subclass in parts": lambda seed=0: Parted(integers(seed), torch.tensor(0.3)),
    "a subclass with memory": lambda seed=0: Plain(numbers(seed), requires_grad=False),
    "sparse": lambda seed=0: numbers(seed).to_sparse(),
    "sparse rows": lambda seed=0: numbers(seed).to_sparse_csr(),
    "sparse blocks": lambda seed=0: numbers(seed).to_sparse_bsc((2, 3)),
    "quantised": lambda seed=0: torch.quantize_per_tensor(numbers(seed), 0.1, 3, torch.quint8),
    "quantised by channel": channels,
    "nested": nested,
    "nested, jagged": lambda seed=0: nested(seed, torch.jagged),
    "integers": integers,
    "booleans": lambda seed=0: integers(seed) > 0,
    "float8": lambda seed=0: numbers(seed).to(torch.float8_e4m3fn),
    "complex, conjugate": lambda seed=0: torch.complex(numbers(seed), numbers(seed + 9)).conj(),
    "one number": lambda seed=0: torch.tensor(0.5 + seed),
}
UNREADABLE = {
    "a subclass without parts": lambda: Halves(integers(), torch.tensor(0.3)),
    "on the meta device": lambda: torch.empty(6, 6, device="meta"),
    "a subclass with a part on the meta device": lambda: Parted(
        integers().to("meta"), torch.tensor(0.3)
    ),
}
USED = {"a subclass in parts", "a subclass with memory", "a subclass without parts"}


class Model(nn.Module):
    def __init__(self, frozen, used=False, trained=False):
        super().__init__()
        torch.manual_seed(0)
        own = isinstance(frozen, nn.Parameter)
        self.frozen = frozen if own else nn.Parameter(frozen, requires_grad=trained)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 1)
        self.used = used

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h @ self.frozen.t() if self.used else h).square().mean()


X = torch.linspace(-1, 1, 35).reshape(7, 5)


def trained(model):
    return [p.detach() for layer in (model.first, model.last) for p in layer.parameters()]


def run(path, model, steps=4):
    opt = zk.ZOSGD(model, lr=0.05, weight_decay=0.1, seed=3)
    opt.record(path)
    for _ in range(steps):
        opt.step(lambda: model(X))
    opt.trajectory.close()
    return model


def made_again(path, model):
    """By a replay, and by a resume at two steps that then does the rest."""
    yield zk.replay(model(), path)
    found = model()
    opt = zk.ZOSGD(found, lr=0.05, weight_decay=0.1, seed=3)
    opt.resume(path, until=2)
    for _ in range(2):
        opt.step(lambda: found(X))
    opt.trajectory.close()
    yield found


@pytest.mark.parametrize("name", READABLE)
def test_a_run_over_a_frozen_parameter_of_any_kind_is_replayed(name, tmp_path):
    def model(seed=0):
        return Model(READABLE[name](seed), used=name in USED)

    path = tmp_path / "run.zk"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no checksum")
        after = run(path, model())
    assert isinstance(zk.Trajectory(path).header["parameters"][0]["check"], int)
    for found in made_again(path, model):
        assert all(map(same_bits, trained(found), trained(after)))
    with pytest.raises(zk.TrajectoryError, match="'frozen' is not what it was"):
        zk.replay(model(1), path)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_has_no_checksum_which_is_said_once(name, tmp_path):
    def model():
        return Model(UNREADABLE[name](), used=name in USED)

    path = tmp_path / "run.zk"
    with pytest.warns(UserWarning, match="no checksum of frozen") as said:
        after = run(path, model())
    assert [w.filename for w in said if "no checksum" in str(w.message)] == [__file__]
    checks = [p["check"] for p in zk.Trajectory(path).header["parameters"]]
    assert checks[0] is None and None not in checks[1:]
    for found in made_again(path, model):
        assert all(map(same_bits, trained(found), trained(after)))
    other = model()
    other.last.bias.data += 1
    with pytest.raises(zk.TrajectoryError, match="'last.bias' is not what it was"):
        zk.replay(other, path)


def test_of_many_parameters_without_a_checksum_some_are_named(tmp_path):
    model = Model(UNREADABLE["on the meta device"]())
    model.others = nn.ModuleList(nn.Linear(3, 3, device="meta") for _ in range(50))
    model.others.requires_grad_(False)
    with pytest.warns(UserWarning, match="no checksum of frozen, .* and 98 others") as said:
        run(tmp_path / "run.zk", model)
    assert len(str(said[0].message)) < 500


def test_where_warnings_are_errors_no_file_is_begun(tmp_path):
    opt = zk.ZOSGD(Model(UNREADABLE["on the meta device"]()), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no checksum of frozen"):
            opt.record(tmp_path / "run.zk")
    assert not list(tmp_path.iterdir())


def test_weights_that_were_in_memory_and_are_not_cannot_be_compared(tmp_path):
    path = tmp_path / "run.zk"
    run(path, Model(numbers()))
    with pytest.raises(zk.TrajectoryError, match="'frozen' is on the meta device here"):
        zk.replay(Model(torch.empty(6, 6, device="meta")), path)


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        (lambda: numbers().to_sparse(), "a tensor of layout sparse_coo"),
        (lambda: nested(layout=torch.jagged), "a nested tensor"),
        (lambda: Parted(integers(), torch.tensor(0.3)), "a Parted"),
        (lambda: Halves(integers(), torch.tensor(0.3)), "a Halves"),
    ],
)
def test_what_no_pass_can_write_is_refused_if_it_is_trained(frozen, words, tmp_path):
    opt = zk.ZOSGD(Model(frozen(), trained=True), lr=0.05)
    with pytest.raises(zk.TrajectoryError, match=f"'frozen' is trained and is {words}.*freeze it"):
        opt.record(tmp_path / "run.zk")
    assert not list(tmp_path.iterdir())
    assert opt.trajectory is None


def test_what_has_no_values_is_refused_when_the_optimizer_is_made():
    with pytest.raises(ValueError, match="'weight' is trainable, but has no shape yet.*one batch"):
        zk.ZOSGD(nn.LazyLinear(3), lr=0.05)
    with pytest.raises(ValueError, match="'frozen' is trainable, but on the meta device"):
        zk.ZOSGD(Model(torch.empty(6, 6, device="meta"), trained=True), lr=0.05)

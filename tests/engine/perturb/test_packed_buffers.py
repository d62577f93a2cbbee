"""A frozen layer whose weights are packed into buffers, as GPTQ and AWQ have them: only read."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zokernels as zk

pytestmark = pytest.mark.usefixtures("one_thread")
COPIES = {torch.ops.aten.clone.default, torch.ops.aten.copy_.default}
COPIES |= {torch.ops.aten._to_copy.default}


class Packed(torch.nn.Module):
    """A matrix of 4-bit integers, eight in an int32, with a scale a column; and an adapter."""

    def __init__(self, width=256, seed=0):
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        packed = torch.randint(-(2**31), 2**31 - 1, (width // 8, width), generator=source)
        self.register_buffer("qweight", packed.to(torch.int32))
        self.register_buffer("scales", torch.rand(width, generator=source) / 8)
        self.register_buffer("places", torch.arange(0, 32, 4, dtype=torch.int32))
        self.down = torch.nn.Parameter(torch.randn(width, 4, generator=source) / 8)
        self.up = torch.nn.Parameter(torch.zeros(4, width))

    def forward(self, x):
        numbers = (self.qweight[:, None] >> self.places[:, None]) & 15
        weight = (numbers.flatten(0, 1) - 8).float() * self.scales
        return x @ weight + x @ self.down @ self.up


class Watch(TorchDispatchMode):
    """Which tensors with the packed weights' memory were copied."""

    def __init__(self, packed):
        super().__init__()
        self.at, self.copied = packed.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in COPIES:
            for t in args:
                if torch.is_tensor(t) and t.device.type == "cpu" and t.numel():
                    if t.untyped_storage().data_ptr() == self.at:
                        self.copied.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("perturb", ["on_entry", "paired", "in_place"])
@pytest.mark.parametrize("dist", ["gaussian", "rank1"])
def test_packed_weights_are_not_copied_and_the_run_is_replayed(tmp_path, perturb, dist):
    model, x = Packed(), torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    before = model.qweight.clone()
    opt = zk.ZOSGD(model, lr=1e-2, eps=1e-2, perturb=perturb, dist=dist, weight_decay=0.1)
    opt.record(tmp_path / "run.zk")
    with Watch(model.qweight) as seen:
        for _ in range(4):
            opt.step(lambda: model(x).square().mean())
    opt.trajectory.close()
    assert not seen.copied
    assert torch.equal(model.qweight, before)
    assert opt.projected_gradients != [0.0] and bool(model.up.any())
    other = Packed()
    zk.replay(other, tmp_path / "run.zk")
    assert torch.equal(other.up, model.up) and torch.equal(other.down, model.down)


def test_the_watch_sees_a_copy():
    model = Packed()
    with Watch(model.qweight) as seen:
        model.qweight.clone()
    assert seen.copied

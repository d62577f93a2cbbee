"""What happens around a capture, seen without a device: the warm-up, and a read on the host."""

import contextlib

import pytest
import torch
from test_graphed import batches, loss_fn, pair
from torch import nn

import zokernels as zk
from zokernels.graphs import support


class FakeCuda:
    """Stands in for the calls around a capture, so that their order is seen without a device."""

    def __init__(self, monkeypatch):
        self.told = []
        # A build for CPUs raises where it is asked.
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        for name in ("current_stream", "Stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: FakeStream(name))
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *a, name=name, **k: self.inside(name))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda s: self.told.append(f"back to {s}"))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda m: self.told.append(m))

    @contextlib.contextmanager
    def inside(self, name):
        self.told.append(f"in {name}")
        yield
        self.told.append(f"out {name}")


class FakeStream:
    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name

    def wait_stream(self, other):
        pass


def bodies(step, monkeypatch, fails_at=None):
    """Has the step's body only note whether it is told that it is captured."""
    ran = []

    def body():
        ran.append(torch.cuda.is_current_stream_capturing())
        if len(ran) - 1 == fails_at:
            raise RuntimeError("called a synchronizing CUDA operation\nand a trace")

    monkeypatch.setattr(step, "_body", body)
    return ran


def test_a_capture_is_warmed_up_by_the_way_that_it_takes(monkeypatch):
    (_, _), (model, opt) = pair()
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)
    ran, cuda = bodies(step, monkeypatch), FakeCuda(monkeypatch)
    step._prepare(capture=True)
    # Three times before, told so; and once in what is captured for real.
    assert ran == [True, True, True, False]
    assert cuda.told == [
        "in device", "in stream", "error", 0, "out stream", "in graph", "out graph", "out device",
    ]  # fmt: skip
    assert step._graph is not None


def test_a_read_on_the_host_is_met_before_anything_is_captured(monkeypatch):
    (_, _), (model, opt) = pair()
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)
    ran, cuda = bodies(step, monkeypatch, fails_at=2), FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="captured: called a synchronizing CUDA operation loss"):
        step._prepare(capture=True)
    assert ran == [True] * 3 and "in graph" not in cuda.told
    assert cuda.told[-2:] == [0, "back to current_stream"]
    assert not torch.cuda.is_current_stream_capturing() and step._graph is None


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_model_of_transformers_builds_its_mask_as_in_a_capture(family, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    from tiny import models

    model, masks = models()[family]().eval(), []
    attend = nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        with support.as_if_capturing():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    plain, captured = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    assert all(m is None for m in plain) and all(m is not None for m in captured)

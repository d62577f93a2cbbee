"""`zk.GraphedStep` captured and replayed on a GPU: the step without a graph, and opt.step.

Tried out on a CPU nothing is captured, and the same step runs launch by launch.
"""

import math

import pytest
import torch
from conftest import same_bits
from device import DEVICE, DRY, assert_same, marks, some
from test_graphed import CASES, MODES, batches, loss_fn, pair
from tiny import models

import zokernels as zk

pytestmark = marks
CAPTURES = not DRY
on_gpu_only = pytest.mark.skipif(DRY, reason="is about a capture; needs a CUDA device")


def made(**options):
    if DRY:
        # An interpreted program of signs takes a third of one of normals.
        options |= {"width": 8, "dist": "rademacher"}
    (model, opt), (twin, twin_opt) = pair(backend="triton", **options)
    return (model.to(DEVICE), opt), (twin.to(DEVICE), twin_opt)


def on_device(batch):
    return {k: v.to(DEVICE) for k, v in batch.items()}


@pytest.mark.parametrize("mode", some(MODES, 1))
@pytest.mark.parametrize("case", some(CASES, 1))
def test_a_graph_replays_the_step(case, mode):
    many = batches(2 if DRY else 6)
    many[-2] = many[-2] | {"weight": torch.tensor(float("nan"))}
    results = []
    for (model, opt), capture in zip(
        made(perturb=mode, **CASES[case]), (CAPTURES, False), strict=True
    ):
        step = zk.GraphedStep(opt, loss_fn(model), many[-1], capture=capture)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3)
        losses = []
        for batch in many:
            losses.append(step(batch))
            schedule.step()
        step.read()
        states = [t for s in opt.state.values() for t in s.values() if torch.is_tensor(t)]
        results.append([torch.stack(losses).flatten(), *model.parameters(), *states])
    # Kernels chosen in a capture are those of the warm-up, so that losses agree, and with them all.
    assert_same(*results)


@pytest.mark.parametrize("mode", some(MODES, 1))
def test_a_graph_is_the_optimizers_step_where_the_losses_are(mode):
    (model, opt), (twin, twin_opt) = made(
        perturb=mode, num_queries=1 if DRY else 2, weight_decay=0.1
    )  # fmt: skip
    many = batches(1 if DRY else 4)
    step = zk.GraphedStep(twin_opt, loss_fn(twin), many[0], capture=CAPTURES)
    for batch in map(on_device, many):
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch)
        step.read()
        # A loss is rounded in its last place, and a slope is a difference over 2 ε.
        assert twin_opt.projected_gradients == pytest.approx(opt.projected_gradients, abs=2e-3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_a_trajectory_of_replays_is_replayed_here_and_on_a_cpu(tmp_path):
    (model, opt), (twin, _) = made(perturb="on_entry", weight_decay=0.1)
    log = opt.record(tmp_path / "run")
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=CAPTURES)
    for batch in batches(2 if DRY else 5):
        step(batch)
    log.close()
    for device in dict.fromkeys(["cpu", DEVICE]):
        (again, _), _ = made()
        again = again.to(device)
        with torch.no_grad():
            for p, q in zip(again.parameters(), twin.parameters(), strict=True):
                p.copy_(q)
        zk.replay(again, tmp_path / "run")
        assert_same(list(again.parameters()), list(model.parameters()))


@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["opt", "llama", "bert-mlm"])
@pytest.mark.parametrize("mode", MODES)
def test_a_language_models_step_is_captured(mode, family, dtype):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    model = models()[family]().to(DEVICE, dtype).eval()
    ids = torch.randint(5, 30, (3, 64), device=DEVICE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    slopes = []
    for graphed in (False, True):
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=5, perturb=mode, lazy_logits=False)
        if graphed:
            step = zk.GraphedStep(opt, lambda b: model(**b).loss, batch)
            step(batch)
            step.read()
        else:
            opt.step(lambda: model(**batch).loss)
        slopes += opt.projected_gradients
    # Attention takes its mask as it is in a capture: another kernel, and a slope over 2 ε = 0.02. A
    # bfloat16 loss of 4 to 8 has steps of 2⁻⁵, and each of two may be a step off; float32 says
    # whether the numbers are right, 16 bits whether their kernels can be captured.
    rounding = 1e-3 if dtype is torch.float32 else 4.0
    assert slopes[1] == pytest.approx(slopes[0], abs=rounding)


@on_gpu_only
def test_a_replay_waits_for_nothing():
    (model, opt), _ = made(perturb="on_entry")
    many = [on_device(b) for b in batches(4)]
    step = zk.GraphedStep(opt, loss_fn(model), many[0])
    step(many[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Beyond the first the host waits, by an event, for the step before the last only.
        for batch in many[1:]:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu_only
def test_a_compiled_model_is_captured():
    (model, _), _ = made()
    compiled = torch.compile(model)
    with pytest.warns(UserWarning, match="compiled"):
        opt = zk.ZOSGD(compiled, lr=1e-2, eps=3e-3, seed=7)
    step = zk.GraphedStep(opt, loss_fn(compiled), batches(1)[0])
    before = [p.clone() for p in model.parameters()]
    losses = [step(b).item() for b in batches(3)]
    assert all(map(math.isfinite, losses))
    assert not all(map(same_bits, before, model.parameters()))


@on_gpu_only
def test_what_reads_the_device_is_refused_at_the_capture():
    (model, opt), _ = made(perturb="on_entry")

    def reads(batch):
        loss = loss_fn(model)(batch)
        return loss if loss.item() > 0 else -loss

    with pytest.raises(RuntimeError, match="could not be captured.*read a tensor on the host"):
        zk.GraphedStep(opt, reads, batches(1)[0])
    # Nothing is broken by it: random numbers, and another capture.
    torch.rand(3, device=DEVICE)
    zk.GraphedStep(opt, loss_fn(model), batches(1)[0])(batches(1)[0])

"""What a captured step runs, watched on a CPU: no operation of it gives a value to the host."""

import pytest
import torch
from test_graphed import MODES, batches, loss_fn, pair
from tiny import models
from torch.utils._python_dispatch import TorchDispatchMode

import zokernels as zk
from zokernels.estimators import ESTIMATORS

pytestmark = pytest.mark.usefixtures("one_thread")

# What waits for the device on CUDA, or has a shape that only the host can ask for.
READS = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default, torch.ops.aten.unique_dim.default,
}  # fmt: skip


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func is torch.ops.aten.index.Tensor else ()
        if func in READS or any(i is not None and i.dtype is torch.bool for i in indices):
            raise AssertionError(f"{func} would wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_of_a_step_is_read_by_the_host(mode, estimator):
    options = dict(perturb=mode, estimator=estimator, num_queries=2, normalize="ema", clip=1.5)
    (_, _), (model, opt) = pair(zk.ZOAdam, **options)
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0], capture=False)
    with torch.no_grad(), Watching():
        step._body()


def test_a_read_is_noticed():
    (_, _), (model, opt) = pair()
    fn = loss_fn(model)
    step = zk.GraphedStep(
        opt, lambda b: fn(b) if fn(b) > 0 else -fn(b), batches(1)[0], capture=False
    )
    with torch.no_grad(), Watching(), pytest.raises(AssertionError, match="wait for the device"):
        step._body()


@pytest.mark.hf
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_a_language_models_step_is_not_read_and_is_the_optimizers(kind, mode, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    ids = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    results = []
    for graphed in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = models()[kind]().eval()
        opt = zk.ZOSGD(model, lr=1e-3, eps=1e-2, perturb=mode, lazy_logits=False, seed=4)
        if graphed:
            step = zk.GraphedStep(opt, lambda b, m=model: m(**b).loss, batch, capture=False)
            with monkeypatch.context() as patch, torch.no_grad(), Watching():
                # Otherwise it looks whether the mask is all ones; in a capture it does not.
                capturing = "transformers.utils.import_utils.is_cuda_stream_capturing"
                patch.setattr(capturing, lambda: True)
                step._body()
            # That was a step that the host had not allowed to write.
            assert opt.param_groups[0]["step"] == 0
        for _ in range(2):
            step(batch) if graphed else opt.step(lambda m=model: m(**batch).loss)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_a_running_root_goes_on_where_nobody_reads_in_between():
    options = dict(perturb="on_entry", num_queries=2, normalize="ema", clip=1.1)
    (model, opt), (twin, twin_opt) = pair(**options)
    many = batches(6)
    step = zk.GraphedStep(twin_opt, loss_fn(twin), many[0], capture=False)
    for number, batch in enumerate(many):
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch)
        # In the middle the host catches up, and hands the mean back.
        if number == 2:
            step.read()
    step.read()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert opt.param_groups[0]["moments"] == twin_opt.param_groups[0]["moments"] != {}

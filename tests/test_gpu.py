"""The Triton backend on a CUDA device: the CPU's bits. bench/on_gpu.sh runs these."""

import math

import pytest
import torch
from conftest import same_bits, varied
from test_graphed import CASES, MODES, batches, loss_fn, pair
from test_ops import DISTS, DTYPES, SIZES, mask_of, unaligned
from test_update import RULES, flat, states_of
from tiny import models

import zokernels as zk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; bench/on_gpu.sh runs it there"
    ),
]


def to_gpu(tensors):
    """Copies on the device at the same distance from an aligned address."""
    out = []
    for t in tensors:
        shift = t.storage_offset()
        whole = torch.zeros(shift + t.numel(), dtype=t.dtype, device="cuda")
        out.append(whole[shift:].copy_(t))
    return out


def mask_on(mask, tensors, device):
    made = mask_of(mask, tensors)
    if isinstance(made, zk.masks.Bits):
        made.packed = [p.to(device) for p in made.packed]
    return made


def same(cpu, gpu):
    return all(same_bits(a, b.cpu()) for a, b in zip(cpu, gpu, strict=True))


@pytest.mark.parametrize("each_step", [False, 2], ids=["once", "each_step"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("mask", ["none", "random", "magnitude", "bits"])
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_noise_equals_the_cpu(dtype, dist, mask, rounding, each_step):
    cpu = [unaligned(size, dtype, i) for i, size in enumerate([*SIZES, 100_003])]
    gpu = to_gpu(cpu)
    call = dict(
        seeds=[3, 2**63 + 5, 7, 8],
        coeffs=[1e-3, -0.5, 2e-30, 0.25],
        streams=[5, 2**32 - 1, 0, 1, 2, 3, 4, 6, 7],
        offsets=[0, 3, 8, 2**35 - 4, 129, 1, 2**40 + 5, 2**35 - 2000, 2**31 - 5],
        dist=dist,
        decay=[0.99, 1.0] if each_step else 0.99,
        rounding=rounding,
        rounding_seed=[77, 2**64 - 1] if each_step else 2**63,
        each_step=each_step,
    )
    masks = [mask_on(mask, cpu, device) for device in ("cpu", "cuda")]
    zk.ops.add_noise_(cpu, mask=masks[0], **call)
    zk.ops.add_noise_(gpu, mask=masks[1], backend="triton", **call)
    assert same(cpu, gpu)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("mask", ["none", "random", "magnitude", "bits"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=["m32", "m16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_apply_update_equals_the_cpu(name, dtype, state, mask, rounding):
    cpu = [unaligned(size, dtype, i) for i, size in enumerate([*SIZES, 100_003])]
    gpu, cpu_states = to_gpu(cpu), states_of(name, cpu, state)
    gpu_states = [{k: t.cuda() for k, t in s.items()} for s in cpu_states]
    call = dict(
        seeds=[3, 4], coeffs=[1e-3, -0.5], lr=[0.01, 0.02], dist=DISTS[len(name) % 2],
        decay=0.99, rounding=rounding, rounding_seed=2**64 - 1, each_step=True, **RULES[name],
    )  # fmt: skip
    masks = [mask_on(mask, cpu, device) for device in ("cpu", "cuda")]
    zk.ops.apply_update_(cpu, cpu_states, mask=masks[0], **call)
    zk.ops.apply_update_(gpu, gpu_states, mask=masks[1], backend="triton", **call)
    assert same(flat(cpu, cpu_states), flat(gpu, gpu_states))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_million_weights_equal_the_cpu(dtype, dist):
    cpu = varied(10**6 + 3, dtype).repeat(100)
    gpu = cpu.cuda()
    call = dict(seeds=[11], coeffs=[-3e-4], dist=dist, offsets=[2**32 - 10**7])
    zk.ops.add_noise_([cpu], **call)
    zk.ops.add_noise_([gpu], **call)
    assert same_bits(cpu, gpu.cpu())


def test_a_tensor_of_more_than_two_to_the_31_elements():
    n = 2**31 + 10_007
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 6.5 GB of free GPU memory")
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    zk.ops.add_noise_([p], [5], [1.0], streams=[3])
    for start in (0, 2**30 - 17, 2**31 - 100, n - 1000):
        part = torch.zeros(1000, dtype=torch.bfloat16)[: n - start]
        zk.ops.add_noise_([part], [5], [1.0], streams=[3], offsets=[start])
        assert same_bits(part, p[start : start + part.numel()].cpu())


def test_nothing_is_compiled_anew_when_numbers_change():
    from zokernels.backends.triton.add_noise import _add_noise_kernel

    def compiled():
        return sum(len(cache[0]) for cache in _add_noise_kernel.device_caches.values())

    counts = []
    for k, numel in ((1, 4096), (2, 5000), (7, 12_345), (16, 100_000), (1, 1)):
        seeds, coeffs = list(range(k)), [0.1 * (i + 1) for i in range(k)]
        zk.ops.add_noise_([torch.zeros(numel, device="cuda")], seeds, coeffs)
        counts.append(compiled())
    assert len(set(counts)) == 1


def test_the_default_for_cuda_tensors_is_triton():
    assert zk.backends()["triton"].available
    p = torch.zeros(1000, device="cuda", dtype=torch.float64)
    zk.ops.add_noise_([p], [1], [1.0])
    assert torch.equal(p.cpu(), zk.noise.gaussian(1000, seed=1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_perturbing_is_the_same_forward(dtype):
    hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=9000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        word_embed_proj_dim=64, max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    model = hf.OPTForCausalLM(config).to("cuda", dtype).eval()
    ids = torch.randint(3, 9000, (3, 12), device="cuda")
    before = [p.clone() for p in model.parameters()]
    slopes = []
    for mode in ("in_place", "on_entry", "paired"):
        opt = zk.ZOSGD(model, lr=0.0, eps=1e-2, seed=5, perturb=mode)
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
        slopes += opt.projected_gradients
    # The loss is rounded in its last places, and a slope is a difference over 2 ε.
    rounding = 1e-3 if dtype is torch.float32 else 0.3
    assert slopes[1:] == pytest.approx(slopes[:1] * 2, abs=rounding)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def on_gpu(batch):
    return {k: v.cuda() for k, v in batch.items()}


def graphed_and_eager(mode, **options):
    """The same run by a graph and by the same step without one, on the device."""
    found = []
    for capture in (True, False):
        model, opt = pair(perturb=mode, **options)[0]
        model.cuda()
        # States are made where the weights are.
        found.append((model, opt, capture))
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_graph_replays_the_step(case, mode):
    many = batches(6)
    many[3] = many[3] | {"weight": torch.tensor(float("nan"))}
    results = []
    for model, opt, capture in graphed_and_eager(mode, **CASES[case]):
        step = zk.GraphedStep(opt, loss_fn(model), many[0], capture=capture)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3)
        losses = []
        for batch in many:
            losses.append(step(batch))
            schedule.step()
        step.read()
        states = [t for s in opt.state.values() for t in s.values() if torch.is_tensor(t)]
        results.append(
            (torch.stack(losses).cpu(), [t.cpu() for t in (*model.parameters(), *states)])
        )
    (losses, tensors), (wanted, others) = results
    # Kernels chosen in a capture are those of the warm-up, so that losses agree, and with them all.
    assert same_bits(losses, wanted)
    assert all(map(same_bits, tensors, others))


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_is_the_optimizers_step_where_the_losses_are(mode):
    (model, opt), (twin, twin_opt) = pair(perturb=mode, num_queries=2, weight_decay=0.1)
    model.cuda(), twin.cuda()
    many = batches(4)
    step = zk.GraphedStep(twin_opt, loss_fn(twin), many[0])
    for batch in map(on_gpu, many):
        opt.step(lambda b=batch: loss_fn(model)(b))
        step(batch)
        step.read()
        # A loss is rounded in its last place, and a slope is a difference over 2 ε.
        assert twin_opt.projected_gradients == pytest.approx(opt.projected_gradients, abs=2e-3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_a_replay_waits_for_nothing():
    model, opt = pair(perturb="on_entry")[0]
    model.cuda()
    many = [on_gpu(b) for b in batches(4)]
    step = zk.GraphedStep(opt, loss_fn(model), many[0])
    step(many[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Beyond the first the host waits, by an event, for the step before the last only.
        for batch in many[1:]:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_trajectory_of_replays_is_replayed(tmp_path):
    model, opt = pair(perturb="on_entry", weight_decay=0.1)[0]
    model.cuda()
    base = [p.detach().clone() for p in model.parameters()]
    log = opt.record(tmp_path / "run")
    step = zk.GraphedStep(opt, loss_fn(model), batches(1)[0])
    for batch in batches(5):
        step(batch)
    log.close()
    after = [p.detach().clone() for p in model.parameters()]
    for p, b in zip(model.parameters(), base, strict=True):
        p.data.copy_(b)
    zk.replay(model, tmp_path / "run")
    assert all(same_bits(p.cpu(), a.cpu()) for p, a in zip(model.parameters(), after, strict=True))


def test_what_reads_the_device_is_refused_at_the_capture():
    model, opt = pair(perturb="on_entry")[0]
    model.cuda()

    def reads(batch):
        loss = loss_fn(model)(batch)
        return loss if loss.item() > 0 else -loss

    with pytest.raises(RuntimeError, match="could not be captured.*read a tensor on the host"):
        zk.GraphedStep(opt, reads, batches(1)[0])


def test_a_compiled_model_is_captured():
    model = pair()[0][0].cuda()
    compiled = torch.compile(model)
    with pytest.warns(UserWarning, match="compiled"):
        opt = zk.ZOSGD(compiled, lr=1e-2, eps=3e-3, seed=7)
    step = zk.GraphedStep(opt, loss_fn(compiled), batches(1)[0])
    before = [p.clone() for p in model.parameters()]
    losses = [step(b).item() for b in batches(3)]
    assert all(map(math.isfinite, losses))
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_a_language_models_step_is_captured(mode):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
    torch.manual_seed(0)
    model = models()["opt"]().cuda().eval()
    ids = torch.randint(5, 30, (3, 12), device="cuda")
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
    # Attention takes its mask as it is in a capture: another kernel, and a slope over 2 ε.
    assert slopes[1] == pytest.approx(slopes[0], abs=1e-3)

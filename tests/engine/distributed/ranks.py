"""What several processes do in test_distributed.py, each forked from one that has torch.

Every case is one function, which all processes run together; what it returns is saved by rank.
"""

import os
import signal
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import zokernels as zk
from zokernels.backends import shards

SIZES = (6, 7, 3)
STEPS = 4

# How optimizers are made: class and keywords. In float64 and with a step that matters, so that a
# process that missed a loss would show.
COMMON = dict(lr=0.02, eps=1e-3, seed=5)
OPTIMIZERS = {
    "sgd": (zk.ZOSGD, dict(weight_decay=0.1)),
    "one-sided": (zk.ZOSGD, dict(estimator="one_sided")),
    "population": (
        zk.ZOSGD,
        dict(num_queries=4, estimator="population", normalize="std", clip=1.2),
    ),  # fmt: skip
    "sign": (zk.ZOSGDSign, dict(dist="rademacher")),
    "momentum": (zk.ZOSGDMomentum, dict(beta=0.7)),
    "window": (zk.ZOSGDMomentum, dict(window=3)),
    "conservative": (zk.ZOSGDConservative, dict(estimator="one_sided")),
    "conservative-two-sided": (zk.ZOSGDConservative, {}),
    "adam": (zk.ZOAdam, dict(bias_correction=True)),
    "forward": (zk.ForwardGrad, {}),
    "blocks": (zk.ZOSGD, dict(blocks="module")),
    "simultaneous": (
        zk.ZOAdam,
        dict(blocks="module", block_order="simultaneous", normalize="ema"),
    ),  # fmt: skip
    "sparse": (zk.ZOSGD, dict(sparsity=0.3, resample_every=2)),
    "rank1": (zk.ZOSGD, dict(dist="rank1")),
    "rank1-in-place": (zk.ZOAdam, dict(dist="rank1", perturb="in_place")),
    "paired": (zk.ZOSGD, dict(perturb="paired")),
    "in-place": (zk.ZOSGD, dict(perturb="in_place", mask=zk.masks.Magnitude(0.3))),
}


def network(dtype=torch.float64):
    torch.manual_seed(3)
    first, last = nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:])
    return nn.Sequential(first, nn.Tanh(), last).to(dtype)


def batch(step, share=0, shares=1, dtype=torch.float64):
    made = torch.Generator().manual_seed(step)
    x = torch.randn(8, SIZES[0], generator=made, dtype=torch.float64).to(dtype)
    y = torch.randn(8, SIZES[-1], generator=made, dtype=torch.float64).to(dtype)
    return x.chunk(shares)[share], y.chunk(shares)[share]


def make(model, name="sgd", **more):
    cls, options = OPTIMIZERS[name]
    return cls(model, **{**COMMON, **options, **more})


def train(model, opt, steps=range(STEPS), share=0, shares=1, dtype=torch.float64):
    """The losses of some steps, each on its own batch, or on a share of it."""
    found = []
    for step in steps:
        x, y = batch(step, share, shares, dtype)
        found.append(float(opt.step(lambda x=x, y=y: nn.functional.mse_loss(model(x), y))))
    return found


def weights(model):
    return [shards.whole(p.detach()).clone() for p in model.parameters()]


def caught(kind, run):
    """The message of the exception that ``run`` raises."""
    try:
        run()
    except kind as error:
        return str(error)
    return None


# Whole weights in every process.


def data(name):
    model = network()
    opt = make(model, name)
    losses = train(model, opt, share=opt.parallel.data_rank, shares=opt.parallel.data)
    return dict(weights=weights(model), losses=losses)


def query(name):
    model = network(torch.float32)
    opt = make(model, name, num_queries=4, parallel="query")
    return dict(losses=train(model, opt, dtype=torch.float32), weights=weights(model))


def asked():
    """The run of a population that is asked and told, by a fitness that looks at all of it."""
    model = network(torch.float32)
    options = dict(num_queries=8, estimator="population", maximize=True)
    opt = make(model, parallel="query", **options)
    for step in range(STEPS):
        x, y = batch(step, dtype=torch.float32)
        found = []
        for member in opt.ask():
            with member:
                found.append(-float(nn.functional.mse_loss(model(x), y)))
        opt.tell(found, fitness="centered_rank")
    return dict(weights=weights(model), members=len(found))


def both():
    model = network()
    opt = make(model, num_queries=4, parallel=zk.Distributed(data=2))
    losses = train(model, opt, share=opt.parallel.data_rank, shares=2)
    return dict(weights=weights(model), losses=losses)


def two_runs(out):
    """Two runs of two processes each, beside each other, with seeds of their own."""
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in ((0, 1), (2, 3))]
    run = rank // 2
    model = network()
    opt = make(model, seed=run, parallel=zk.Distributed(group=groups[run]))
    opt.record(out / f"beside-{run}.zk")
    train(model, opt, share=opt.parallel.data_rank, shares=2)
    opt.trajectory.close()
    return dict(weights=weights(model), rank=opt.parallel.rank)


def traffic():
    model = network()
    opt = make(model)
    train(model, opt, [0])
    before = opt.parallel.bytes_sent
    train(model, opt, range(1, 6))
    return (opt.parallel.bytes_sent - before) / 5


def not_finite():
    """The last process's loss is NaN in step 1."""
    model = network()
    opt = make(model, "adam", num_queries=2)
    train(model, opt, [0])
    before, states = weights(model), opt.state_dict()["state"][0]["m"].clone()
    lost = dist.get_rank() == dist.get_world_size() - 1
    loss = opt.step(lambda: model(batch(1)[0]).mean() * (float("nan") if lost else 1.0))
    same = all(map(torch.equal, before, weights(model)))
    same = same and torch.equal(states, opt.state_dict()["state"][0]["m"])
    bad = opt.bad_steps
    train(model, opt, [2])
    return dict(same=same, bad=bad, after=opt.bad_steps, loss=float(loss), weights=weights(model))


def failing():
    """Rank 1's forward fails in step 1; all catch that, and go on."""
    model = network()
    opt = make(model)
    train(model, opt, [0])
    before = weights(model)

    def fails():
        if dist.get_rank() == 1:
            raise MemoryError("no memory left")
        return model(batch(1)[0]).mean()

    message = caught((RuntimeError, MemoryError), lambda: opt.step(fails))
    same = all(map(torch.equal, before, weights(model)))
    train(model, opt, [1, 2])
    return dict(message=message, same=same, weights=weights(model))


def straying():
    """The last process changes a weight by hand after step 0."""
    model = network()
    # With a timeout of its own it has a process group of its own, as beside NCCL.
    opt = make(model, parallel=zk.Distributed(check_every=2, timeout=200))
    assert opt.parallel.group is not dist.group.WORLD
    train(model, opt, [0])
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            model[2].bias[1] += 1e-12
    return caught(zk.RankError, lambda: train(model, opt, [1, 2]))


def other_settings():
    rank = dist.get_rank()
    model = network()
    lr = make(model, lr=0.02 if rank != 1 else 0.03)
    return dict(
        lr=caught(zk.RankError, lambda: train(model, lr)),
        start=caught(zk.RankError, lambda: train(*_first_differs(rank))),
        step=caught(zk.RankError, lambda: _one_step_ahead(rank)),
    )


def _first_differs(rank):
    model = network()
    model[0].weight.requires_grad_(False)
    if rank == 1:
        model[0].weight.data.neg_()
    return model, make(model)


def _one_step_ahead(rank):
    model = network()
    opt = make(model)
    train(model, opt, [0])
    opt.param_groups[0]["step"] += rank == 1
    train(model, opt, [1])


def refused():
    model, world = network(), dist.get_world_size()
    deep = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    queries = make(model, num_queries=world + 1, parallel="query")
    return dict(
        hybrid=caught(
            ValueError, lambda: zk.HybridZO(deep, 1, lambda p: torch.optim.SGD(p, lr=0.1))
        ),
        queries=caught(ValueError, lambda: train(model, queries)),
        layout=caught(ValueError, lambda: zk.Distributed(data=world + 1)),
        unknown=caught(ValueError, lambda: make(model, parallel="model")),
    )


def recorded(out):
    """Four steps, of which two are cut off again and made anew."""
    model = network(torch.float32)
    opt = make(model, "adam", num_queries=4, parallel="query")
    opt.record(out / f"run-{dist.get_world_size()}.zk")
    taken = caught(zk.TrajectoryError, lambda: make(network(), num_queries=4).record(out / "taken"))
    train(model, opt, dtype=torch.float32)
    opt.trajectory.close()
    return dict(weights=weights(model), taken=taken)


def resumed(out):
    """Goes on with a run that two processes began, and one step further."""
    model = network(torch.float32)
    opt = make(model, "adam", num_queries=4, parallel="query")
    missing = caught(zk.TrajectoryError, lambda: opt.resume(out / "nothing.zk"))
    opt.resume(out / "run.zk", until=3)
    train(model, opt, range(3, STEPS + 1), dtype=torch.float32)
    opt.trajectory.close()
    return dict(weights=weights(model), missing=missing)


def killed(out):
    """Rank 1 dies in its sixth forward, the second one of step 2."""
    model = network(torch.float32)
    opt = make(model, num_queries=2, parallel="query")
    opt.record(out / "run.zk")
    forwards = 0

    def closure():
        nonlocal forwards
        forwards += 1
        if dist.get_rank() == 1 and forwards == 6:
            (out / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch(opt.param_groups[0]["step"], dtype=torch.float32)
        return nn.functional.mse_loss(model(x), y)

    while True:
        opt.step(closure)


def begin(case, rank, world, port, out):
    """A process, where there is no torchrun: what that would have set, and then the case."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        # Long enough for a machine that stands still for a while, and shorter than for ever.
        dist.init_process_group("gloo", timeout=timedelta(seconds=240))
        case(out)
        dist.destroy_process_group()
    except BaseException:
        (out / f"error-{rank}").write_text(traceback.format_exc())
        raise
    # Threads of a group that torch still holds may abort an interpreter that ends by itself.
    os._exit(0)

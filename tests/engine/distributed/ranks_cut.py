"""What each process does with weights that are cut over all of them."""

import torch
import torch.distributed as dist
from ranks import (
    OPTIMIZERS,
    STEPS,
    asked,
    batch,
    both,
    caught,
    data,
    failing,
    make,
    network,
    not_finite,
    other_settings,
    query,
    recorded,
    refused,
    resumed,
    straying,
    traffic,
    train,
    two_runs,
    weights,
)
from torch import nn

import zokernels as zk

SHARDED = {
    "sgd": dict(),
    "one-sided": dict(),
    "momentum": dict(),
    "adam": dict(),
    "conservative": dict(),
    "blocks": dict(),
    "sparse": dict(),
    "in-place": dict(),
    "rank1-in-place": dict(mask=zk.masks.Random([0.5, 0.9, 0.1, 0.7], seed=9)),
    "sign": dict(mask=zk.masks.Random([0.5, 0.9, 0.1, 0.7], seed=9)),
}

# Arguments of a pass over four tensors that are none.
LISTS = (
    dict(streams=[1, 2, 3]),
    dict(dist="rank1", columns=[6] * 5),
    dict(dist="rank1", columns=6),
    dict(columns=[6, 0, 7, 0]),
)
IN_16_BITS = dict(state_dtype=torch.bfloat16, rounding="stochastic", lr=0.1)


def sharded(model, mesh=None, root_only=False):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in () if root_only else (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(name):
    """All processes on the same batch: what one process makes of it, bit for bit."""
    model = sharded(network(), root_only=name == "adam")
    # What a user's evaluation leaves gathered must not be trained.
    with torch.no_grad():
        model(batch(0)[0])
    opt = make(model, name, **SHARDED[name])
    losses = train(model, opt)
    return dict(
        weights=weights(model),
        losses=losses,
        held=sum(p.to_local().numel() for p in model.parameters()),
    )


def fsdp_16_bit(name):
    model = sharded(network(torch.bfloat16))
    opt = make(model, name, **IN_16_BITS)
    train(model, opt, [0, 1], dtype=torch.bfloat16)
    again = make(model, name, **IN_16_BITS)
    again.load_state_dict(opt.state_dict())
    train(model, again, [2, 3], dtype=torch.bfloat16)
    return dict(weights=weights(model))


def fsdp_shares():
    """Each process on its share; beside it the same with whole weights."""
    found = {}
    for kind in ("sharded", "whole"):
        model = network()
        model = sharded(model) if kind == "sharded" else model
        opt = make(model)
        train(model, opt, share=opt.parallel.data_rank, shares=opt.parallel.data)
        found[kind] = weights(model)
    return found


def fsdp_interrupted():
    """An exception in the middle of a forward, in every process; then the run goes on."""
    model = sharded(network())
    opt = make(model)
    train(model, opt, [0])
    before = weights(model)
    hook = model[1].register_forward_hook(_interrupt)
    message = caught(KeyError, lambda: train(model, opt, [1]))
    hook.remove()
    same = all(map(torch.equal, before, weights(model)))
    train(model, opt, range(1, STEPS))
    return dict(message=message, same=same, weights=weights(model))


def _interrupt(module, args, output):
    raise KeyError("interrupted")


def fsdp_not_finite():
    """One process's loss is not finite; the others' forwards must not wait for its next one."""
    model = sharded(network())
    opt = make(model, num_queries=2)
    before = weights(model)
    last = dist.get_rank() == 1
    opt.step(lambda: model(batch(0)[0]).mean() / (0.0 if last else 1.0))
    return dict(same=all(map(torch.equal, before, weights(model))), bad=opt.bad_steps)


def fsdp_recorded(out, name):
    model = sharded(network())
    opt = make(model, name)
    path = out / f"sharded-{name}-{dist.get_world_size()}.zk"
    opt.record(path)
    train(model, opt)
    opt.trajectory.close()
    done = weights(model)
    model = sharded(network())
    opt = make(model, name)
    opt.resume(path, until=2)
    train(model, opt, range(2, STEPS))
    opt.trajectory.close()
    return dict(weights=done, resumed=weights(model))


def fsdp_refused():
    model = sharded(network())
    bits = zk.masks.Bits([torch.ones(p.shape, dtype=torch.bool) for p in network().parameters()])
    cut = list(model.parameters())
    return dict(
        on_entry=caught(ValueError, lambda: make(model, perturb="on_entry")),
        forward=caught(ValueError, lambda: make(model, "forward")),
        query=caught(
            ValueError, lambda: train(model, make(model, num_queries=4, parallel="query"))
        ),
        bits=caught(ValueError, lambda: train(model, make(model, mask=bits))),
        lists=[
            caught(
                (ValueError, TypeError), lambda how=how: zk.ops.add_noise_(cut, [1], [1.0], **how)
            )
            for how in LISTS
        ],
    )


def hsdp():
    """Two copies of the weights, each cut in two; each copy has its own directions."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("query", "data"))
    model = sharded(network(), mesh)
    opt = make(model, num_queries=4, parallel=zk.Distributed(query=2))
    train(model, opt, share=opt.parallel.data_rank, shares=2)
    done = weights(model)
    if dist.get_rank() == 3:
        next(model.parameters()).to_local().data.view(-1)[:1].add_(1.0)
    opt.parallel.check_every = 1
    return dict(weights=done, stray=caught(zk.RankError, lambda: train(model, opt, [STEPS])))


def tensor_parallel(two_dimensional):
    """The first layer cut by rows, the last by columns; then also FSDP over that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    world = dist.get_world_size()
    shape = (2, world // 2) if two_dimensional else (1, world)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    plain.load_state_dict(model.state_dict())
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(model, mesh["tensor"], plan)
    if two_dimensional:
        model = sharded(model, mesh["data"])
    moved, wanted = [], []
    for kind in ("gaussian", "rank1"):
        with zk.perturbed(model, 7, 0.1, dist=kind):
            moved += weights(model)
        with zk.perturbed(plain, 7, 0.1, dist=kind, perturb="in_place"):
            wanted += weights(plain)
    opts = [make(m, "adam") for m in (model, plain)]
    losses = [train(m, opt) for m, opt in zip((model, plain), opts, strict=True)]
    return dict(
        placements=[str(p.placements) for p in model.parameters()],
        moved=moved,
        wanted=wanted,
        losses=losses,
        weights=weights(model),
        plain=weights(plain),
    )


def uneven():
    """Shards in any dimension of a tensor whose sizes nothing divides; each is told its place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    placements = [[p] for p in (Shard(0), Shard(1), Shard(-1), Replicate())]
    meshes = [(line, placed) for placed in placements]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2))
        meshes += [(grid, placed) for placed in ([Shard(0), Shard(1)], [Shard(1), Shard(0)])]
    same = {}
    for kind in ("gaussian", "rank1"):
        for shape in ((5, 9), (5, 9, 3), (5, 3, 2, 3)):
            for mesh, placed in meshes:
                where = f"{kind} {shape} {placed}"
                same[where] = all(
                    torch.equal(cut.full_tensor(), plain)
                    for cut, plain in _passes_over(
                        shape, lambda t, m=mesh, p=placed: distribute_tensor(t, m, p), kind
                    )
                )
    return same


def _passes_over(shape, cut, kind):
    """A tensor after two passes, and its state: cut over the processes, and whole."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    how = dict(dist=kind, streams=[2], mask=zk.masks.Random(0.7, 1), decay=0.99)
    found = []
    for place in (cut, lambda whole: whole):
        weight, m = place(start.clone()), place(torch.zeros(shape))
        zk.ops.add_noise_([weight], [3, 4], [0.5, 1.0], **how)
        zk.ops.apply_update_(
            [weight], [{"m": m}], "momentum", [5, 6], [0.25, -1.0], lr=0.1, beta=0.9, **how
        )
        found.append((weight, m))
    return zip(*found, strict=True)


def main(out):
    """Every case, of whole weights and of cut ones."""
    world = dist.get_world_size()
    found = {f"data {name}": data(name) for name in OPTIMIZERS}
    found |= {f"query {name}": query(name) for name in OPTIMIZERS}
    cases = (asked, traffic, not_finite, failing, straying, other_settings, refused, uneven,
             fsdp_shares, fsdp_interrupted, fsdp_not_finite, fsdp_refused)  # fmt: skip
    found |= {case.__name__: case() for case in cases}
    found |= {f"fsdp {name}": fsdp(name) for name in SHARDED}
    found |= {f"16 bits {name}": fsdp_16_bit(name) for name in ("adam", "rank1-in-place")}
    found |= {case.__name__: case(out) for case in (recorded, resumed)}
    found |= {f"recorded {n}": fsdp_recorded(out, n) for n in ("momentum", "rank1-in-place")}
    found["tensor parallel"] = tensor_parallel(two_dimensional=False)
    if world == 4:
        found |= {"both": both(), "hsdp": hsdp(), "two_runs": two_runs(out)}
        found["tensor parallel and fsdp"] = tensor_parallel(two_dimensional=True)
    torch.save(found, out / f"{world}-{dist.get_rank()}.pt")

"""What 16-bit weights do to an estimate and to an update, measured: ``python -m bench.numerics``.

On a small network, trained first and then rounded to the type, so that float32 and 16 bits start
from the same numbers. Writes bench/results/numerics.csv; `make report` makes the tables
of docs/numerics.md from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import nn

import zokernels as zk
from zokernels.lab.benchmarks import machine, results

RESULTS = results.FOLDER / "numerics.csv"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCALES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
UPDATES = (1e-2, 1e-3, 1e-4, 1e-5)
DIRECTIONS = 300
COLUMNS = (
    "date", "commit", "machine", "python", "torch", "experiment", "dtype", "rounding", "forward",
    "scale", "gain", "gain_error", "noise", "unmoved",
)  # fmt: skip


class Problem:
    """A trained network of 20,000 weights of a type, its batch, and its gradient in float64."""

    def __init__(self, dtype: torch.dtype):
        torch.manual_seed(0)
        width, classes = 96, 8
        layers: list[nn.Module] = [nn.Linear(24, width)]
        for _ in range(2):
            layers += [nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width)]
        net = nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, classes))
        self.x, self.y = torch.randn(256, 24), torch.randint(classes, (256,))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(self.x), self.y).backward()
            optimizer.step()
        self.narrow = net.to(dtype).requires_grad_(False)
        self.weights = [p.clone() for p in self.narrow.parameters()]
        self.wide = _like(net, torch.float32)
        exact = _like(net, torch.float64).requires_grad_(True)
        nn.functional.cross_entropy(exact(self.x.double()), self.y).backward()
        self.gradient = [p.grad for p in exact.parameters()]
        self.slopes: dict[tuple[int, str], float] = {}

    def slope(self, seed: int, dist: str = "gaussian") -> float:
        """The directional derivative ∇L · z."""
        if (seed, dist) in self.slopes:
            return self.slopes[seed, dist]
        z = (
            zk.noise.rank1(g.shape, seed=seed, stream=i)
            if dist == "rank1"
            else zk.noise.gaussian(g.numel(), seed=seed, stream=i).view_as(g)
            for i, g in enumerate(self.gradient)
        )
        total = sum(float((g * zi.double()).sum()) for g, zi in zip(self.gradient, z, strict=True))
        return self.slopes.setdefault((seed, dist), total)

    def perturb(self, seed: int, scale: float, rounding: str) -> None:
        """Put θ + scale · z into the narrow network, or unrounded into the wide one ("none")."""
        net = self.wide if rounding == "none" else self.narrow
        dtype = next(net.parameters()).dtype
        zk.ops.add_noise(
            [w.to(dtype) for w in self.weights],
            [p.data for p in net.parameters()],
            [seed],
            [scale],
            rounding="nearest" if rounding == "none" else rounding,
            rounding_seed=2 * seed + (scale < 0),
        )

    def loss(self, forward: str, rounding: str) -> float:
        """The loss of the perturbed network, run in float32 or in the weights' own type."""
        if forward == "float32" and rounding != "none":
            for p, narrow in zip(self.wide.parameters(), self.narrow.parameters(), strict=True):
                p.data.copy_(narrow)
        net = self.wide if forward == "float32" else self.narrow
        logits = net(self.x.to(next(net.parameters()).dtype))
        # The loss itself is taken in float32 in all of them, as causal LMs do.
        return float(nn.functional.cross_entropy(logits.float(), self.y))


def _like(net: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    copy = nn.Sequential(*[type(m)(*_shape(m)) for m in net]).to(dtype)
    copy.load_state_dict(net.state_dict())
    return copy.requires_grad_(False)


def _shape(m: nn.Module) -> tuple:
    if isinstance(m, nn.Linear):
        return m.in_features, m.out_features
    return (m.normalized_shape,) if isinstance(m, nn.LayerNorm) else ()


def estimates(
    problem: Problem, eps: float, rounding: str, forward: str, directions: int
) -> dict[str, float]:
    """The two-sided estimate against the directional derivative, over many directions.

    gain: the factor by which the mean estimate, along the gradient, is too long, E[d (∇L·z)] over
    E[(∇L·z)²]; 1 is unbiased. noise: what remains of d, over the deviation of ∇L·z. unmoved:
    weights for which θ + εz and θ − εz round to one number.
    """
    found, true, same = [], [], 0.0
    for seed in range(directions):
        sides, moved = [], []
        for sign in (1, -1):
            problem.perturb(seed, sign * eps, rounding)
            sides.append(problem.loss(forward, rounding))
            net = problem.wide if rounding == "none" else problem.narrow
            moved.append(torch.cat([p.data.flatten() for p in net.parameters()]))
        found.append((sides[0] - sides[1]) / (2 * eps))
        true.append(problem.slope(seed))
        same += (moved[0] == moved[1]).double().mean().item() / directions
    return {**against(found, true), "unmoved": same}


@torch.no_grad()
def along_rank1(problem: Problem, eps: float, way: str, directions: int) -> dict[str, float]:
    """The two-sided estimate along rank one against the directional derivative, as `estimates`.

    Args:
        problem: The network.
        eps: ε.
        way: Weights and forward in float32 ("float32"); or in 16 bits, the weights perturbed and
            rounded ("whole") or as they are stored and two vectors a matrix ("vectors").
        directions: How many.
    """
    net = problem.wide if way == "float32" else problem.narrow
    for p, w in zip(net.parameters(), problem.weights, strict=True):
        p.copy_(w)
    mode = "on_entry" if way == "vectors" else "in_place"
    found, true = [], []
    # Only what is trained is perturbed.
    net.requires_grad_(True)
    for seed in range(directions):
        sides = []
        for scale in (eps, -eps):
            with zk.perturbed(net, seed, scale, dist="rank1", perturb=mode):
                logits = net(problem.x.to(next(net.parameters()).dtype))
            sides.append(float(nn.functional.cross_entropy(logits.float(), problem.y)))
        found.append((sides[0] - sides[1]) / (2 * eps))
        true.append(problem.slope(seed, "rank1"))
    net.requires_grad_(False)
    return against(found, true)


def updates(problem: Problem, size: float, rounding: str, directions: int) -> dict[str, float]:
    """An update of ``size`` of the weights' deviation, against the one meant.

    Each query's update c z starts from the same weights; gain and noise as for `estimates`, of
    what was added to a weight against c z.
    """
    deviation = torch.cat([w.float().flatten() for w in problem.weights]).std().item()
    c, got, meant = size * deviation, [], []
    for seed in range(directions):
        new = [w.clone() for w in problem.weights]
        zk.ops.add_noise_(new, [seed], [c], rounding=rounding, rounding_seed=seed)
        got += [
            (n.double() - w.double()).flatten() for n, w in zip(new, problem.weights, strict=True)
        ]
        meant += [
            zk.noise.gaussian(w.numel(), seed=seed, stream=i).double() * c
            for i, w in enumerate(problem.weights)
        ]
    a, b = torch.cat(got), torch.cat(meant)
    return {**against(a.tolist(), b.tolist()), "unmoved": (a == 0).double().mean().item()}


def restored(problem: Problem, steps: int) -> dict[str, float]:
    """The drift of weights perturbed by +ε, −2ε, +ε in place, at ε = 1e-3 and without an update."""
    weights = [w.clone() for w in problem.weights]
    for seed in range(steps):
        for c in (1e-3, -2e-3, 1e-3):
            zk.ops.add_noise_(weights, [seed], [c])
    a = torch.cat([w.double().flatten() for w in weights])
    b = torch.cat([w.double().flatten() for w in problem.weights])
    drift = ((a - b).square().mean() / b.square().mean()).sqrt().item()
    return {"noise": drift, "unmoved": (a == b).double().mean().item()}


def against(found: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """The regression of what was found on what is true, through the origin."""
    y, x = torch.tensor(found, dtype=torch.float64), torch.tensor(true, dtype=torch.float64)
    gain = (x * y).sum() / (x * x).sum()
    rest = y - gain * x
    error = ((x * rest).square().sum()).sqrt() / (x * x).sum()
    return {
        "gain": gain.item(),
        "gain_error": error.item(),
        "noise": (rest.square().mean() / x.square().mean()).sqrt().item(),
    }


def measure(directions: int) -> list[dict[str, object]]:
    """All rows."""
    about = machine.about()
    common = {k: about[k] for k in ("date", "commit", "machine", "python", "torch")}
    rows: list[dict[str, object]] = []

    def add(numbers: dict[str, float], **where: object) -> None:
        texts = {k: f"{v:.3g}" for k, v in numbers.items()}
        rows.append({**common, **where, **texts})
        print(*where.values(), texts, file=sys.stderr)

    for dtype, kind in DTYPES.items():
        problem = Problem(kind)
        for eps in SCALES:
            for rounding in ("none", "nearest", "stochastic"):
                for forward in ("float32", dtype) if rounding != "none" else ("float32",):
                    add(
                        estimates(problem, eps, rounding, forward, directions),
                        experiment="estimate", dtype=dtype, rounding=rounding,
                        forward="float32" if forward == "float32" else "16 bits", scale=eps,
                    )  # fmt: skip
            for way in ("float32", "whole", "vectors"):
                add(
                    along_rank1(problem, eps, way, directions), experiment=f"rank1, {way}",
                    dtype=dtype, rounding="nearest", forward="", scale=eps,
                )  # fmt: skip
        for size in UPDATES:
            for rounding in ("nearest", "stochastic"):
                add(
                    updates(problem, size, rounding, max(1, directions // 30)),
                    experiment="update", dtype=dtype, rounding=rounding, forward="", scale=size,
                )  # fmt: skip
        for steps in (1, 200):
            add(
                restored(problem, steps), experiment="restore", dtype=dtype, rounding="nearest",
                forward="", scale=steps,
            )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=__doc__)
    parser.add_argument("--directions", type=int, default=DIRECTIONS)
    options = parser.parse_args(arguments)
    results.write(RESULTS, COLUMNS, measure(options.directions))


if __name__ == "__main__":
    main()

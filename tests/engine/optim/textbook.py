"""The rules as a textbook has them, in plain tensors: what the optimizers are held to.

The order of operations is that of the documentation: in float32 each multiply–add is rounded once,
in float64 product and sum are.
"""

import torch

import zokernels as zk
from zokernels.estimators import derive_seed

# Estimator, directions, and how many forwards a step of them takes.
FORWARDS = [
    ("two_sided", 1, 2), ("two_sided", 3, 6), ("one_sided", 1, 2), ("one_sided", 4, 5),
    ("population", 2, 2), ("population", 5, 5),
]  # fmt: skip


def fma(c, x, acc):
    if acc.dtype is torch.float64:
        return c * x.double() + acc
    # The product of two binary32 numbers is exact in binary64.
    return (torch.tensor(c, dtype=acc.dtype).double() * x.double() + acc.double()).float()


def times(c, x):
    return torch.tensor(c, dtype=x.dtype) * x


def gradient(w, d, z):
    g = torch.zeros_like(w)
    for dk, zk_ in zip(d, z, strict=True):
        g = fma(dk / len(d), zk_, g)
    return g


def sgd(w, d, z, h, state, t):
    acc = times(1 - h["lr"] * h["weight_decay"], w)
    for dk, zk_ in zip(d, z, strict=True):
        acc = fma(-h["lr"] * dk / len(d), zk_, acc)
    return acc, {}


def sign(w, d, z, h, state, t):
    decayed = times(1 - h["lr"] * h["weight_decay"], w)
    return fma(-h["lr"], gradient(w, d, z).sign(), decayed), {}


def momentum(w, d, z, h, state, t):
    m = fma(h["beta"], state.get("m", torch.zeros_like(w)), gradient(w, d, z))
    return fma(-h["lr"], m, times(1 - h["lr"] * h["weight_decay"], w)), {"m": m}


def adam(w, d, z, h, state, t):
    (b1, b2), g, zero = h["betas"], gradient(w, d, z), torch.zeros_like(w)
    m = fma(b1, state.get("m", zero), times(1 - b1, g))
    v = fma(b2, state.get("v", zero), times(1 - b2, g) * g)
    new, lr, scale = {"m": m, "v": v}, h["lr"], 1.0
    if h.get("amsgrad", True):
        new["v_max"] = v = torch.maximum(state.get("v_max", zero), v)
    if h.get("bias_correction"):
        lr, scale = lr / (1 - b1 ** (t + 1)), 1 / (1 - b2 ** (t + 1))
    root = times(scale, v).double().sqrt().to(w.dtype)
    step = m / (root + torch.tensor(h["adam_eps"], dtype=w.dtype))
    return fma(-lr, step, times(1 - h["lr"] * h["weight_decay"], w)), new


class Textbook:
    """Runs a rule on parameters given as (stream, parameter, its numbers)."""

    def __init__(self, rule, params, loss, *, seed, q, estimator, dist, maximize, masks=None):
        self.rule, self.params, self.loss, self.seed = rule, params, loss, seed
        self.q, self.estimator, self.maximize = q, estimator, maximize
        self.draw = getattr(zk.noise, dist)
        # masks(t): the share kept by each parameter and the mask's seed, at step t.
        self.masks = masks or (lambda t: ([1.0] * len(params), 0))
        self.state = [{} for _ in params]

    def z(self, i, seed):
        stream, p, _ = self.params[i]
        return self.draw(p.numel(), seed=seed, stream=stream).view_as(p)

    def set(self, values):
        for (_, p, _), value in zip(self.params, values, strict=True):
            p.data = value

    def loss_at(self, values):
        self.set(values)
        with torch.no_grad():
            return float(self.loss())

    def step(self, t):
        seeds = [derive_seed(self.seed, t, k) for k in range(self.q)]
        stored = [p.detach().clone() for _, p, _ in self.params]
        keep = self.kept(t)
        z = [[self.z(i, s) for s in seeds] for i in range(len(stored))]

        def side(k, sign):
            moved = [fma(sign * h["eps"], z[i][k], w) for i, ((_, _, h), w) in enumerate(pairs)]
            return self.loss_at([torch.where(*a) for a in zip(keep, moved, stored, strict=True)])

        pairs = list(zip(self.params, stored, strict=True))
        base = self.loss_at(stored) if self.estimator == "one_sided" else None
        losses = [side(k, 1) for k in range(self.q)]
        if self.estimator == "two_sided":
            found = [(loss - side(k, -1)) / 2 for k, loss in enumerate(losses)]
        elif self.estimator == "one_sided":
            found = [loss - base for loss in losses]
        else:
            # Each against the mean of the others.
            q = self.q
            found = [(loss - sum(losses) / q) * q / (q - 1) for loss in losses]
        self.set(self.update(stored, found, z, keep, t))

    def update(self, stored, found, z, keep, t):
        new = []
        for i, (_, _, h) in enumerate(self.params):
            d = [(-x if self.maximize else x) / h["eps"] for x in found]
            w, state = self.rule(stored[i], d, z[i], h, self.state[i], t)
            for name, x in state.items():
                old = self.state[i].get(name, torch.zeros_like(x))
                self.state[i][name] = torch.where(keep[i], x, old)
            new.append(torch.where(keep[i], w, stored[i]))
        return new

    def kept(self, t):
        shares, seed = self.masks(t)
        return [
            zk.noise.mask(p.numel(), share, seed=seed, stream=stream).view_as(p)
            for share, (stream, p, _) in zip(shares, self.params, strict=True)
        ]


class Conservative(Textbook):
    """Of θ and the two steps, the one of lowest loss (highest, if maximized); θ on a tie."""

    def update(self, stored, found, z, keep, t):
        best, chosen = self.loss_at(stored), stored
        for side in (1, -1):
            moved = super().update(stored, [side * x for x in found], z, keep, t)
            loss = self.loss_at(moved)
            if loss > best if self.maximize else loss < best:
                best, chosen = loss, moved
        return chosen

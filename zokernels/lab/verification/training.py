"""Whole runs: every way to perturb gives the losses and weights of a plain one."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch

import zokernels as zk
from zokernels import noise
from zokernels.estimators import derive_seed
from zokernels.lab.verification import model as models
from zokernels.lab.verification.case import Case, Failed
from zokernels.lab.verification.difference import first_difference

# Every value of an optimizer's `perturb`.
MODES = ("on_entry", "paired", "in_place")

RULES: dict[str, dict[str, Any]] = {
    "ZOSGD": dict(lr=3e-3),
    "ZOSGDSign": dict(lr=1e-3),
    "ZOSGDMomentum": dict(lr=1e-3),
    "ZOAdam": dict(lr=1e-2),
    "ZOSGDConservative": dict(lr=3e-3),
}
_SETTINGS = dict(eps=1e-2, num_queries=2, weight_decay=0.1, seed=2**63 + 7)
_STEPS, _DRIFT_STEPS, _FALL_STEPS = 3, 200, 40
# Roundings of binary64 in a loss of 3, over 2ε = 0.02 and for a few steps, are some 1e-13.
_NEAR = 1e-9

Run = tuple[list[str], list[torch.Tensor]]


def cases(devices: list[str], deep: bool) -> Iterator[Case]:
    """Runs of every rule and mode against a plain one, and of the simplest against a textbook."""
    for device in devices:
        for name in [name for name, reason in models.names().items() if reason is None]:
            rules = list(RULES) if deep or name == "module" else ["ZOSGD"]
            dtypes = ("float32", "bfloat16", "float16") if deep else ("float32", "bfloat16")
            for rule, dtype in itertools.product(rules, dtypes):
                for mode in MODES:
                    run = functools.partial(_equal, name, rule, dtype, mode, device)
                    yield Case(f"training/{device}/{name}/{rule}/{dtype}/{mode}", run)
            for mode in MODES:
                at = functools.partial(_textbook, name, mode, device)
                yield Case(f"training/{device}/{name}/textbook/{mode}", at)
            yield from _along_rank1(f"training/{device}/{name}/rank1", name, device)
        falls = functools.partial(_falls, device)
        yield Case(f"training/{device}/module/loss_falls", falls)


def _along_rank1(id: str, name: str, device: str) -> Iterator[Case]:
    """Runs along directions of rank one, whose forwards need not perturb weights."""
    written_out = functools.partial(_textbook, name, "in_place", device, "rank1")
    yield Case(f"{id}/textbook", written_out)
    for dtype in ("float32", "bfloat16"):
        run = functools.partial(_equal, name, "ZOSGD", dtype, "in_place", device, "rank1")
        yield Case(f"{id}/{dtype}/in_place", run)
    for mode in ("on_entry", "paired"):
        yield Case(f"{id}/float64/{mode}", functools.partial(_near, name, mode, device))


def drift(devices: list[str]) -> Iterator[Case]:
    """At learning rate 0 the weights stay, also where a forward raises."""
    for device in devices:
        for dtype in ("bfloat16", "float16"):
            for mode in MODES:
                run = functools.partial(_stays, dtype, mode, device)
                yield Case(f"drift/{device}/{dtype}/{mode}/steps", run)
                run = functools.partial(_survives, dtype, mode, device)
                yield Case(f"drift/{device}/{dtype}/{mode}/exception", run)


def make(rule: str, model: torch.nn.Module, dtype: str, **other: Any) -> Any:
    """An optimizer with the settings of all runs here."""
    rounding = "stochastic" if "16" in dtype else "nearest"
    return getattr(zk, rule)(model, **{**_SETTINGS, **RULES[rule], "rounding": rounding, **other})


def weights_of(model: torch.nn.Module) -> Run:
    """Names and copies of a model's parameters."""
    named = dict(model.named_parameters())
    return list(named), [p.detach().clone() for p in named.values()]


def run(
    name: str, rule: str, dtype: str, mode: str, device: str, dist: str, backend: str | None
) -> Run:
    """Losses and weights of a short run."""
    model, loss = models.build(name, dtype, device)
    optimizer = make(rule, model, dtype, perturb=mode, dist=dist, backend=backend)
    losses = [float(optimizer.step(loss)) for _ in range(_STEPS)]
    names, tensors = weights_of(model)
    return ["losses", *names], [torch.tensor(losses, dtype=torch.float64), *tensors]


# The modes of a rule come one after the other.
@functools.lru_cache(maxsize=1)
def _plain(name: str, rule: str, dtype: str, device: str, dist: str) -> Run:
    return run(name, rule, dtype, "in_place", device, dist, "reference")


def _equal(name: str, rule: str, dtype: str, mode: str, device: str, dist: str = "gaussian") -> str:
    names, expected = _plain(name, rule, dtype, device, dist)
    _, got = run(name, rule, dtype, mode, device, dist, None)
    compare(names, expected, got, "a run in place with the reference gives other numbers")
    return ""


def _near(name: str, mode: str, device: str) -> str:
    """Stored weights and two vectors a matrix: the same sums, in another order."""
    names, expected = _plain(name, "ZOSGD", "float64", device, "rank1")
    _, got = run(name, "ZOSGD", "float64", mode, device, "rank1", None)
    apart = [float((e - g.cpu()).abs().max()) for e, g in zip(expected, got, strict=True)]
    for n, error in zip(names, apart, strict=True):
        if not error < _NEAR:
            raise Failed(
                f"{n} is {error:.1e} from that of a run in place with the reference; less than "
                f"{_NEAR} is allowed."
            )
    return f"at most {max(apart):.0e} apart"


def compare(names: list[str], expected: Any, got: Any, sentence: str) -> None:
    """Raise Failed with the sentence and the first difference, if there is one."""
    difference = first_difference(names, expected, got)
    if difference:
        raise Failed(f"{sentence}: {difference}", difference)


@torch.no_grad()
def _textbook(name: str, mode: str, device: str, dist: str = "gaussian") -> str:
    """ZO-SGD written out: a direction, two losses, a step."""
    model, loss = models.build(name, "float32", device)
    params, lr, eps, losses = list(model.parameters()), 3e-3, 1e-2, []
    for t in range(_STEPS):
        seed = derive_seed(11, t, 0)
        z = [_direction(p, dist, seed, i) for i, p in enumerate(params)]
        stored, sides = [p.clone() for p in params], []
        for side in (1, -1):
            for p, w, direction in zip(params, stored, z, strict=True):
                p.copy_(_fma(side * eps, direction, w))
            sides.append(float(loss()))
        losses.append((sides[0] + sides[1]) / 2)
        slope = (sides[0] - sides[1]) / 2 / eps
        for p, w, direction in zip(params, stored, z, strict=True):
            p.copy_(_fma(-lr * slope, direction, w))
    names, expected = weights_of(model)
    model, loss = models.build(name, "float32", device)
    optimizer = zk.ZOSGD(model, lr=lr, eps=eps, seed=11, dist=dist, perturb=mode)
    found = [optimizer.step(loss) for _ in range(_STEPS)]
    assert all(isinstance(x, torch.Tensor) for x in found)
    expected = [torch.tensor(losses), *expected]
    got = [torch.stack(found).cpu(), *weights_of(model)[1]]
    compare(["losses", *names], expected, got, "ZO-SGD written out gives other numbers")
    return ""


def _direction(p: torch.Tensor, dist: str, seed: int, stream: int) -> torch.Tensor:
    if dist == "rank1":
        return noise.rank1(p.shape, seed=seed, stream=stream, device=p.device)
    return noise.gaussian(p.numel(), seed=seed, stream=stream, device=p.device).view_as(p)


def _fma(c: float, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    # The product of two binary32 numbers is exact in binary64.
    return (float(torch.tensor(c)) * z.double() + w.double()).float()


def _falls(device: str) -> str:
    model, loss = models.build("module", "float32", device)
    optimizer = make("ZOSGD", model, "float32", num_queries=8, weight_decay=0.0)
    with torch.no_grad():
        before = float(loss())
        for _ in range(_FALL_STEPS):
            optimizer.step(loss)
        after = float(loss())
    if not after < 0.9 * before:
        raise Failed(f"the loss went from {before:.4f} to {after:.4f} in {_FALL_STEPS} steps.")
    return f"{before:.3f} to {after:.3f} in {_FALL_STEPS} steps"


def _stays(dtype: str, mode: str, device: str) -> str:
    model, loss = models.build("module", dtype, device)
    names, before = weights_of(model)
    optimizer = make("ZOSGD", model, dtype, lr=0.0, perturb=mode, num_queries=1)
    for _ in range(_DRIFT_STEPS):
        optimizer.step(loss)
    what = f"the weights are not what they were {_DRIFT_STEPS} steps at learning rate 0 ago"
    compare(names, before, weights_of(model)[1], what)
    return f"{_DRIFT_STEPS} steps"


def _survives(dtype: str, mode: str, device: str) -> str:
    model, loss = models.build("module", dtype, device)
    names, before = weights_of(model)
    calls = 0

    def broken() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("a forward that breaks down")
        return loss()

    def hook(*_: object) -> None:
        if calls == 2:
            raise KeyError("a layer that breaks down")

    optimizer = make("ZOSGD", model, dtype, perturb=mode)
    handle = next(iter(model.children())).register_forward_hook(hook)
    with contextlib.suppress(KeyError):
        optimizer.step(broken)
    handle.remove()
    compare(names, before, weights_of(model)[1], "a forward raised, and the weights changed")
    return ""

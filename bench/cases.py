"""The passes that are timed: add_noise_, its memory floor and its peers, on the same weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from zokernels import ops
from zokernels.backends import native

NUMEL = int(os.environ.get("ZOKERNELS_BENCH_NUMEL", 50_000_000))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-3  # MeZO's usual step of the perturbation
SCALE = 1.0

Pass = Callable[[], object]


class Unavailable(Exception):
    """A case cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One pass over one tensor.

    Attributes:
        dtype: The weights' type, a key of `DTYPES`.
        dist: The noise, or "" for the floor, which adds none.
        name: What runs, as in the column ``case`` of the results.
        replaces: Whether the pass gives the weights new memory instead of writing in place.
        build: Makes the pass for one tensor, compiled and ready; raises `Unavailable`.
    """

    dtype: str
    dist: str
    name: str
    replaces: bool
    build: Callable[[torch.Tensor], Pass]

    def __str__(self) -> str:
        return "-".join(part for part in (self.dtype, self.dist, self.name) if part)


def cases() -> list[Case]:
    """Every case of this machine and build, by type: the floor, then ours, then the peers."""
    isas = native.instruction_sets() if native.why_missing() is None else []
    found = []
    for dtype in DTYPES:
        found.append(Case(dtype, "", "floor", False, _floor))
        for isa in reversed(isas):
            for dist in ("gaussian", "rademacher"):
                found.append(Case(dtype, dist, f"native-{isa}", False, _native(isa, dist)))
        found += [
            Case(dtype, "gaussian", "mezo", True, _mezo),
            Case(dtype, "gaussian", "mezo-inplace", False, _mezo_inplace),
            Case(dtype, "gaussian", "mezo-compiled", True, _mezo_compiled),
            Case(dtype, "gaussian", "mezo-inplace-compiled", False, _mezo_inplace_compiled),
        ]
    return found


def weights(dtype: str, numel: int) -> torch.Tensor:
    """Weights of a trained layer's size (standard deviation 0.02): float16 rounds some to zero."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(numel, generator=generator).mul_(0.02).to(DTYPES[dtype])


def _floor(p: torch.Tensor) -> Pass:
    # Reads and writes every weight once and computes next to nothing. A factor of exactly 1
    # could be skipped by some version of torch.
    return lambda: p.mul_(1.0000001)


def _native(isa: str, dist: str) -> Callable[[torch.Tensor], Pass]:
    def build(p: torch.Tensor) -> Pass:
        seeds = itertools.count()

        def run() -> None:
            before = os.environ.get("ZOKERNELS_ISA")
            os.environ["ZOKERNELS_ISA"] = isa
            try:
                ops.add_noise_([p], [next(seeds)], [SCALE * EPS], dist=dist, backend="native")
            finally:
                if before is None:
                    del os.environ["ZOKERNELS_ISA"]
                else:
                    os.environ["ZOKERNELS_ISA"] = before

        return run

    return build


def _published(p: torch.Tensor) -> torch.Tensor:
    # MeZO's perturbation as published: noise drawn in the weights' type, a new tensor each time.
    z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
    return p + SCALE * z * EPS


def _inplace(p: torch.Tensor) -> None:
    p.add_(torch.randn_like(p), alpha=SCALE * EPS)


def _mezo(p: torch.Tensor) -> Pass:
    return lambda: _assign(p, _published(p))


def _mezo_inplace(p: torch.Tensor) -> Pass:
    return lambda: _inplace(p)


def _mezo_compiled(p: torch.Tensor) -> Pass:
    compiled = _compile(_published, p)
    return lambda: _assign(p, compiled(p))


def _mezo_inplace_compiled(p: torch.Tensor) -> Pass:
    compiled = _compile(_inplace, p)
    return lambda: compiled(p)


def _compile(function: Callable, p: torch.Tensor) -> Callable:
    """The function compiled for this tensor's shape and type, so that no timing compiles."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") != "0":
        raise Unavailable("TORCHDYNAMO_DISABLE is set")
    # The full graph, so that a part left to eager mode is an error and not a slow peer.
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    try:
        compiled(p)
    except Exception as error:  # whatever stops the compiler is the reason to leave it out
        lines = str(error).strip().splitlines() or [""]
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {lines[0]}") from error
    return compiled


def _assign(p: torch.Tensor, value: torch.Tensor) -> None:
    p.data = value

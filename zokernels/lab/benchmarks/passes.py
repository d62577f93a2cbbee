"""The passes that are timed, each beside the floor that the bytes it moves set.

A floor reads and writes once every tensor that the pass reads and writes, and computes next to
nothing: ``p.mul_(c)`` on a CPU, a copy on a CUDA device.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zokernels import masks, ops
from zokernels.lab.benchmarks.shapes import Shaped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-3  # MeZO's usual step of the perturbation
LR = 1e-6
# State tensors of each rule; v_max is AMSGrad's.
STATES = {"add_noise_": 0, "add_noise": 0, "sign": 0, "momentum": 1, "adam": 2, "amsgrad": 3}
NARROW = "bfloat16 states"
FLOOR = "floor"

Pass = Callable[[], object]


class Unavailable(Exception):
    """A case cannot run here; the message says why."""


@dataclass
class Tensors:
    """The tensors of the passes, made when first asked for, and shared.

    Args:
        numel: Weights in a tensor.
        device: Where they are.
    """

    numel: int
    device: str = "cpu"
    _made: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """Of the weights as a matrix, whose rows are as long as usual, or of few as it is high."""
        return 1 << min(24, self.numel.bit_length() - 1) // 2

    def weights(self, dtype: str, replaced: bool = False) -> torch.Tensor:
        """Weights of a trained layer's size (standard deviation 0.02): float16 rounds some to zero.

        Passes in place share one tensor, whose memory no other pass replaces.
        """
        if ("weights", dtype, replaced) not in self._made:
            generator = torch.Generator(self.device).manual_seed(0)
            made = torch.empty(self.numel, device=self.device)
            made = made.normal_(std=0.02, generator=generator).to(DTYPES[dtype])
            self._made["weights", dtype, replaced] = made
        return self._made["weights", dtype, replaced]

    def states(self, count: int, dtype: str = "float32") -> list[torch.Tensor]:
        """The first of three state tensors, zeros."""
        for place in range(count):
            if ("state", dtype, place) not in self._made:
                made = torch.zeros(self.numel, dtype=DTYPES[dtype], device=self.device)
                self._made["state", dtype, place] = made
        return [self._made["state", dtype, place] for place in range(count)]

    def copies(self, count: int, dtype: str = "float32") -> list[torch.Tensor]:
        """Where a floor on a CUDA device copies the states to."""
        for place, state in enumerate(self.states(count, dtype)):
            if ("copy", dtype, place) not in self._made:
                self._made["copy", dtype, place] = torch.empty_like(state)
        return [self._made["copy", dtype, place] for place in range(count)]

    def bits(self) -> masks.Bits:
        """A mask of one bit a weight, half of them set."""
        if "bits" not in self._made:
            packed = torch.full((-(-self.numel // 8),), 0b01100101, dtype=torch.uint8)
            self._made["bits"] = packed.to(self.device)
        return masks.Bits([self._made["bits"]])


@dataclass(frozen=True)
class Case:
    """One pass over one tensor.

    Attributes:
        dtype: The weights' type, a key of `DTYPES`.
        op: What is done: a key of `STATES`.
        dist: The noise, or "" for a floor, which adds none.
        variant: What differs from the plain pass, or "".
        name: What runs, as in the column ``case`` of the results.
        build: Makes the pass, compiled and ready; raises `Unavailable`.
        seeds: Directions that the pass adds.
        peer: Whether it is what ours are compared with.
        shape: Of a Triton kernel's groups, where it is not that of the kernels' own table.
    """

    dtype: str
    op: str
    dist: str
    variant: str
    name: str
    build: Callable[[Tensors], Pass] = field(compare=False)
    seeds: int = 1
    peer: bool = False
    shape: str = ""

    def __str__(self) -> str:
        parts = (self.dtype, self.op, self.dist, self.variant, self.name, self.shape)
        return "-".join(part.replace(" ", "-") for part in parts if part)

    @property
    def floor(self) -> tuple[str, str, str]:
        """The type, op and variant of the floor that moves the same bytes."""
        op = self.op if STATES[self.op] else "add_noise_"
        return self.dtype, op, self.variant if self.variant == NARROW else ""

    @property
    def bytes_per_weight(self) -> int:
        """Bytes that the pass must read and write; a peer may move more."""
        state = 2 if self.variant == NARROW else 4
        return 2 * (DTYPES[self.dtype].itemsize + state * STATES[self.op])


def words(op: str, dist: str, *others: str) -> str:
    """A pass to be read: Gaussian noise goes without saying, and so does what is empty."""
    return ", ".join(filter(None, (op, dist if dist != "gaussian" else "", *others)))


def floors(dtype: str, device: str, full: bool) -> list[Case]:
    """The floor of each sum of bytes."""
    kinds = [("add_noise_", ""), ("momentum", ""), ("adam", "")]
    kinds += [("amsgrad", ""), ("adam", NARROW)] if full else []

    def build(op: str, variant: str) -> Callable[[Tensors], Pass]:
        def made(tensors: Tensors) -> Pass:
            state = "bfloat16" if variant else "float32"
            moved = [tensors.weights(dtype), *tensors.states(STATES[op], state)]
            if device.startswith("cuda"):
                out = [tensors.weights(dtype, replaced=True), *tensors.copies(STATES[op], state)]
                return lambda: [o.copy_(t) for o, t in zip(out, moved, strict=True)]
            # A factor of exactly 1 could be skipped by some version of torch.
            return lambda: [t.mul_(1.0000001) for t in moved]

        return made

    return [Case(dtype, op, "", variant, FLOOR, build(op, variant)) for op, variant in kinds]


def ours(dtype: str, backend: str, isa: str, full: bool) -> list[Case]:
    """The passes of one backend; ``isa`` names an instruction set of "native", or is empty."""
    name = f"{backend}-{isa}" if isa else backend
    found = []
    for op, dist, variant, seeds, keywords in _kinds(dtype, full):
        build = _build(dtype, op, dist, variant, seeds, keywords, backend, isa)
        found.append(Case(dtype, op, dist, variant, name, build, seeds))
    return found


def shaped(dtype: str, shapes: Sequence[Shaped]) -> list[Case]:
    """The Triton kernels' plain passes in groups of other shapes."""
    found = []
    for one in shapes:
        keywords: dict[str, Any] = {"amsgrad": True} if one.op == "amsgrad" else {}
        plain = _build(dtype, one.op, one.dist, "", 1, keywords, "triton", "")
        build = functools.partial(_in_groups, plain, one)
        found.append(Case(dtype, one.op, one.dist, "", "triton", build, shape=str(one)))
    return found


def _in_groups(build: Callable[[Tensors], Pass], shape: Shaped, tensors: Tensors) -> Pass:
    from zokernels.lab.benchmarks.instruments import groups

    run = build(tensors)

    def shaped_run() -> None:
        with groups.of(shape):
            run()

    try:
        shaped_run()
    except Exception as error:  # a group may take more of the device than it has
        raise Unavailable(f"a group of {shape} can't be launched: {error}") from error
    return shaped_run


def plain(dtype: str, backend: str, isa: str) -> list[Case]:
    """`add_noise_` of few kinds, for the instruction sets that are not the best."""
    chosen = ("", "16 seeds")
    return [
        c for c in ours(dtype, backend, isa, False) if c.op == "add_noise_" and c.variant in chosen
    ]


Kind = tuple[str, str, str, int, dict[str, Any]]


def _kinds(dtype: str, full: bool) -> list[Kind]:
    narrow = dtype != "float32"
    add, normal = "add_noise_", "gaussian"
    half = masks.Random(0.5, seed=3)
    kinds: list[Kind] = [(add, normal, "", 1, {}), (add, "rademacher", "", 1, {})]
    if narrow:
        kinds.append((add, normal, "stochastic", 1, {"rounding": "stochastic"}))
    kinds.append((add, normal, "random mask", 1, {"mask": half}))
    kinds.append((add, normal, "8 seeds", 8, {}))
    kinds.append((add, normal, "8 steps", 8, {"each_step": True}))
    rank1 = "rank1"
    kinds += [(add, rank1, "", 1, {}), (add, rank1, "16 seeds", 16, {})]
    if full:
        kinds.append((add, normal, "magnitude mask", 1, {"mask": masks.Magnitude(0.0135)}))
        kinds.append((add, normal, "bit mask", 1, {}))
        kinds.append((add, "rademacher", "8 seeds", 8, {}))
        kinds.append((add, "rademacher", "8 steps", 8, {"each_step": True}))
        for dist in (normal, "rademacher"):
            kinds += [("add_noise", dist, "", 1, {}), ("add_noise", dist, "8 seeds", 8, {})]
    for rule in ("sign", "momentum", "adam"):
        kinds.append((rule, normal, "", 1, {}))
    if full:
        kinds.append((add, rank1, "8 seeds", 8, {}))
        kinds.append((add, rank1, "8 steps", 8, {"each_step": True}))
        kinds += [(rule, rank1, "", 1, {}) for rule in ("sign", "momentum", "adam")]
        kinds.append(("amsgrad", normal, "", 1, {"amsgrad": True}))
        kinds.append(("adam", normal, NARROW, 1, {}))
        kinds.append(("adam", normal, "random mask", 1, {"mask": half}))
        if narrow:
            kinds.append(("adam", normal, "stochastic", 1, {"rounding": "stochastic"}))
    return kinds


def _build(
    dtype: str,
    op: str,
    dist: str,
    variant: str,
    seeds: int,
    keywords: dict[str, Any],
    backend: str,
    isa: str,
) -> Callable[[Tensors], Pass]:
    def build(tensors: Tensors) -> Pass:
        p = [tensors.weights(dtype)]
        fresh = itertools.count()
        named = dict(keywords, dist=dist, backend=backend)
        if dist == "rank1":
            named["columns"] = [tensors.columns]
        if variant == "bit mask":
            named["mask"] = tensors.bits()
        states = tensors.states(STATES[op], "bfloat16" if variant == NARROW else "float32")
        out = [tensors.weights(dtype, replaced=True)] if op == "add_noise" else []

        def run() -> None:
            directions = list(itertools.islice(fresh, seeds))
            coeffs = [EPS] * seeds
            if op == "add_noise_":
                ops.add_noise_(p, directions, coeffs, **named)
            elif op == "add_noise":
                ops.add_noise(p, out, directions, coeffs, **named)
            else:
                rule = "adam" if op == "amsgrad" else op
                ops.apply_update_(p, [states], rule, directions, coeffs, lr=LR, **named)

        return _with_isa(run, isa) if isa else run

    return build


def _with_isa(run: Callable[[], None], isa: str) -> Callable[[], None]:
    def chosen() -> None:
        before = os.environ.get("ZOKERNELS_ISA")
        os.environ["ZOKERNELS_ISA"] = isa
        try:
            run()
        finally:
            if before is None:
                del os.environ["ZOKERNELS_ISA"]
            else:
                os.environ["ZOKERNELS_ISA"] = before

    return chosen

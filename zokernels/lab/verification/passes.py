"""Every backend against the reference, bit for bit, in every combination of what a pass takes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from zokernels import masks, noise, ops
from zokernels.lab.verification.case import Case, Failed
from zokernels.lab.verification.difference import first_difference
from zokernels.lab.verification.engines import REFERENCE, Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DISTS = ("gaussian", "rademacher", "rank1")
MASKS = ("none", "random", "magnitude", "bits")
ROUNDINGS = ("nearest", "stochastic")
RULES: dict[str, dict[str, Any]] = {
    "sign": dict(rule="sign"),
    "momentum": dict(rule="momentum", beta=0.8),
    "adam": dict(rule="adam", betas=(0.85, 0.97), adam_eps=1e-6),
    "adam_corrected": dict(rule="adam", betas=(0.85, 0.97), adam_eps=1e-6, step=3),
    "amsgrad": dict(rule="adam", betas=(0.85, 0.97), adam_eps=1e-6, amsgrad=True),
}
# The states that `zk.ops.apply_update_` takes for each.
_STATES = {"sign": (), "momentum": ("m",), "adam": ("m", "v"), "amsgrad": ("m", "v", "v_max")}
LR, LRS = 0.02, [0.01, 0.03]
OPS = ("add_noise_", "add_noise", *RULES)

# Around a block of 8, a vector, a mask's byte and a Rademacher block of 128; none is aligned.
SIZES = (0, 1, 9, 129, 1003)
DEEP_SIZES = (0, 1, 7, 8, 9, 31, 127, 128, 1003, 4099, 20_011)
# Numbers of a block that carry into its high word, and places within a block.
_OFFSETS = (0, 3, 2**40 + 4095, 2**35 - 4, 129, 8 * 2**32 - 1)
_STREAMS = (5, 2**32 - 1, 0, 1, 2**31)
# Of rank one: no matrix, one column, rows that end in a vector, in a block or beyond it, one row.
# With the offsets above the numbers of rows' and of columns' blocks need their high words.
_COLUMNS = (0, 1, 3, 37, 131, 1003, 5003, 2**41)
# And one more tensor: kernels keep the signs of some thousand rows and columns at a time.
_MATRIX = 13_001


@dataclass(frozen=True)
class Spec:
    """A pass: one value of every axis."""

    op: str
    dtype: str
    dist: str
    mask: str
    rounding: str
    each_step: bool
    narrow_state: bool
    sizes: tuple[int, ...]

    @property
    def words(self) -> str:
        """Its part of a case's id."""
        steps = "each_step" if self.each_step else "once"
        state = ("bfloat16_state",) if self.narrow_state else ()
        parts = (self.op, self.dtype, self.dist, self.mask, self.rounding, steps, *state)
        return "/".join(parts)


def specs(deep: bool) -> list[Spec]:
    """All passes to run.

    All combinations of op, type, distribution, mask and rounding. Whether every seed is a step of
    its own, and the states' type, alternate, so that each value meets every other; deep, these two
    are combined with all, too.
    """
    common, found = DEEP_SIZES if deep else SIZES, []
    axes = itertools.product(OPS, DTYPES, DISTS, MASKS, ROUNDINGS)
    for op, dtype, dist, mask, rounding in axes:
        has_state = op in RULES and op != "sign"
        # Values by their place: parities of different sums are independent of one another.
        places = [OPS.index(op), list(DTYPES).index(dtype), DISTS.index(dist), MASKS.index(mask)]
        turn = sum(places) + ROUNDINGS.index(rounding)
        chosen = [(turn % 2 == 1, has_state and (turn // 2) % 2 == 1)]
        if deep:
            chosen = list(itertools.product((False, True), (False, True)[: 1 + has_state]))
        sizes = (*common, _MATRIX) if dist == "rank1" else common
        for each_step, narrow in chosen:
            found.append(Spec(op, dtype, dist, mask, rounding, each_step, narrow, sizes))
    return found


def pairwise(wanted: Sequence[Spec]) -> set[Spec]:
    """As few of the passes as hold every pair of values of two axes, chosen greedily."""
    pairs = {spec: set(itertools.combinations(enumerate(astuple(spec)), 2)) for spec in wanted}
    left = set().union(*pairs.values())
    chosen = set()
    while left:
        best = max(wanted, key=lambda spec: len(pairs[spec] & left))
        chosen.add(best)
        left -= pairs[best]
    return chosen


def cases(engines: Sequence[Engine], deep: bool) -> Iterator[Case]:
    """A case for each pass and engine; those of a pass follow one another.

    In an interpreter, a thousand times as slow, every pair of values, or deep, every combination.
    """
    wanted = specs(deep)
    few = pairwise(wanted) if not deep and any(e.interpreted for e in engines) else set()
    for spec in wanted:
        for engine in engines:
            if deep or not engine.interpreted or spec in few:
                run = functools.partial(check, spec, engine)
                yield Case(f"passes/{engine.name}/{spec.words}", run)


def check(spec: Spec, engine: Engine) -> str:
    """Raise Failed unless the engine gives the reference's bits."""
    names, expected = expect(spec)
    _, got = execute(spec, engine)
    difference = first_difference(names, expected, got)
    if difference:
        raise Failed(f"{engine.name} is not the reference: {difference}", difference)
    return ""


# The engines of a pass come one after the other, so one result is enough.
@functools.lru_cache(maxsize=1)
def expect(spec: Spec) -> tuple[list[str], list[torch.Tensor]]:
    """Names of the tensors that a pass leaves, and what the reference leaves in them."""
    return execute(spec, REFERENCE)


def execute(spec: Spec, engine: Engine) -> tuple[list[str], list[torch.Tensor]]:
    """Run a pass; returns the names and tensors of all that it may write, and of what it reads."""
    params, call = arguments(spec, engine.device)
    call["backend"] = engine.backend
    names = [f"params[{i}] ({p.numel()} elements)" for i, p in enumerate(params)]
    with engine.chosen():
        if spec.op == "add_noise_":
            ops.add_noise_(params, **call)
            return names, params
        if spec.op == "add_noise":
            out = [torch.zeros_like(p) for p in params]
            ops.add_noise(params, out, **call)
            # What is only read must stay as it is.
            return [n.replace("params", "out") for n in names] + names, [*out, *params]
        states = make_states(spec, params)
        lr = LRS if spec.each_step else LR
        ops.apply_update_(params, states, **RULES[spec.op], lr=lr, **call)
    names += [f"states[{i}][{k!r}]" for i, state in enumerate(states) for k in state]
    return names, [*params, *(t for state in states for t in state.values())]


def arguments(spec: Spec, device: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The weights of a pass and what the op takes besides."""
    count, dtype = len(spec.sizes), DTYPES[spec.dtype]
    params = [unaligned(n, dtype, i, device) for i, n in enumerate(spec.sizes)]
    call = dict(
        seeds=[3, 2**63 + 5, 7, 8],
        coeffs=[1e-3, -0.5, 2e-30, 0.25],
        streams=[_STREAMS[i % len(_STREAMS)] for i in range(count)],
        offsets=[_OFFSETS[i % len(_OFFSETS)] for i in range(count)],
        dist=spec.dist,
        mask=make_mask(spec.mask, params),
        decay=[0.99, 1.0] if spec.each_step else 0.99,
        rounding=spec.rounding,
        rounding_seed=[77, 2**64 - 1] if spec.each_step else 2**64 - 2,
        each_step=2 if spec.each_step else False,
    )
    if spec.dist == "rank1":
        # Under every mask and rounding each tensor has another number.
        turn = len(ROUNDINGS) * MASKS.index(spec.mask) + ROUNDINGS.index(spec.rounding)
        call["columns"] = [_COLUMNS[(i + turn) % len(_COLUMNS)] for i in range(count)]
    return params, call


def weights(numel: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    """Weights of many magnitudes, subnormals, zeros of both signs, infinities and NaN.

    They are made of the noise's integers by exact operations, so they are the same everywhere.
    """
    a, b = (noise.uniform16(numel, noise.MASK, seed, s, 0, device) for s in (1, 2))
    sign = 1.0 - 2.0 * (b >> 15).float()
    exponent = torch.exp2(((b & 0x7FFF) % 44 - 40).double()).float()
    w = sign * (1.0 + a.float() / 65536) * exponent
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3e38, 6e4, 1e-44], device=device
    )
    w[5::61] = special[torch.arange(w[5::61].numel(), device=device) % len(special)]
    return w.to(dtype)


def unaligned(numel: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    """`weights` whose storage starts 1 to 7 elements past an aligned address."""
    shift = seed % 7 + 1
    return torch.cat(
        [torch.zeros(shift, dtype=dtype, device=device), weights(numel, dtype, seed, device)]
    )[shift:]


def make_mask(kind: str, params: Sequence[torch.Tensor]) -> masks.Mask | None:
    """A mask of a kind for these tensors."""
    if kind == "random":
        return masks.Random([0.3 + 0.05 * i for i in range(len(params))], seed=2**40 + 9)
    if kind == "magnitude":
        return masks.Magnitude(0.01)
    if kind == "bits":
        kept = (noise.mask(p.numel(), 0.5, seed=3, stream=i) for i, p in enumerate(params))
        return masks.Bits([k.to(p.device) for k, p in zip(kept, params, strict=True)])
    return None


def make_states(spec: Spec, params: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """States in the middle of a run: m of both signs, v and its maximum not negative."""
    rule = RULES[spec.op]
    dtype = torch.bfloat16 if spec.narrow_state else torch.float32
    made = []
    for i, p in enumerate(params):
        state = {}
        for k, name in enumerate(_STATES["amsgrad" if rule.get("amsgrad") else rule["rule"]]):
            u = noise.uniform16(p.numel(), noise.MASK, 100 + k, i, 0, p.device)
            t = u.float() / 65536 - (0.5 if name == "m" else 0.0)
            state[name] = (t if name == "m" else 0.1 * t * t).to(dtype)
        made.append(state)
    return made

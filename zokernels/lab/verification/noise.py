"""The noise: published known answers, golden vectors, and the statistics of a large sample."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

import torch

from zokernels import masks, noise, ops
from zokernels.lab.verification.case import Case, Failed
from zokernels.lab.verification.difference import first_difference
from zokernels.lab.verification.engines import REFERENCE, Engine

_LOW32 = 0xFFFFFFFF
# Salmon et al., Random123, kat_vectors: "philox4x32 10". Key, counter, words.
KNOWN_ANSWERS = {
    "zeros": ((0,) * 2, (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((_LOW32,) * 2, (_LOW32,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def cases(engines: Sequence[Engine]) -> Iterator[Case]:
    """Known answers of the reference, and golden vectors of every engine."""
    for name in KNOWN_ANSWERS:
        yield Case(f"noise/reference/philox/{name}", functools.partial(_known_answer, name))
    for engine in (REFERENCE, *engines):
        for number, case in enumerate(golden()):
            # A number of kind 3 is not seen by itself outside the reference.
            if engine is REFERENCE or (case["kind"] != "rounding" and case["numel"]):
                run = functools.partial(_golden, case, engine)
                yield Case(f"noise/{engine.name}/golden/{case['kind']}/{number}", run)


@functools.cache
def golden() -> list[dict[str, Any]]:
    """The golden vectors of version 1."""
    text = resources.files("zokernels.lab.data").joinpath("noise_v1.json").read_text("utf-8")
    return json.loads(text)["cases"]


def _known_answer(name: str) -> str:
    key, counter, words = KNOWN_ANSWERS[name]
    got = noise.philox4x32(key, tuple(torch.tensor([c]) for c in counter))
    _compare("words", torch.tensor(words), torch.cat(got), "Philox4x32-10's published answer")
    return ""


def _golden(case: dict[str, Any], engine: Engine) -> str:
    where: dict[str, Any] = dict(
        seed=int(case["seed"]), stream=case["stream"], offset=int(case["offset"])
    )
    draw = _plain if engine is REFERENCE else functools.partial(_through_a_pass, engine)
    expected, got = _parsed(case), draw(case, where)
    _compare(f"{case['kind']} under {where}", expected, got, "the golden vector of version 1")
    return ""


def _compare(name: str, expected: torch.Tensor, got: torch.Tensor, what: str) -> None:
    difference = first_difference([name], [expected], [got])
    if difference:
        raise Failed(f"not {what}: {difference}", difference)


def _parsed(case: dict[str, Any]) -> torch.Tensor:
    kind, values = case["kind"], case["values"]
    if kind == "gaussian":
        numbers = [int(h, 16) for h in values.split()]
        signed = [n - (n >> 31 << 32) for n in numbers]
        return torch.tensor(signed, dtype=torch.int32).view(torch.float32)
    if kind == "rounding":
        return torch.tensor([int(h, 16) for h in values.split()])
    return torch.tensor([{"+": 1.0, "-": -1.0, "1": 1.0, "0": 0.0}[c] for c in values])


def _plain(case: dict[str, Any], where: dict[str, Any]) -> torch.Tensor:
    kind, numel = case["kind"], case["numel"]
    if kind == "mask":
        return noise.mask(numel, case["keep"], **where).float()
    if kind == "rounding":
        return noise.uniform16(numel, noise.ROUNDING, **where, device="cpu")
    if kind == "rank1":
        return noise.signs_of_rank1(numel, int(case["columns"]), **where, device="cpu")
    return (noise.gaussian if kind == "gaussian" else noise.rademacher)(numel, **where)


def _through_a_pass(engine: Engine, case: dict[str, Any], where: dict[str, Any]) -> torch.Tensor:
    """What a pass adds to zeros: the noise itself, and under a mask where it is not 0."""
    # Of a shape it is to know the columns by itself.
    p = torch.zeros(case.get("shape", [case["numel"]]), device=engine.device)
    masked, in_matrices = case["kind"] == "mask", case["kind"] == "rank1"
    mask = masks.Random(case["keep"], seed=where["seed"]) if masked else None
    columns = [int(case["columns"])] if in_matrices and "shape" not in case else None
    with engine.chosen():
        ops.add_noise_(
            [p], [where["seed"]], [1.0], streams=[where["stream"]], offsets=[where["offset"]],
            columns=columns, dist="rademacher" if masked else case["kind"], mask=mask,
            backend=engine.backend,
        )  # fmt: skip
    return p.abs().cpu() if masked else p.cpu()


def statistics(deep: bool) -> Iterator[Case]:
    """What a large sample, drawn by the fastest backend, must look like."""
    numel = 2**26 if deep else 2**22
    for name, judge in _JUDGES.items():
        yield Case(f"statistics/{name}", functools.partial(judge, numel))


@functools.lru_cache(maxsize=1)
def _sample(
    shape: int | tuple[int, int], dist: str, seed: int = 2**63 + 1, stream: int = 3
) -> torch.Tensor:
    p = torch.zeros(shape)
    ops.add_noise_([p], [seed], [1.0], streams=[stream], dist=dist)
    return p


def _bounded(ratios: Sequence[float]) -> str:
    """The largest of deviations in units of what a right sample exceeds once in a million times."""
    largest = max(map(abs, ratios))
    if not largest < 1:
        raise Failed(f"a deviation is {5 * largest:.2f} standard errors; at most 5 are allowed.")
    return f"at most {5 * largest:.1f} standard errors"


def _errors(deviations: torch.Tensor, error: float) -> list[float]:
    return [float(d) / (5 * error) for d in deviations.flatten()]


def _moments(numel: int) -> str:
    z, power, ratios = _sample(numel, "gaussian").double(), torch.ones(()).double(), []
    for k in range(1, 7):
        power = power * z
        normal = 0 if k % 2 else math.prod(range(1, k, 2))
        error = math.sqrt((math.prod(range(1, 2 * k, 2)) - normal**2) / numel)
        ratios += _errors(power.mean() - normal, error)
    return _bounded(ratios)


def _kolmogorov(numel: int) -> str:
    z = _sample(numel, "gaussian").sort().values.double()
    below = torch.arange(numel, dtype=torch.float64) / numel
    distance = float((torch.special.ndtr(z) - below).abs().max()) + 1 / numel
    # 2.3/√n bounds a right sample's distance but once in 20,000.
    bound = 2.3 / math.sqrt(numel)
    if distance > bound:
        raise Failed(f"the distance to the normal law is {distance:.2e}, allowed is {bound:.2e}.")
    return f"{distance:.1e} from the normal law, bound {bound:.1e}"


def _tails(numel: int) -> str:
    z, ratios = _sample(numel, "gaussian"), []
    for sigma in range(1, 6):
        share = float(torch.special.ndtr(torch.tensor(-float(sigma), dtype=torch.float64)))
        error = math.sqrt(numel * share * (1 - share))
        for side in (z > sigma, z < -sigma):
            ratios += _errors(side.sum() - numel * share, error)
    return _bounded(ratios)


def _correlations(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of every column of one with every column of the other."""
    a, b = a - a.mean(0), b - b.mean(0)
    spread = torch.outer((a * a).mean(0), (b * b).mean(0)).sqrt()
    return a.T @ b / len(a) / spread


def _neighbours(numel: int) -> str:
    z = _sample(numel, "gaussian").double().view(-1, 8)
    ratios = []
    for x in (z, z * z):
        within = _correlations(x, x)[~torch.eye(8, dtype=torch.bool)]
        across = _correlations(x[:-1], x[1:])
        for found in (within, across):
            ratios += _errors(found, 1 / math.sqrt(len(z)))
    return _bounded(ratios)


def _seeds(numel: int) -> str:
    numel, ratios = min(numel, 2**24), []
    one = _sample(numel, "gaussian", 42, 0).double()
    for seed, stream in ((43, 0), (42 + 2**32, 0), (42 + 2**63, 0), (42, 1), (42, 2**31)):
        other = _sample(numel, "gaussian", seed, stream).double()
        found = _correlations(
            torch.stack([one, one * one], 1), torch.stack([other, other * other], 1)
        )
        ratios += _errors(found, 1 / math.sqrt(numel))
    return _bounded(ratios)


def _signs(numel: int, vector: str = "") -> str:
    """Of kind 1, or of a rank-one direction's vector."""
    signs = _vector(numel, vector) if vector else _sample(numel, "rademacher")
    signs = _blocks_of(signs)
    if not bool((signs.abs() == 1).all()):
        raise Failed("a sign is neither +1 nor -1.")
    within = (signs.T @ signs / len(signs))[~torch.eye(128, dtype=torch.bool)]
    across = signs[:-1].T @ signs[1:] / (len(signs) - 1)
    error = 1 / math.sqrt(len(signs))
    ratios = _errors(within, error) + _errors(across, 1 / math.sqrt(len(signs) - 1))
    ratios += _errors(signs.mean(0), error)
    return _bounded(ratios + _errors(signs.mean(), 1 / math.sqrt(numel)))


def _blocks_of(signs: torch.Tensor) -> torch.Tensor:
    return signs.view(-1, 128).double()


def _vector(numel: int, vector: str) -> torch.Tensor:
    """The signs of a direction's rows, or of its columns, all times the only one of the other."""
    return _sample((numel, 1) if vector == "left" else (1, numel), "rank1").flatten()


def _vectors(numel: int) -> str:
    """Rows, columns and kind 1 under one seed: at the same places, and by places in a block."""
    kinds = [_vector(numel, v) for v in ("left", "right")] + [_sample(numel, "rademacher")]
    ratios = []
    for a, b in itertools.combinations(kinds, 2):
        ratios += _errors((a * b).double().mean(), 1 / math.sqrt(numel))
        found = _blocks_of(a).T @ _blocks_of(b) / (numel // 128)
        ratios += _errors(found, 1 / math.sqrt(numel // 128))
    return _bounded(ratios)


def _rectangles(numel: int) -> str:
    """The four corners of every rectangle multiply to 1."""
    side = math.isqrt(numel)
    z = _sample((side, side), "rank1")
    whole = torch.outer(z[:, 0], z[0]) * z[0, 0]
    _compare("a direction", whole, z, "the product of its first row and column")
    return ""


def _mask(numel: int) -> str:
    ratios = []
    for keep in (0.01, 0.2, 0.5, 0.95):
        p = torch.zeros(numel)
        mask = masks.Random(keep, seed=7)
        ops.add_noise_([p], [1], [1.0], dist="rademacher", mask=mask)
        share = round(keep * 65536) / 65536
        found = (p != 0).double().mean() - share
        ratios += _errors(found, math.sqrt(share * (1 - share) / numel))
    return _bounded(ratios)


def _rounding(dtype: torch.dtype, excess: float, share: float, numel: int) -> str:
    """Stochastic rounding of 1 + excess, which is this share of a step above 1."""
    p = torch.ones(numel, dtype=dtype)
    ops.add_noise_([p], [1], [0.0], decay=1 + excess, rounding="stochastic", rounding_seed=9)
    up = (p.float() > 1).double().mean() - share
    return _bounded(_errors(up, math.sqrt(share * (1 - share) / numel)))


_JUDGES: dict[str, Callable[[int], str]] = {
    "gaussian/moments": _moments,
    "gaussian/kolmogorov": _kolmogorov,
    "gaussian/tails": _tails,
    "gaussian/neighbours": _neighbours,
    "gaussian/seeds_and_streams": _seeds,
    "rademacher/signs": _signs,
    "rank1/left": functools.partial(_signs, vector="left"),
    "rank1/right": functools.partial(_signs, vector="right"),
    "rank1/left_and_right": _vectors,
    "rank1/rectangles": _rectangles,
    "mask/shares": _mask,
    # The step above 1 is 2⁻⁷ in bfloat16 and 2⁻¹⁰ in float16.
    "rounding/bfloat16": functools.partial(_rounding, torch.bfloat16, 2.0**-10, 1 / 8),
    "rounding/float16": functools.partial(_rounding, torch.float16, 2.0**-12, 1 / 4),
}

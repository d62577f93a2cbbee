"""Write the golden vectors of noise version 1; run it from anywhere.

Cases may be added. A case that is already in the file must come out as it stands there, or nothing
is written: recorded runs are replayed by these bits.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from zokernels import noise  # noqa: E402

FILE = Path(__file__).with_name("noise_v1.json")
PACKAGED = ROOT / "zokernels" / "lab" / "data" / "noise_v1.json"

# kind, seed, stream, offset, numel, keep
CASES = [
    ("gaussian", 0, 0, 0, 200, None),
    ("gaussian", 1 + (2 << 32), 0, 0, 9, None),
    ("gaussian", 2**32 - 1, 7, 3, 7, None),
    ("gaussian", 2**63 + 12345, 2**32 - 1, 8 * 2**31 + 5, 9, None),
    ("gaussian", 2**64 - 1, 2**31, 8 * 2**32 - 1, 9, None),
    ("gaussian", 2**63, 1, 8 * 2**32 + 8 * 77 + 1, 1, None),
    ("gaussian", 42, 3, 2**63 - 10, 9, None),
    ("gaussian", 42, 3, 5, 0, None),
    ("rademacher", 0, 0, 0, 200, None),
    ("rademacher", 2**63 + 12345, 2**32 - 1, 128 * 2**31 + 33, 9, None),
    ("rademacher", 2**32 + 1, 5, 128 * 2**32 - 101, 200, None),
    ("rademacher", 9, 1, 127, 1, None),
    ("mask", 0, 0, 0, 200, 0.5),
    ("mask", 2**63 + 12345, 2**32 - 1, 8 * 2**31 + 5, 200, 0.1),
    ("mask", 2**64 - 1, 4, 8 * 2**32 - 3, 200, 0.999),
    ("mask", 9, 1, 7, 7, 0.25),
    ("rounding", 0, 0, 0, 9, None),
    ("rounding", 2**63 + 12345, 2**32 - 1, 8 * 2**31 + 5, 9, None),
    ("rounding", 2**64 - 1, 4, 8 * 2**32 - 3, 9, None),
]

# Whole parameters along a direction of rank one: shape, seed, stream.
SHAPES = [
    ((3, 5), 1 + (2 << 32), 0),
    ((2, 131), 2**64 - 1, 2**31),
    ((131, 2), 2**63 + 12345, 2**32 - 1),
    ((1, 9), 2**32, 6),
    ((9, 1), 2**32, 6),
    ((2, 3, 7), 42, 3),
    ((5, 2, 3, 4), 42, 3),
    ((3, 2, 2, 2, 2), 42, 3),
    ((200,), 0, 0),
    ((), 9, 1),
    ((0, 4), 9, 1),
]

# Parts of one, as of a shard: columns, seed, stream, offset, numel.
PARTS = [
    (7, 2**32 - 1, 7, 3, 60),
    (131, 2**32 + 1, 5, 131 * 127 + 125, 20),
    (1, 2**63, 1, 128 * 2**32 - 5, 9),
    (2**40, 2**64 - 1, 2**31, 128 * 2**32 - 5, 9),
    (2**32 + 1, 2**63 + 12345, 2**32 - 1, (2**32 + 1) * (2**30 + 127) - 5, 9),
    (3, 42, 3, 2**63 - 10, 9),
    (2**63 - 1, 42, 3, 2**63 - 10, 9),
    (0, 2**63 + 12345, 2**32 - 1, 128 * 2**31 + 33, 9),
]


def draw(kind: str, seed: int, stream: int, offset: int, numel: int, keep: float | None) -> str:
    """One case as text: hex bits or 16-bit numbers, signs as + and -, a mask as 1 and 0."""
    where = {"seed": seed, "stream": stream, "offset": offset}
    if kind == "gaussian":
        bits = noise.gaussian(numel, **where).view(torch.int32).tolist()
        return " ".join(f"{b & 0xFFFFFFFF:08x}" for b in bits)
    if kind == "rademacher":
        return signs(noise.rademacher(numel, **where))
    if kind == "mask":
        return "".join("01"[k] for k in noise.mask(numel, keep, **where).tolist())
    u = noise.uniform16(numel, noise.ROUNDING, seed, stream, offset, "cpu").tolist()
    return " ".join(f"{number:04x}" for number in u)


def signs(z: torch.Tensor) -> str:
    """Signs as + and -."""
    return "".join("-+"[s > 0] for s in z.flatten().tolist())


def rank1() -> list[dict]:
    """The cases of rank one."""
    cases = []
    for shape, seed, stream in SHAPES:
        z = noise.rank1(shape, seed=seed, stream=stream)
        case = {"kind": "rank1", "seed": str(seed), "stream": stream, "offset": "0"}
        case |= {"shape": list(shape), "columns": str(noise.columns_of(shape))}
        cases.append(case | {"numel": z.numel(), "values": signs(z)})
    for columns, seed, stream, offset, numel in PARTS:
        z = noise.signs_of_rank1(numel, columns, seed, stream, offset, "cpu")
        case = {"kind": "rank1", "seed": str(seed), "stream": stream, "offset": str(offset)}
        cases.append(case | {"columns": str(columns), "numel": numel, "values": signs(z)})
    return cases


def main() -> None:
    """Write the file, unless that would change a case that it already holds."""
    cases = []
    for kind, seed, stream, offset, numel, keep in CASES:
        # Seeds, offsets and columns are text: many readers of JSON round integers beyond 2**53.
        case = {"kind": kind, "seed": str(seed), "stream": stream, "offset": str(offset)}
        case |= {"numel": numel} | ({} if keep is None else {"keep": keep})
        cases.append(case | {"values": draw(kind, seed, stream, offset, numel, keep)})
    cases += rank1()
    if FILE.exists():
        for old in json.loads(FILE.read_text())["cases"]:
            if old not in cases:
                raise SystemExit(f"Nothing is written, since this golden vector changed: {old}")
    lines = ",\n".join(json.dumps(case) for case in cases)
    for file in (FILE, PACKAGED):
        file.write_text(f'{{"version": {noise.VERSION}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()

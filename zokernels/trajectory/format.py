"""The bytes of a trajectory: framing, checksums, and what a step's record holds.

A file is the eight bytes of `MAGIC` and then frames, each

    kind (1 byte) · length of the payload (u32) · check of this head (u32) · payload · check (u32)

little-endian. A check is the CRC-32 of all heads and payloads from the first frame up to there,
so that a frame that is lost, repeated or moved is noticed at the next one. docs/reliability.md
says the same in full.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

VERSION = 1
MAGIC = b"ZKTRAJ1\n"

# Kinds of frames. HEADER comes first and once; PASS describes a pass that steps refer to; STEP is
# a step with its passes; SKIP one whose loss was not finite, so that nothing was written. MOMENTS
# stands before a step, whose running means of squares it has.
HEADER, PASS, STEP, SKIP, MOMENTS = b"H", b"P", b"S", b"N", b"M"

_HEAD = struct.Struct("<cI")
_CHECK = struct.Struct("<I")
HEAD_SIZE = _HEAD.size + _CHECK.size
FRAME_SIZE = HEAD_SIZE + _CHECK.size

# What follows a pass's coefficients in a step's record.
HAS_LR, HAS_COUNT, HAS_SEEDS, HAS_ROUNDING_SEED, HAS_MASK_SEED = 1, 2, 4, 8, 16
_FLAGS = 31
_STEP = struct.Struct("<QH")
_PASS = struct.Struct("<HBH")
_MOMENT = struct.Struct("<HIdd")
LIMIT = 0xFFFF


class TrajectoryError(ValueError):
    """A trajectory that cannot be written, read or replayed; the message is one sentence."""


@dataclass(frozen=True)
class Scalars:
    """The numbers of one pass of one step; None where they follow from the step or the pass.

    Attributes:
        of: Number of the pass's description: the how-manieth PASS frame, from 0.
        decay: Factor on the weights.
        coeffs: One a direction.
        lr: Learning rate of a rule with a state, or of "sign".
        count: Adam's number of the update, for its bias correction.
        seeds: Seeds of the directions, where they are not the run's own for this step.
        rounding_seed: Of stochastic rounding, where it is not the run's own.
        mask_seed: Of a random mask, where it is not that of the description.
    """

    of: int
    decay: float
    coeffs: tuple[float, ...]
    lr: float | None = None
    count: int | None = None
    seeds: tuple[int, ...] | None = None
    rounding_seed: int | None = None
    mask_seed: int | None = None


# Of a param group and a block, by number, the running mean after a step: its two numbers.
Moments = tuple[tuple[int, int, float, float], ...]


@dataclass(frozen=True)
class Step:
    """One recorded step.

    Attributes:
        number: Counted from 0.
        passes: Its passes; None for a skipped one.
        moments: The running means of d² after it, with ``normalize`` or ``clip``; see
            `zokernels.estimators.Moment`.
    """

    number: int
    passes: tuple[Scalars, ...] | None
    moments: Moments = ()


def frame(kind: bytes, payload: bytes, check: int) -> tuple[bytes, int]:
    """The frame's bytes, and the check that the next frame goes on from."""
    head = _HEAD.pack(kind, len(payload))
    first = zlib.crc32(head, check)
    last = zlib.crc32(payload, first)
    return head + _CHECK.pack(first) + payload + _CHECK.pack(last), last


def parse_head(data: bytes, check: int) -> tuple[bytes, int, int] | None:
    """Kind, length of the payload and check of a frame's head; None if the head is damaged."""
    first = zlib.crc32(data[: _HEAD.size], check)
    if _CHECK.unpack_from(data, _HEAD.size)[0] != first:
        return None
    kind, length = _HEAD.unpack_from(data)
    return kind, length, first


def check_payload(payload: bytes, tail: bytes, check: int) -> int | None:
    """The check after this payload; None if it is not what the file says."""
    last = zlib.crc32(payload, check)
    return last if _CHECK.unpack(tail)[0] == last else None


def pack_json(value: dict[str, Any]) -> bytes:
    """The payload of a HEADER or PASS frame."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def pack_step(step: Step, wide: bool) -> bytes:
    """The payload of a STEP frame; decay and coefficients in binary64 if ``wide``, else binary32.

    Raises:
        TrajectoryError: If there are more passes or directions than a record can count.
    """
    passes = step.passes or ()
    if max([len(passes), *(max(len(p.coeffs), p.of) for p in passes)]) > LIMIT:
        raise TrajectoryError(
            f"Step {step.number} has more than {LIMIT} passes or directions in a pass, which a "
            "trajectory cannot record; use fewer queries."
        )
    parts = [_STEP.pack(step.number, len(passes))]
    for p in passes:
        extra, flags = b"", 0
        for flag, code, value in (
            (HAS_LR, "d", p.lr), (HAS_COUNT, "Q", p.count), (HAS_SEEDS, "Q", p.seeds),
            (HAS_ROUNDING_SEED, "Q", p.rounding_seed), (HAS_MASK_SEED, "Q", p.mask_seed),
        ):  # fmt: skip
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                flags |= flag
                extra += struct.pack(f"<{len(values)}{code}", *values)
        parts.append(_PASS.pack(p.of, flags, len(p.coeffs)))
        parts.append(struct.pack(f"<{1 + len(p.coeffs)}{_real(wide)}", p.decay, *p.coeffs))
        parts.append(extra)
    return b"".join(parts)


def unpack_step(payload: bytes, wide: bool) -> Step:
    """What `pack_step` packed.

    Raises:
        ValueError: If the payload is anything else.
    """
    taken = 0

    def take(layout: str) -> tuple:
        nonlocal taken
        values = struct.unpack_from("<" + layout, payload, taken)
        taken += struct.calcsize("<" + layout)
        return values

    try:
        number, count = take("QH")
        passes = []
        for _ in range(count):
            of, flags, queries = take("HBH")
            if not queries or flags & ~_FLAGS:
                raise ValueError("a pass without directions, or with unknown numbers")
            decay, *coeffs = take(f"{1 + queries}{_real(wide)}")
            lr = take("d")[0] if flags & HAS_LR else None
            if not all(map(math.isfinite, (decay, *coeffs, lr or 0.0))):
                raise ValueError("a number that is not finite")
            updates = take("Q")[0] if flags & HAS_COUNT else None
            seeds = take(f"{queries}Q") if flags & HAS_SEEDS else None
            rounding = take("Q")[0] if flags & HAS_ROUNDING_SEED else None
            mask = take("Q")[0] if flags & HAS_MASK_SEED else None
            passes.append(Scalars(of, decay, tuple(coeffs), lr, updates, seeds, rounding, mask))
    except struct.error as error:
        raise ValueError(str(error)) from None
    if taken != len(payload):
        raise ValueError("bytes that belong to nothing")
    return Step(number, tuple(passes))


def pack_moments(moments: Moments) -> bytes:
    """The payload of a MOMENTS frame."""
    return b"".join(_MOMENT.pack(*moment) for moment in moments)


def unpack_moments(payload: bytes) -> Moments:
    """What `pack_moments` packed.

    Raises:
        ValueError: If the payload is anything else.
    """
    if not payload or len(payload) % _MOMENT.size:
        raise ValueError("running means that are cut short")
    moments = tuple(_MOMENT.iter_unpack(payload))
    for _, _, total, weight in moments:
        if not (0 <= total < math.inf and 0 < weight <= 2):
            raise ValueError("a running mean that is none")
    return moments


def pack_skip(number: int) -> bytes:
    """The payload of a SKIP frame."""
    return struct.pack("<Q", number)


def unpack_skip(payload: bytes) -> Step:
    """What `pack_skip` packed.

    Raises:
        ValueError: If the payload is anything else.
    """
    if len(payload) != 8:
        raise ValueError("a skipped step's record has 8 bytes")
    return Step(struct.unpack("<Q", payload)[0], None)


def _real(wide: bool) -> str:
    return "d" if wide else "f"

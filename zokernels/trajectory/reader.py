"""Reading a trajectory: everything before a torn tail, or a refusal that names the offset."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from zokernels import masks, noise
from zokernels.backends import checks, rules
from zokernels.trajectory import format as form
from zokernels.trajectory.format import Step, TrajectoryError

_HEADER_FIELDS = {
    "version": int, "noise": int, "optimizer": str, "replayable": bool, "seed": int,
    "first": int, "numbers": str, "parameters": list, "about": dict,
}  # fmt: skip
_STATE_TYPES = {"float32", "bfloat16", "float64"}


def read(path: str | Path) -> bytes:
    """The bytes of a file.

    Raises:
        TrajectoryError: If it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TrajectoryError(f"The trajectory {path} cannot be read: {error.strerror}.") from None


class Trajectory:
    """What a file holds, read whole; nothing in it is executed.

    A *torn tail*, that is a last record cut short by a kill or a full disk, or zeros where a power
    cut left them, is left out. Anything else that is not as it was written is refused.

    Args:
        path: The file.
        data: Its bytes, where they have been read already.

    Attributes:
        header: The run: optimizer, seed, parameters, what the recorder was told about it.
        passes: The descriptions that steps refer to.
        steps: The steps in order, skipped ones among them.
        torn: Bytes of a torn tail, 0 for none.
        size: Bytes of the file, that tail included.

    Raises:
        TrajectoryError: If the file cannot be read, is none, is damaged, or is of a version that
            this package does not know.
    """

    def __init__(self, path: str | Path, data: bytes | None = None):
        self.path = Path(path)
        data = read(path) if data is None else data
        self.passes: list[dict[str, Any]] = []
        self.steps: list[Step] = []
        self.torn = 0
        self.size = len(data)
        # Where the file may be cut: (size, check, descriptions) before each step, and at the end.
        self._marks: list[tuple[int, int, int]] = []
        # Of the step to come.
        self._moments: form.Moments = ()
        self._read(data)

    @property
    def end(self) -> int:
        """The number of steps done when the last record was written."""
        return self.header["first"] + len(self.steps)

    @property
    def wide(self) -> bool:
        """Whether coefficients are in binary64, as with float64 weights."""
        return self.header["numbers"] == "binary64"

    def until(self, step: int | None) -> int:
        """The number of steps asked for, checked; all of them for None.

        Raises:
            TrajectoryError: If the file does not reach from the start to there.
        """
        if step is None:
            return self.end
        if isinstance(step, bool) or not isinstance(step, int):
            raise TrajectoryError(f"until is {step!r}, but it must be a number of steps, or None.")
        if not self.header["first"] <= step <= self.end:
            raise TrajectoryError(
                f"until is {step}, but {self.path} holds steps {self.header['first']} to "
                f"{self.end}; choose one of them."
            )
        return step

    def mark(self, step: int) -> tuple[int, int, int]:
        """The file's size, check and number of descriptions after this many steps."""
        return self._marks[step - self.header["first"]]

    def _read(self, data: bytes) -> None:
        if data[: len(form.MAGIC)] != form.MAGIC:
            raise TrajectoryError(
                f"{self.path} is not a trajectory of version {form.VERSION}: it does not begin "
                f"with {form.MAGIC!r}."
            )
        at, check, frames = len(form.MAGIC), 0, 0
        while at < len(data):
            head = data[at : at + form.HEAD_SIZE]
            found = form.parse_head(head, check) if len(head) == form.HEAD_SIZE else None
            size = form.FRAME_SIZE + (found[1] if found else 0)
            # A torn write left a part, and a power cut may have left the rest as zeros.
            if len(head) < form.HEAD_SIZE or (found and at + size > len(data)):
                break
            if found is None:
                if len(data[at:].rstrip(b"\0")) < form.HEAD_SIZE:
                    break
                raise self._damaged(at, "the head of a record does not match its checksum")
            kind, _, first = found
            payload = data[at + form.HEAD_SIZE : at + size - 4]
            after = form.check_payload(payload, data[at + size - 4 : at + size], first)
            if after is None:
                if len(data[at:].rstrip(b"\0")) < size:
                    break
                raise self._damaged(at, "a record does not match its checksum")
            self._take(kind, payload, at, frames == 0)
            at, check, frames = at + size, after, frames + 1
            if kind == form.HEADER:
                self._marks.append((at, check, 0))
            elif kind in (form.STEP, form.SKIP):
                self._marks.append((at, check, len(self.passes)))
        if not frames:
            raise TrajectoryError(
                f"{self.path} ends before its header does, so nothing was recorded; delete it."
            )
        self.torn = len(data) - at

    def _take(self, kind: bytes, payload: bytes, at: int, first: bool) -> None:
        """Takes in a frame whose checksums are right; what it says may still be nonsense."""
        try:
            if first != (kind == form.HEADER):
                raise ValueError("the header is not the first record")
            if kind == form.HEADER:
                self.header = self._check_header(json.loads(payload))
            elif kind == form.PASS:
                self.passes.append(self._check_pass(json.loads(payload)))
            elif kind == form.MOMENTS:
                self._moments = form.unpack_moments(payload)
            elif kind == form.STEP:
                step = form.unpack_step(payload, self.wide)
                self._add(replace(step, moments=self._moments))
                self._moments = ()
            elif kind == form.SKIP:
                self._add(form.unpack_skip(payload))
            else:
                raise ValueError(f"a record of unknown kind {kind!r}")
        except TrajectoryError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(at, f"a record makes no sense ({error})") from None

    def _add(self, step: Step) -> None:
        if step.number != self.end:
            raise ValueError(f"step {step.number} follows step {self.end - 1}")
        for p in step.passes or ():
            if p.of >= len(self.passes):
                raise ValueError("a pass that was not described")
            described = self.passes[p.of]
            if (p.lr is None) != (described["rule"] == "add_noise"):
                raise ValueError("a learning rate that is missing, or that the pass does not have")
            if p.mask_seed is not None and (described["mask"] or {}).get("kind") != "random":
                raise ValueError("a mask's seed for a pass without a random mask")
            if p.count is not None and (described["rule"] != "adam" or p.count < 1):
                raise ValueError("an update's number that no pass has")
        self.steps.append(step)

    def _check_header(self, header: Any) -> dict[str, Any]:
        for field in ("version", "noise"):
            if not isinstance(header.get(field), int):
                raise ValueError(f"the header has no {field}")
        for field, known in (("version", form.VERSION), ("noise", noise.VERSION)):
            if header[field] != known:
                what = "noise" if field == "noise" else "trajectory"
                raise TrajectoryError(
                    f"{self.path} was recorded with {what} version {header[field]}, but this "
                    f"package has version {known}; use the package that recorded it."
                )
        for field, kind in _HEADER_FIELDS.items():
            if not isinstance(header.get(field), kind):
                raise ValueError(f"the header has no {field}")
        if header["numbers"] not in ("binary32", "binary64"):
            raise ValueError("the header's numbers are of no known kind")
        for p in header["parameters"]:
            if not (isinstance(p["name"], str) and isinstance(p["dtype"], str)):
                raise ValueError("a parameter without a name and a type")
            # No checksum of what could not be read.
            check = 0 if p["check"] is None else p["check"]
            if not all(isinstance(n, int) for n in (*p["shape"], p["stream"], check)):
                raise ValueError(f"parameter {p['name']!r} has a number that is none")
        return header

    def _check_pass(self, described: Any) -> dict[str, Any]:
        count = len(self.header["parameters"])
        which = described["parameters"]
        if len(set(which)) != len(which) or not all(
            isinstance(i, int) and 0 <= i < count for i in which
        ):
            raise ValueError("a pass over parameters that are not in the header")
        if len(described["states"]) not in (0, len(which)):
            raise ValueError("a pass whose states do not fit its parameters")
        if described["rule"] not in ("add_noise", *rules.STATES):
            raise ValueError(f"rule {described['rule']!r} is unknown")
        if described["dist"] not in noise.KINDS or described["rounding"] not in checks.ROUNDINGS:
            raise ValueError("a distribution or a rounding that is unknown")
        # Refuses numbers that no pass would take, before any pass runs.
        masks.from_plain(described["mask"])
        if described["rule"] == "add_noise" and described["states"]:
            raise ValueError("states of a pass that has none")
        if described["rule"] != "add_noise":
            rule, numbers = described["rule"], described["numbers"]
            own = {name: numbers[name] for name in ("beta", "betas", "adam_eps", "amsgrad")}
            rules.numbers(rule, [0.0], **own)
            names = rules.state_names(rule, own["amsgrad"])
            for state in described["states"]:
                if len(state) != len(names) or set(state) - _STATE_TYPES:
                    raise ValueError("states that the rule does not have")
        return described

    def _damaged(self, at: int, why: str) -> TrajectoryError:
        return TrajectoryError(
            f"{self.path} is damaged at byte {at}: {why}. The {len(self.steps)} steps before it "
            "are whole; restore the file from a copy."
        )

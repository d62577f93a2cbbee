"""Shapes of the Triton kernels' groups to be tried, from a file.

A CSV with the columns ``op``, ``dist``, ``rows``, ``warps`` and ``registers``, a shape a line: what
`zokernels.backends.triton.launch` chooses from its table, so that rows of a measurement can choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zokernels import noise
from zokernels.lab.benchmarks import results
from zokernels.lab.errors import InputError

COLUMNS = ("op", "dist", "rows", "warps", "registers")
OPS = ("add_noise_", "add_noise", "sign", "momentum", "adam", "amsgrad")
# A group holds whole blocks of 128 signs, or is a tile of 128 columns; and a warp has at least one
# row of eight a thread.
_ROWS, _WARPS, _REGISTERS = (32, 8192), (1, 16), (24, 255)


@dataclass(frozen=True)
class Shaped:
    """A kernel, and the group that it is tried with: rows of eight weights, shared by warps.

    ``registers`` is the most that a thread may have; None leaves it to the compiler.
    """

    op: str
    dist: str
    rows: int
    warps: int
    registers: int | None = None

    def __str__(self) -> str:
        most = f", {self.registers} registers" if self.registers else ""
        return f"{self.rows} x {self.warps}{most}"


def read(path: Path) -> list[Shaped]:
    """The shapes of a file, in its order.

    Raises:
        InputError: If it can't be read, or a line is no shape.
    """
    head, lines = results.given("--shapes", path)
    if head != list(COLUMNS) or not lines:
        raise InputError(
            f"--shapes {path} must be a CSV with the columns {', '.join(COLUMNS)} and a shape a "
            f"line; its head is '{','.join(head)}', with {len(lines)} lines below it."
        )
    return [_shape(path, number, line) for number, line in enumerate(lines, 2)]


def _shape(path: Path, number: int, line: dict[str, str]) -> Shaped:
    where = f"--shapes {path}, line {number}"
    op, dist = line["op"], line["dist"]
    if op not in OPS or dist not in noise.KINDS:
        raise InputError(
            f"{where}: got '{op}' and '{dist}'; op is one of {', '.join(OPS)}, and dist one of "
            f"{', '.join(noise.KINDS)}."
        )
    numbers = []
    for name, (low, high) in (("rows", _ROWS), ("warps", _WARPS)):
        text = line[name] or ""
        value = int(text) if text.isdecimal() else 0
        if not low <= value <= high or value & (value - 1):
            raise InputError(
                f"{where}: {name} is '{text}', but it must be a power of two from {low} to {high}."
            )
        numbers.append(value)
    rows, warps = numbers
    most, (low, high) = line["registers"] or "", _REGISTERS
    if most and not (most.isdecimal() and low <= int(most) <= high):
        raise InputError(
            f"{where}: registers is '{most}', but it must be empty or from {low} to {high}."
        )
    if rows < 32 * warps:
        raise InputError(
            f"{where}: {warps} warps are {32 * warps} threads, which share no fewer rows; got "
            f"{rows}."
        )
    return Shaped(op, dist, rows, warps, int(most) if most else None)

"""Machine instructions a weight on 64-bit ARM: ``python -m bench.instructions``, three minutes.

qemu translates one instruction at a time and logs each that it executes; the difference between a
pass over N weights and one over 2 N, divided by N, is what a weight costs. Nothing is timed: on a
CPU that executes as many instructions a clock of either kind, the counts are to each other as the
times are, as long as memory keeps up. Writes bench/results/instructions.csv, from which
`make report` makes the table of docs/performance.md.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from bench import cross
from zokernels.lab.benchmarks import machine, results
from zokernels.lab.benchmarks.results import Row

RESULTS = results.FOLDER / "instructions.csv"
SOURCE = Path(__file__).with_suffix(".cpp")
COLUMNS = (
    "date", "commit", "tests", "compiler", "emulator", "dtype", "dist", "isa",
    "instructions_per_weight", "predicted",
)  # fmt: skip

# The numbers of csrc/zokernels.h.
ISAS, DTYPES = {"neon": 3, "portable": 0}, {"float32": 0, "bfloat16": 1, "float16": 2}
KINDS = {"gaussian": 0, "rademacher": 1, "rank1": 4}

# Weights of the smaller pass, and columns; of rank one so many that a span's tables count little.
NUMEL, ROWS = (1 << 14, 0), (1 << 18, 1 << 10)

# What was expected before anything was counted.
PREDICTED = {
    ("float32", "gaussian", "neon"): "9", ("float32", "gaussian", "portable"): "24",
    ("float32", "rademacher", "neon"): "1.9", ("float32", "rademacher", "portable"): "11",
    ("float32", "rank1", "neon"): "0.6", ("float32", "rank1", "portable"): "5",
    ("bfloat16", "gaussian", "neon"): "11",
}  # fmt: skip


def count(program: Path) -> list[Row]:
    """A row for each type, distribution and instruction set."""
    about = machine.about()
    shared = {name: str(about[name]) for name in ("date", "commit", "tests")}
    shared |= {"compiler": version(cross.COMPILER), "emulator": version(cross.EMULATOR[0])}
    rows = []
    for case in itertools.product(DTYPES, KINDS, ISAS):
        names = dict(zip(("dtype", "dist", "isa"), case, strict=True))
        found = per_weight(program, *case)
        rows.append(
            {**shared, **names, "instructions_per_weight": f"{found:.2f}",
             "predicted": PREDICTED.get(case, "")}
        )  # fmt: skip
        print(*case, f"{found:.2f}", file=sys.stderr)
    return rows


def per_weight(program: Path, dtype: str, dist: str, isa: str) -> float:
    """Instructions of one ``add_noise_`` pass with one seed, in place, without mask or decay."""
    numel, columns = ROWS if dist == "rank1" else NUMEL
    numbers = [ISAS[isa], KINDS[dist], DTYPES[dtype]]
    less, more = (
        executed([str(program), *map(str, (*numbers, n, columns))]) for n in (numel, 2 * numel)
    )
    return (more - less) / numel


def executed(command: list[str]) -> int:
    """How many instructions a program executes from its start to its end.

    Raises:
        RuntimeError: If it fails.
    """
    usage = subprocess.run([cross.EMULATOR[0], "-help"], capture_output=True, text=True).stdout
    single = "-one-insn-per-tb" if "-one-insn-per-tb" in usage else "-singlestep"
    log = [single, "-d", "nochain,exec"]
    with subprocess.Popen([*cross.EMULATOR, *log, *command], stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        found = lines(running.stderr)
    if running.returncode:
        raise RuntimeError(f"{command[0]} failed with {running.returncode} under the emulator.")
    return found


def lines(log: IO[bytes]) -> int:
    """How many instructions a log of the emulator has."""
    mark, found, tail = b"Trace ", 0, b""
    while chunk := log.read(1 << 20):
        text = tail + chunk
        found += text.count(mark)
        # Too short to have a mark of its own, and long enough for one that is cut.
        tail = text[-(len(mark) - 1) :]
    return found


def version(program: str) -> str:
    """What a tool is and its number."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    number = re.search(r"\d+(\.\d+)+", said.stdout)
    return f"{'gcc' if 'g++' in program else 'qemu'} {number[0] if number else 'unknown'}"


def main() -> int:
    """Count and write the rows."""
    if why := cross.why_not():
        print(f"Nothing is counted: {why}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        rows = count(cross.program(Path(folder), SOURCE, cross.COMPILER))
    results.write(RESULTS, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

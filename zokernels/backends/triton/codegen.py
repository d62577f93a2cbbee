"""What the compiler makes of a kernel, counted without a GPU.

Triton compiles for an architecture that is not here, and its wheel holds the disassembler. Counted
is the path that a whole, aligned group takes, every loop once; the path of a tensor's ragged ends,
which the compiler lays elsewhere, is left out.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_CONVERT = ("I2F", "I2FP")


@dataclass(frozen=True)
class Code:
    """One compiled kernel, counted.

    Attributes:
        instructions: Machine instructions that a thread executes for a whole group.
        elements: Weights that a thread works on.
        seed_instructions: Those of the loop over seeds: the noise of one seed and its sum.
        loads, stores: Width in bits of each access to weights and states on that path.
        registers, spills, shared: A thread's registers, spilled bytes; a program's shared bytes.
        fused: Fused multiply–adds in PTX, on both paths.
        contracted: Those that ptxas made of what PTX keeps apart.
    """

    instructions: int
    elements: int
    seed_instructions: int
    loads: list[int]
    stores: list[int]
    registers: int
    spills: int
    shared: int
    fused: int
    contracted: int

    @property
    def per_weight(self) -> float:
        """Instructions a weight, all of the kernel."""
        return self.instructions / self.elements

    @property
    def per_seed(self) -> float:
        """Instructions a weight that each further seed costs."""
        return self.seed_instructions / self.elements


@dataclass
class _Block:
    lines: list[str]
    to: list[int]


def count(kernel: Any, elements: int) -> Code:
    """Count a compiled kernel whose threads work on ``elements`` weights each."""
    text = disassemble(kernel.asm["cubin"])
    blocks = _blocks(text)
    path = _path(blocks)
    lines = [line for i in path for line in blocks[i].lines]
    noisy = max(path, key=lambda i: _noise_in(blocks[i]))
    loop = _loop_of(blocks, path, noisy)
    ptx = kernel.asm["ptx"]
    fused = len(re.findall(r"\bfma\.rn\.f32", ptx))
    usage = resources(kernel.asm["cubin"])
    everything = [line for block in blocks for line in block.lines]
    return Code(
        instructions=len(lines),
        elements=elements,
        seed_instructions=sum(len(blocks[i].lines) for i in loop),
        loads=_widths(lines, "LDG"),
        stores=_widths(lines, "STG"),
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        fused=fused,
        contracted=sum(_opcode(x).startswith("FFMA") for x in everything) - fused,
    )


def disassemble(cubin: bytes) -> str:
    """The machine code, with labels."""
    return _run_on(cubin, "nvdisasm", "-c")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, local and shared memory, as ``cuobjdump`` reads them."""
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _run_on(cubin, "cuobjdump", "-res-usage"))
    return {name: int(value) for name, value in found}


def _run_on(cubin: bytes, tool: str, option: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([binary, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _opcode(line: str) -> str:
    words = line.split()
    return words[1] if words[0].startswith("@") and len(words) > 1 else words[0]


def _blocks(text: str) -> list[_Block]:
    """Basic blocks, with the numbers of those that follow."""
    blocks, labels, targets = [_Block([], [])], {}, {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].lines:
                blocks.append(_Block([], []))
            labels[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            code = instruction[1]
            blocks[-1].lines.append(code)
            if _opcode(code).split(".")[0] in ("BRA", "EXIT", "RET"):
                targets[len(blocks) - 1] = code
                blocks.append(_Block([], []))
    blocks = [b for b in blocks if b.lines] if not blocks[-1].lines else blocks
    for i, block in enumerate(blocks):
        last = targets.get(i, "")
        if goal := _TARGET.search(last):
            block.to.append(labels[goal[1]])
        conditional = last.startswith("@")
        if (not last or conditional) and i + 1 < len(blocks):
            block.to.append(i + 1)
    return blocks


def _noise_in(block: _Block) -> int:
    """How much of Philox and of the transform a block holds."""
    return sum(_opcode(x).startswith(("IMAD.WIDE", *_CONVERT)) for x in block.lines)


def _path(blocks: list[_Block]) -> list[int]:
    """The shortest way through the wide load, the noise and the wide store to the end."""
    wide = [_wide(b) for b in blocks]
    stores = [i for i, (_, store) in enumerate(wide) if store]
    loads = [i for i, (load, _) in enumerate(wide) if load]
    best: list[int] = []
    for load in loads:
        for store in stores:
            noisy = sorted(range(len(blocks)), key=lambda i: -_noise_in(blocks[i]))
            for middle in noisy[:2]:
                way = _through(blocks, [0, load, middle, store])
                if way and (not best or _cost(blocks, way) < _cost(blocks, best)):
                    best = way
    if not best:
        raise ValueError("The machine code has no path with 128-bit loads, noise and stores.")
    return best


def _wide(block: _Block) -> tuple[bool, bool]:
    return tuple(any(_opcode(x).startswith(o) and ".128" in _opcode(x) for x in block.lines)
                 for o in ("LDG", "STG"))  # type: ignore[return-value]  # fmt: skip


def _cost(blocks: list[_Block], way: list[int]) -> int:
    return sum(len(blocks[i].lines) for i in way)


def _through(blocks: list[_Block], stops: list[int]) -> list[int] | None:
    way = [stops[0]]
    for stop in stops[1:]:
        part = _shortest(blocks, way[-1], lambda i, stop=stop: i == stop)
        if part is None:
            return None
        way += part[1:]
    ending = _shortest(blocks, way[-1], lambda i: any("EXIT" in x for x in blocks[i].lines[-1:]))
    return None if ending is None else way + ending[1:]


def _shortest(blocks: list[_Block], start: int, done: Any) -> list[int] | None:
    queue, seen = [(0, start, [start])], set()
    while queue:
        cost, at, way = heapq.heappop(queue)
        if done(at):
            return way
        if at in seen:
            continue
        seen.add(at)
        for to in blocks[at].to:
            heapq.heappush(queue, (cost + len(blocks[to].lines), to, [*way, to]))
    return None


def _loop_of(blocks: list[_Block], path: list[int], inside: int) -> list[int]:
    """The blocks of the shortest cycle through a block; the block alone if there is none."""
    ways = [_shortest(blocks, to, lambda i: i == inside) for to in blocks[inside].to]
    known = [way for way in ways if way]
    return min(known, key=lambda way: _cost(blocks, way)) if known else [inside]


def _widths(lines: list[str], kind: str) -> list[int]:
    """The widths in bits of accesses to global memory that are no scalars of the table."""
    found: Counter[int] = Counter()
    for line in lines:
        code = _opcode(line)
        if code.startswith(kind):
            wide = re.search(r"\.(128|64|U16|U8)\b", code)
            bits = {"128": 128, "64": 64, "U16": 16, "U8": 8}[wide[1]] if wide else 32
            found[bits] += 1
    return sorted(found.elements(), reverse=True)

"""What the compiler makes of a kernel, counted without a GPU.

Triton compiles for an architecture that is not here, and its wheel holds the disassembler. Counted
is the path that a whole, aligned group takes, every loop once; the path of a tensor's ragged ends,
which the compiler lays elsewhere, is left out.
"""

from __future__ import annotations

import heapq
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from zokernels import noise
from zokernels.backends.triton import launch
from zokernels.backends.triton.add_noise import _add_noise_kernel
from zokernels.backends.triton.arithmetic import INTERPRETED, memory_type
from zokernels.backends.triton.table import TYPES
from zokernels.backends.triton.update import _apply_update_kernel

__all__ = ["INTERPRETED", "Case", "Code", "compile_case", "count", "count_case"]

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_CONVERT = ("I2F", "I2FP")
# A round of Philox ends in twice the exclusive or of three words, by which an address is not made.
_ROUND = re.compile(r"LOP3\.LUT\b.*\b0x96\b")


@dataclass(frozen=True)
class Code:
    """One compiled kernel, counted.

    Attributes:
        instructions: Machine instructions that a thread executes for a whole group.
        elements: Weights that a thread works on.
        seed_instructions: Those of the loop over seeds: the noise of one seed and its sum.
        loads, stores: Width in bits of each access to weights and states on that path.
        registers: A thread's registers.
        spills: Accesses to local memory on that path.
        stack: Bytes of local memory a thread, on all paths.
        shared: Bytes of shared memory a program.
        fused: Fused multiply–adds in PTX, on all paths.
        fusible: Products and sums in PTX that do not forbid their fusion (by ``.rn``).
    """

    instructions: int
    elements: int
    seed_instructions: int
    loads: list[int]
    stores: list[int]
    registers: int
    spills: int
    stack: int
    shared: int
    fused: int
    fusible: int

    @property
    def bytes_per_weight(self) -> int:
        """Bytes of weights and states that are read and written for a weight."""
        return 2 * sum(self.stores) // (8 * self.elements)

    @property
    def per_weight(self) -> float:
        """Instructions a weight, all of the kernel."""
        return self.instructions / self.elements

    @property
    def per_seed(self) -> float:
        """Instructions a weight that each further seed costs."""
        return self.seed_instructions / self.elements


@dataclass(frozen=True)
class Case:
    """A kernel to compile: the pass of a training step, unless told otherwise.

    ``op`` is "add_noise" or a rule: "sign", "momentum", "adam", "amsgrad". ``deferred``: as a CUDA
    graph has it, of coefficients of any size and with a number that says whether to write.
    ``mirror``: both sides of a direction from one draw.
    """

    op: str
    dtype: str
    dist: str
    state: str = "float32"
    stochastic: bool = False
    keep_kind: int = 0
    steps: bool = False
    deferred: bool = False
    mirror: bool = False

    def __str__(self) -> str:
        parts = [self.op, self.dtype, self.dist]
        parts += [f"states {self.state}"] if self.state != "float32" else []
        parts += ["stochastic"] if self.stochastic else []
        parts += [("random", "magnitude", "bits")[self.keep_kind - 1]] if self.keep_kind else []
        parts += ["each_step"] if self.steps else []
        parts += ["deferred"] if self.deferred else []
        return " ".join([*parts, *(["mirror"] if self.mirror else [])])


def compile_case(case: Case, capability: int) -> tuple[Any, int]:
    """The kernel for ``sm_{capability}``, and how many elements a thread of it works on."""
    dtype, state = (TYPES[getattr(torch, name)] for name in (case.dtype, case.state))
    kind = noise.KINDS[case.dist]
    plain = not (case.stochastic or case.keep_kind or case.steps)
    guard = 2 if case.op == "add_noise" else 9
    types = dict(
        groups_ptr="*i32", table_ptr="*i64", numbers_ptr="*i64", seeds="i32", queries="i32"
    )
    fixed: dict[str, Any] = dict(
        DTYPE=dtype, MEMORY_TYPE=memory_type(dtype), KIND=kind, KEEP_KIND=case.keep_kind,
        STOCHASTIC=case.stochastic, STEPS=case.steps, DECAY=not plain or case.deferred,
        SMALL=case.deferred and kind == noise.GAUSSIAN, GUARD=guard if case.deferred else 0,
    )  # fmt: skip
    if case.op == "add_noise":
        kernel, shape = (
            _add_noise_kernel,
            launch.shape_of_add_noise(kind, plain, mirror=case.mirror),
        )
        fixed["MIRROR"] = case.mirror
    else:
        rule = "adam" if case.op == "amsgrad" else case.op
        kernel = _apply_update_kernel
        shape = launch.shape_of_update(kind, rule, case.dtype == "float32")
        for name in "MVX":
            fixed |= {f"{name}_TYPE": state, f"{name}_MEMORY": memory_type(state)}
        fixed["RULE"] = ("sign", "momentum", "adam", "amsgrad").index(case.op)
    fixed["ROWS"] = shape.rows
    source = triton.compiler.ASTSource(
        kernel,
        signature=types | dict.fromkeys(fixed, "constexpr"),
        constexprs=fixed,
        # Allocations are aligned, and the launcher specializes on it.
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    options = dict(shape.options, enable_fp_fusion=False)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled, shape.rows * 8 // (shape.warps * 32)


def count_case(case: Case, capability: int = 90) -> Code:
    """Compile and count."""
    return count(*compile_case(case, capability))


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
    loop = _noise_loop(blocks)
    ptx = kernel.asm["ptx"]
    usage = resources(kernel.asm["cubin"])
    return Code(
        instructions=len(lines),
        elements=elements,
        seed_instructions=sum(len(blocks[i].lines) for i in loop),
        loads=_widths(lines, "LDG"),
        stores=_widths(lines, "STG"),
        registers=usage["REG"],
        spills=sum(_opcode(x).startswith(("LDL", "STL")) for x in lines),
        stack=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        # From sm_100 on there are instructions for two at once.
        fused=sum(1 + bool(x2) for x2 in re.findall(r"\bfma\.rn\.f32(x2)?\b", ptx)),
        fusible=len(re.findall(r"\b(?:mul|add|sub)\.f32(?:x2)?\b", ptx)),
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
        done = subprocess.run(
            [binary, option, file.name], capture_output=True, text=True, check=True
        )
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
            # On sm_80 a conditional jump out of a loop is written as a call that never returns.
            jump = code.startswith("@") and "CALL.REL" in code and _TARGET.search(code)
            if jump or _opcode(code).split(".")[0] in ("BRA", "EXIT", "RET"):
                targets[len(blocks) - 1] = code
                blocks.append(_Block([], []))
    blocks = [b for b in blocks if b.lines] if not blocks[-1].lines else blocks
    for i, block in enumerate(blocks):
        last = targets.get(i, "")
        if goal := _TARGET.search(last):
            block.to.append(labels[goal[1]])
        conditional = last.startswith("@") or " UP" in last or "!UP" in last
        if (not last or conditional) and i + 1 < len(blocks):
            block.to.append(i + 1)
    return blocks


def _noise_in(block: _Block) -> int:
    """How much of Philox and of the transform a block holds."""
    return sum(_opcode(x).startswith(_CONVERT) or bool(_ROUND.search(x)) for x in block.lines)


def _path(blocks: list[_Block]) -> list[int]:
    """The shortest way through the wide load, the noise and the wide store to the end."""
    loads = [i for i, block in enumerate(blocks) if _wide(block, "LDG")]
    stores = [i for i, block in enumerate(blocks) if _wide(block, "STG")]
    noisy = _noisy(blocks)
    orders = [
        order
        for load, middle, store in itertools.product(loads, noisy, stores)
        for order in ([0, load, middle, store], [0, middle, load, store])
    ]
    ways = [way for order in orders if (way := _through(blocks, order))]
    best = min(ways, key=lambda way: _cost(blocks, way), default=[])
    if not best:
        raise ValueError("The machine code has no path with 128-bit loads, noise and stores.")
    return best


def _wide(block: _Block, kind: str) -> bool:
    return any(_opcode(x).startswith(kind) and ".128" in _opcode(x) for x in block.lines)


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


def _noisy(blocks: list[_Block]) -> list[int]:
    """The blocks that make noise."""
    most = max(map(_noise_in, blocks))
    return [i for i, block in enumerate(blocks) if 2 * _noise_in(block) > most]


def _noise_loop(blocks: list[_Block]) -> list[int]:
    """The shortest cycle through a block that makes noise: the loop over further seeds."""
    cycles = []
    for i in _noisy(blocks):
        ways = (_shortest(blocks, to, lambda j, i=i: j == i) for to in blocks[i].to)
        cycles += [way for way in ways if way]
    return min(cycles, key=lambda way: _cost(blocks, way))


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

"""Whole steps of OPT-1.3B and OPT-13B in bfloat16, in multiples of their two plain forwards.

Every mode, eager and as a CUDA graph, and beside the eager one MeZO's step and SGD's by
backpropagation where memory holds it. Random weights; a model is built once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu.part import Job, Part
from zokernels.lab.benchmarks import models, step

# On which the expectation of a cell's time rests: what a large product of bfloat16 matrices reaches
# in a model, and a pass over weights.
_FLOPS, _BYTES = 500e12, 3e12
_WEIGHTS = {"opt-1.3b": 1.3e9, "opt-13b": 12.9e9, "opt-tiny": 0.2e6}
_BUILD = {"opt-1.3b": 2.0, "opt-13b": 8.0, "opt-tiny": 0.0}
# The most telling first: a graph at the length of MultiRC's texts, and the mode beside the peers.
MODES = (
    "graphed_paired", "on_entry", "paired", "graphed_on_entry", "in_place", "graphed_in_place",
)  # fmt: skip
# Modes and noise; rank one first, where a step should cost its forwards.
WAYS = (
    ("graphed_on_entry", "rank1"), ("graphed_paired", "rank1"), ("on_entry", "rank1"),
    *((mode, "gaussian") for mode in MODES),
)  # fmt: skip
# Of the largest, which takes a second a step.
FEW_WAYS = (
    ("graphed_on_entry", "rank1"), ("graphed_paired", "gaussian"), ("on_entry", "gaussian"),
    ("graphed_on_entry", "gaussian"),
)  # fmt: skip
PEERS = ("mezo", "fo-sgd")
PEERS_BESIDE = "on_entry"


@dataclass(frozen=True)
class Cell:
    """A mode at a size."""

    model: str
    rows: int
    length: int
    repeats: int
    mode: str
    dist: str = "gaussian"

    def __str__(self) -> str:
        return f"{self.model} {self.rows} x {self.length} {self.dist} {self.mode}"

    @property
    def forward(self) -> float:
        """Seconds that a plain forward is expected to take."""
        weights = _WEIGHTS[self.model]
        return 2 * weights * self.rows * self.length / _FLOPS + 2 * weights / _BYTES

    @property
    def seconds(self) -> float:
        """That the cell is expected to take, its share of building the model included."""
        # Two forwards, and a step of 1.3 times them and three passes over the weights.
        both = 2.3 * 2 * self.forward + 3 * 4 * _WEIGHTS[self.model] / _BYTES
        taken = (self.repeats + 1) * both
        if self.mode in step.GRAPHED:
            taken += 9 * self.forward  # those before a capture
        if "paired" in self.mode:
            taken += 9 * self.forward  # by which it looks whether both sides share one
        if self.mode == PEERS_BESIDE:
            # MeZO's, of six passes for each of four, and SGD's, of three forwards.
            passes = 24 * 4 * _WEIGHTS[self.model] / _BYTES
            taken += (1 + -(-self.repeats // 4)) * (5 * self.forward + passes)
        return taken + _BUILD[self.model] / len(MODES)


# Model, rows, length, repetitions.
SIZES = (
    ("opt-1.3b", 16, 512, 6), ("opt-1.3b", 16, 64, 12), ("opt-13b", 16, 64, 4),
    ("opt-13b", 16, 512, 3),
)  # fmt: skip
DRY_SIZE = ("opt-tiny", 2, 12, 1)
# Rows, a product and a small vector: each tensor more costs three interpreted programs in a step.
DRY_TRAINED = {"opt-tiny": ("embed_positions.weight", "layers.0.fc1.weight", "layers.0.fc1.bias")}


def cells(dry: bool) -> list[Cell]:
    """Every mode at every size that has the time."""
    if dry:
        # An interpreted program of signs takes a third of one of normals.
        found = [Cell(*DRY_SIZE, mode, "rademacher") for mode in MODES]
        return [*found, Cell(*DRY_SIZE, MODES[1]), Cell(*DRY_SIZE, MODES[1], "rank1")]
    return [
        Cell(*size, *way) for size in SIZES for way in (FEW_WAYS if size == SIZES[-1] else WAYS)
    ]


class Models:
    """The model in hand; another one takes its place in memory."""

    def __init__(self, device: str):
        self.device, self.name, self.model = device, "", None

    def of(self, name: str) -> Any:
        """The model, built now or before."""
        if name != self.name:
            self.model = None
            self.model, self.name = models.build(name, torch.bfloat16, self.device), name
            if name in DRY_TRAINED:
                for key, p in self.model.named_parameters():
                    p.requires_grad_(key.endswith(DRY_TRAINED[name]))
        return self.model


def jobs(part: Part) -> list[Job]:
    """A job a cell."""
    built = Models(part.device)
    return [
        Job(str(cell), cell.seconds, partial(_measure, part, built, cell))
        for cell in cells(part.dry)
    ]


def _measure(part: Part, built: Models, cell: Cell) -> list[str]:
    beside = cell.mode == PEERS_BESIDE and cell.dist == "gaussian"
    case = step.Case(
        cell.model, cell.rows, cell.length, "bfloat16", part.device, dist=cell.dist,
        perturb=cell.mode, peers=PEERS if beside else (), backend="triton",
    )  # fmt: skip
    result = step.measure(
        case, cell.repeats, model=built.of(cell.model), seconds=max(1.0, 1.5 * cell.seconds)
    )
    row = step.row(case, result)
    part.keep(step.COLUMNS, [row])
    line = (
        f"{cell}: {row['ratio']} x two forwards ({row['low']} to {row['high']}), "
        f"{row['step_ms']} ms, {row['forwards_ms']} ms the forwards"
    )
    for name, ratio in result.peers.items():
        line += f"; {name} {ratio:.2f} x"
    missing = [name for name in case.peers if name not in result.peers]
    return [line + "".join(f"; {name} does not fit in memory" for name in missing)]


if __name__ == "__main__":
    this = Part.of_arguments("step")
    raise SystemExit(this.run(jobs(this)))

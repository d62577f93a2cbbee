"""The Triton kernels in groups of another shape than their own."""

from __future__ import annotations

from contextlib import AbstractContextManager

from zokernels.backends.triton import launch
from zokernels.lab.benchmarks.shapes import Shaped


def of(shape: Shaped) -> AbstractContextManager[None]:
    """Every launch inside the block has groups of this shape; the bits are the same."""
    return launch.shaped(launch.Shape(shape.rows, shape.warps, shape.registers))

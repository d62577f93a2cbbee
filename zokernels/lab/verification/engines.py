"""Who can run a pass here: each backend, and native once with each instruction set."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import zokernels as zk

_ISA = "ZOKERNELS_ISA"


@dataclass(frozen=True)
class Engine:
    """A backend as it runs on this machine.

    Args:
        name: As it stands in the ids of cases.
        backend: The name that the ops take.
        device: Where its tensors live.
        isa: Instruction set of the native backend.
    """

    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it: exact, and slow."""
        return self.backend == "triton" and self.device == "cpu"

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Native runs with this engine's instruction set inside the block."""
        before = os.environ.get(_ISA)
        try:
            if self.isa is not None:
                os.environ[_ISA] = self.isa
            yield
        finally:
            if before is not None:
                os.environ[_ISA] = before
            elif self.isa is not None:
                del os.environ[_ISA]


REFERENCE = Engine("reference", "reference")


def engines() -> tuple[list[Engine], dict[str, str]]:
    """The engines that are held against the reference, and for what isn't there, why not."""
    found, missing = [], {}
    states = zk.backends()
    if states["native"].available:
        found += [
            Engine(f"native.{isa}", "native", isa=isa) for isa in states["native"].instruction_sets
        ]
    else:
        missing["native"] = states["native"].reason
    cuda = torch.cuda.is_available()
    if cuda:
        found.append(Engine("reference.cuda", "reference", "cuda"))
    else:
        missing["reference.cuda"] = "torch sees no CUDA device."
    if states["triton"].available:
        # Interpreted it is for tensors of the CPU.
        interpreted = "interpreter" in states["triton"].reason
        name = "triton.interpreted" if interpreted else "triton"
        found.append(Engine(name, "triton", "cpu" if interpreted else "cuda"))
    else:
        reason = states["triton"].reason
        how = "; set TRITON_INTERPRET=1 to verify it in Triton's interpreter."
        missing["triton"] = reason.rstrip(".") + how if "installed, but" in reason else reason
    return found, missing


def devices() -> list[str]:
    """Where whole runs are made."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

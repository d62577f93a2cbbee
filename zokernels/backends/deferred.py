"""A pass that is prepared once, and whose numbers are read in memory each time it runs.

The Triton kernels read them on the device, so that a launch is made ready once and, captured in a
CUDA graph or not, costs the host next to nothing with other numbers. Every other backend gets them
as Python numbers when the pass runs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from zokernels.backends.plan import AddNoise, ApplyUpdate, Pass, bits32, signed


class Deferred:
    """A pass of one step, without its numbers.

    Args:
        backend: The backend's module.
        plan: The pass; its seeds, coefficients, decay, rounding seed and rate are not used.
        numbers: int64 of `size` elements, in the memory of the pass: see `words`.
        decays: Whether the weights are multiplied by the decay; without, it must be 1.

    Raises:
        ValueError: If the plan has several steps, or tensors of float64.
    """

    def __init__(self, backend: ModuleType, plan: Pass, numbers: torch.Tensor, decays: bool = True):
        if plan.steps != 1 or any(p.dtype is torch.float64 for p in plan.params):
            raise ValueError(
                "A pass can't read its numbers in memory with each_step or float64 tensors, whose "
                "numbers are of another form; run it at once."
            )
        if numbers.numel() != size(plan) or numbers.dtype is not torch.int64:
            raise ValueError(
                f"The pass takes {size(plan)} int64 numbers, but got {numbers.numel()} of "
                f"{numbers.dtype}."
            )
        # The plan is kept for its tensors, whose addresses the launches hold.
        self._backend, self._plan, self._numbers = backend, plan, numbers
        self._launches = _launches(backend, plan, numbers, decays)

    def run(self) -> None:
        """Run the pass with what the numbers are now; nothing is written where the last one is 0.

        Of the Triton backend the device reads them, and this returns at once.
        """
        if self._launches is not None:
            for launch in self._launches:
                launch.run()
            return
        plan = _read(self._plan, self._numbers.tolist())
        if isinstance(plan, AddNoise):
            self._backend.add_noise(plan)
        elif plan is not None:
            self._backend.apply_update(plan)


class Given:
    """What the host writes: sections of one int64 tensor, sent in one copy.

    Args:
        sizes: Numbers of each section, by name.
        device: Where the tensor is.
    """

    def __init__(self, sizes: dict[tuple, int], device: torch.device):
        self._places: dict[tuple, slice] = {}
        end = 0
        for name, size in sizes.items():
            self._places[name] = slice(end, end + size)
            # Triton compiles a kernel anew for an address that is not aligned to 16 bytes.
            end += size + size % 2
        self._memory = torch.zeros(end, dtype=torch.int64, device=device)

    def section(self, *name: object) -> torch.Tensor:
        """A section, at an address that stays."""
        return self._memory[self._places[name]]

    def write(self, words: dict[tuple, Sequence[int]]) -> None:
        """Send the numbers of all sections, without waiting for the device."""
        flat = [0] * len(self._memory)
        for name, place in self._places.items():
            flat[place] = words[name]
        # torch keeps pinned memory from being used again until its copy is done.
        pinned = self._memory.is_cuda
        sent = torch.tensor(flat, dtype=torch.int64, pin_memory=pinned)
        self._memory.copy_(sent, non_blocking=True)


def words(
    plan: Pass, seeds: Sequence[int], coeffs: Sequence[float], decay: float, rounding_seed: int
) -> list[int]:
    """The numbers of a pass as int64: seeds, coefficients, `tail`, and 1, for it is to write.

    A binary32 number is stored by its bits.
    """
    tails = tail(plan, decay, rounding_seed)
    return [*map(signed, seeds), *map(bits32, coeffs), *tails, 1]


def tail(plan: Pass, decay: float, rounding_seed: int, rate: float = 0.0) -> list[int]:
    """What of `words` lies between the coefficients and the last one.

    That is decay and rounding seed; and of a rule −lr, the factor on v̂, and its own numbers.
    """
    found = [bits32(decay), signed(rounding_seed)]
    if isinstance(plan, ApplyUpdate):
        found += map(bits32, (rate, *plan.scales, *plan.of_rule))
    return found


def reads_in_memory(backend: ModuleType | None) -> bool:
    """Whether a backend's passes read their numbers on the device, and need not wait for them."""
    return hasattr(backend, "prepare_add_noise")


def size(plan: Pass) -> int:
    """How many numbers a pass takes."""
    return 2 * len(plan.seeds) + len(tail(plan, 1.0, 0)) + 1


def _launches(
    backend: ModuleType, plan: Pass, numbers: torch.Tensor, decays: bool
) -> list[Any] | None:
    if not reads_in_memory(backend):
        return None
    from zokernels.backends.triton.launch import Deferred as Numbers

    if isinstance(plan, AddNoise):
        return backend.prepare_add_noise(plan, Numbers(numbers, decays))
    return backend.prepare_apply_update(plan, Numbers(numbers, decays))


def _read(plan: Pass, found: list[int]) -> Pass | None:
    """The plan with its numbers; None where it is to write nothing."""
    *rest, writes = found
    if not writes:
        return None
    k = len(plan.seeds)
    decay, rounding_seed, *of_rule = rest[2 * k :]
    numbers: dict[str, Any] = dict(
        seeds=[s % 2**64 for s in rest[:k]],
        coeffs=[_float32(c) for c in rest[k : 2 * k]],
        decays=[_float32(decay)],
        rounding_seeds=[rounding_seed % 2**64],
    )
    if of_rule:
        numbers["rates"] = [_float32(of_rule[0])]
    return replace(plan, **numbers)


def _float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]

"""What a pass is to do, checked and in plain numbers: the one thing that every backend takes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zokernels.masks import MaskOf


@dataclass(frozen=True)
class Pass:
    """What both passes share: tensors, directions, and how the result is rounded.

    Numbers are already rounded to binary32, unless the tensors are float64. The seeds are cut in
    steps of ``queries`` seeds; each step has an entry of ``decays`` and of ``rounding_seeds``.
    ``columns`` are those of a rank-one direction (`zokernels.noise.columns_of`), 0 for a tensor
    that has a sign an element; other distributions have none.
    """

    params: Sequence[torch.Tensor]
    streams: Sequence[int]
    offsets: Sequence[int]
    columns: Sequence[int]
    seeds: Sequence[int]
    coeffs: Sequence[float]
    queries: int
    decays: Sequence[float]
    kind: int
    masks: Sequence[MaskOf]
    stochastic: bool
    rounding_seeds: Sequence[int]

    @property
    def written(self) -> list[torch.Tensor]:
        """The tensors that the pass writes."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """How many times a weight is rounded."""
        return len(self.decays)

    def terms(self, step: int) -> list[tuple[int, float]]:
        """The seeds and coefficients of a step."""
        part = slice(step * self.queries, (step + 1) * self.queries)
        return list(zip(self.seeds[part], self.coeffs[part], strict=True))


@dataclass(frozen=True)
class AddNoise(Pass):
    """One ``add_noise`` pass: ``out[i]`` receives the result and may be ``params[i]`` itself.

    ``mirror[i]``, where there is one, receives decay · w − Σₖ cₖ zₖ; only a pass of one step, with
    neither mask nor stochastic rounding, of a backend that says so has it.
    """

    out: Sequence[torch.Tensor]
    mirror: Sequence[torch.Tensor] = ()

    @property
    def written(self) -> list[torch.Tensor]:
        """The tensors that the pass writes."""
        return [*self.out, *self.mirror]


@dataclass(frozen=True)
class ApplyUpdate(Pass):
    """One ``apply_update_`` pass.

    ``states[i]`` holds the state tensors of ``params[i]`` in the rule's order. ``rates`` and
    ``scales`` have an entry a step: −lr, and the factor on v̂. Other rules than Adam leave
    ``amsgrad`` False and what they do not use of the betas 0.
    """

    rule: str
    states: Sequence[Sequence[torch.Tensor]]
    rates: Sequence[float]
    scales: Sequence[float]
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    adam_eps: float
    amsgrad: bool

    @property
    def written(self) -> list[torch.Tensor]:
        """The tensors that the pass writes."""
        return [*self.params, *(s for state in self.states for s in state)]

    @property
    def of_rule(self) -> tuple[float, ...]:
        """The rule's numbers that are one for all steps."""
        betas = (self.beta1, self.one_minus_beta1, self.beta2, self.one_minus_beta2)
        return (*betas, self.adam_eps)


class Shift(NamedTuple):
    """By how much a direction of rank one shifts a product: bias + scale · (x · taken) · given.

    Sums are of float32, in an order that depends on the backend only, and what is written has been
    rounded once.

    Attributes:
        x: Of shape (lanes, rows, in), contiguous; float32, bfloat16 or float16.
        taken: ±1 of shape (lanes, in), in x's type; each lane's lie one after the other.
        given: ±1 of shape (lanes, out), as far apart as those.
        scales: Of shape (lanes,), float32.
        bias: Of shape (out,), (lanes, out) or (lanes, 1, out), contiguous, in x's type; or None.
        y: Receives the result; of shape (lanes, rows, out).
    """

    x: torch.Tensor
    taken: torch.Tensor
    given: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    y: torch.Tensor

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        taken: torch.Tensor,
        given: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Shift:
        """The shift of what may lie in any order, with memory for its result."""
        y = x.new_empty((*x.shape[:2], given.shape[1]))
        own = None if bias is None else bias.contiguous()
        return cls(x.contiguous(), taken, given, scales, own, y)

    @property
    def bias_step(self) -> int:
        """How far apart the lanes' biases are; 0 where all have one."""
        return 0 if self.bias is None or self.bias.dim() == 1 else self.bias.stride(0)


def signed(seed: int) -> int:
    """The int64 of the bits of an unsigned one."""
    return seed - 2**64 if seed >= 2**63 else seed


def bits32(x: float) -> int:
    """The bits of a number rounded to binary32.

    Raises:
        OverflowError: If that is infinite.
    """
    return struct.unpack("<I", struct.pack("<f", x))[0]

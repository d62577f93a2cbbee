"""What a pass is to do, checked and in plain numbers: the one thing that every backend takes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

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


def signed(seed: int) -> int:
    """The int64 of the bits of an unsigned one."""
    return seed - 2**64 if seed >= 2**63 else seed


def bits32(x: float) -> int:
    """The bits of a number rounded to binary32.

    Raises:
        OverflowError: If that is infinite.
    """
    return struct.unpack("<I", struct.pack("<f", x))[0]

"""What a pass is to do, checked and in plain numbers: the one thing that every backend takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zokernels.masks import MaskOf


@dataclass(frozen=True)
class AddNoise:
    """One ``add_noise`` pass over a list of tensors.

    ``out[i]`` receives the result for ``params[i]`` and may be the same tensor. Numbers are
    already rounded to binary32, unless the tensors are float64. ``decays`` and
    ``rounding_seeds`` have one entry, or with ``each_step`` one for each seed.
    """

    params: Sequence[torch.Tensor]
    out: Sequence[torch.Tensor]
    streams: Sequence[int]
    offsets: Sequence[int]
    seeds: Sequence[int]
    coeffs: Sequence[float]
    decays: Sequence[float]
    kind: int
    masks: Sequence[MaskOf]
    stochastic: bool
    rounding_seeds: Sequence[int]
    each_step: bool

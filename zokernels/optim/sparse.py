"""Sparse ZO: a random mask whose share of each tensor follows from the pretrained magnitudes.

The global threshold prunes a share s of all weights, ties included; the share of a tensor below it
is that tensor's ratio; a random mask with this ratio holds in the perturbations and in the update,
and is drawn again every r steps. Source: Zhang et al., ICML 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zokernels import masks, ops
from zokernels.estimators import SPARSITY, derive_seed
from zokernels.optim import selection
from zokernels.optim.groups import trainable

_CHUNK = 1 << 20


@dataclass(frozen=True)
class SparsityReport:
    """Shares of the trainable weights that are pruned: neither perturbed nor updated.

    Attributes:
        asked: The argument ``sparsity``.
        threshold: The magnitude at or below which a weight counted as pruned, at construction.
        stated: Share of the weights at or below it; above ``asked`` where there are ties.
        expected: Share that the mask prunes on average: each tensor's to 2⁻¹⁷ the stated one.
        realised: Share that the present mask prunes.
        deviation: Standard deviation of ``realised`` about ``expected``.
    """

    asked: float
    threshold: float
    stated: float
    expected: float
    realised: float
    deviation: float


def install(groups: Sequence[dict]) -> None:
    """Judge the weights as they are now, and give every group its mask.

    Raises:
        ValueError: If a group has a mask already.
    """
    refuse_masks(groups)
    judged = [g["params"][i] for g in groups for i in trainable(g)]
    threshold = selection.magnitude_at(judged, groups[0]["sparsity"])
    for group in groups:
        group["threshold"] = threshold
        mask_group(group)


def refuse_masks(groups: Sequence[dict]) -> None:
    """Raise ValueError if a group that sparsity is to mask has a mask of its own."""
    if any(g["mask"] is not None for g in groups):
        raise ValueError(
            "Both sparsity and mask are given, but sparsity makes a mask; give one of the two."
        )


def mask_group(group: dict) -> None:
    """Give a group its random mask, in plain numbers, by the threshold that it holds."""
    pruned = [selection.share_at_most(p, group["threshold"]) for p in group["params"]]
    group["mask"] = masks.to_plain(masks.Random([1.0 - s for s in pruned], _seed(group)))
    group["pruned"] = pruned


def redraw(groups: Sequence[dict]) -> None:
    """Bring the masks to the present step, if they are drawn again every few steps."""
    if groups[0]["resample_every"]:
        for group in groups:
            group["mask"] = {**group["mask"], "seed": _seed(group)}


def _seed(group: dict) -> int:
    every = group["resample_every"]
    return derive_seed(group["seed"], group["step"] // every if every else 0, 0, SPARSITY)


def report(groups: Sequence[dict], backend: str | None) -> SparsityReport:
    """Count what the masks of the groups prune.

    Raises:
        ValueError: If the optimizer has no ``sparsity``.
    """
    first = groups[0]
    if first["sparsity"] is None:
        raise ValueError("There is no sparsity to report; give the optimizer sparsity=0.2.")
    total = stated = expected = variance = kept = 0.0
    for group in groups:
        mask = masks.from_plain(group["mask"])
        for i in trainable(group):
            p, part = group["params"][i], masks.take(mask, [i])
            share = round(group["mask"]["keep"][i] * 65536) / 65536
            total += p.numel()
            stated += p.numel() * group["pruned"][i]
            expected += p.numel() * (1 - share)
            variance += p.numel() * share * (1 - share)
            kept += _count(p, part, group["streams"][i], backend)
    return SparsityReport(
        asked=first["sparsity"],
        threshold=first["threshold"],
        stated=stated / total,
        expected=expected / total,
        realised=1 - kept / total,
        deviation=math.sqrt(variance) / total,
    )


def _count(p: torch.Tensor, mask: masks.Mask | None, stream: int, backend: str | None) -> int:
    """How many elements a pass touches, by a pass of signs over zeros."""
    count = 0
    for start in range(0, p.numel(), _CHUNK):
        marks = torch.zeros(min(_CHUNK, p.numel() - start), device=p.device)
        ops.add_noise_(
            [marks], [0], [1.0], streams=[stream], offsets=[start], dist="rademacher", mask=mask,
            backend=backend,
        )  # fmt: skip
        count += int(marks.count_nonzero())
    return count

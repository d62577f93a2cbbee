"""What the optimizers read from a param group, and what a group may hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zokernels import masks, noise
from zokernels.estimators import ESTIMATORS, NORMALIZE, Moment
from zokernels.optim import blocks

# Param groups, each with the positions of the parameters in it that a pass is for.
Chosen = list[tuple[dict, list[int]]]

# What a param group cannot have of its own, since a step perturbs all groups together.
_OF_THE_RUN = (
    "seed", "step", "num_queries", "estimator", "normalize", "clip", "block_order", "sparsity",
    "resample_every", "threshold",
)  # fmt: skip

# What a param group has for each of its parameters, besides its mask.
_BY_PARAMETER = ("params", "streams", "blocks", "pruned")


def part(group: dict, places: Sequence[int]) -> dict:
    """The group of some of a group's parameters, before its first step: each keeps what is its own.

    Args:
        group: As the optimizer holds it, with its streams, the numbers of its blocks and its mask.
        places: Positions in it.
    """
    own = {name: group[name] for name in _BY_PARAMETER if group.get(name) is not None}
    taken = {name: [values[i] for i in places] for name, values in own.items()}
    mask = masks.take(masks.from_plain(group["mask"]), places)
    return {**group, **taken, "mask": masks.to_plain(mask)}


def join_run(group: dict, first: dict) -> None:
    """Let a group that joins a run go on where the first one is."""
    for name in _OF_THE_RUN:
        group[name] = first[name]


def mean_coefficients(group: dict, gradients: list[float]) -> list[float]:
    """The factors dₖ/q of the directions in ĝ; negated where the loss is maximized."""
    sign = -1.0 if group["maximize"] else 1.0
    return [sign * d / len(gradients) for d in gradients]


def moment_of(group: dict, block: int | None) -> Moment:
    """The running mean of d² of a group, or of a block of it."""
    return Moment(*group["moments"].get(block or 0, ()))


def rename(group: dict) -> None:
    """Give what a version of before called by another name its name."""
    if "two_sided" in group:
        group["estimator"] = "two_sided" if group.pop("two_sided") else "one_sided"


def trainable(group: dict) -> list[int]:
    """Positions of the group's parameters that require a gradient now."""
    return [i for i, p in enumerate(group["params"]) if p.requires_grad]


def describe(group: dict) -> str:
    """A line for each setting of a param group; of what has a number a parameter, how many."""
    params, blocks = group["params"], group["blocks"]
    lines = {name: _brief(value) for name, value in group.items() if name != "streams"}
    lines["params"] = f"{len(params)} tensors, {sum(p.numel() for p in params):,} weights"
    if blocks is not None:
        lines["blocks"] = str(len(set(blocks)))
    return "\n".join(f"    {name}: {lines[name]}" for name in sorted(lines))


def _brief(value: Any) -> str:
    # A dict is a mask, in plain numbers, or has a number for each block.
    if isinstance(value, dict) and "kind" in value:
        parts = [f"{name} {_brief(part)}" for name, part in value.items() if name != "kind"]
        return ", ".join([value["kind"], *parts])
    return f"{len(value)} values" if isinstance(value, list | dict) else str(value)


def join_masks(groups: Chosen) -> masks.Mask | None:
    """One mask over the chosen parameters of all groups."""
    if len({str(g["mask"] and g["mask"]["kind"]) for g, _ in groups}) > 1:
        raise ValueError(
            "The param groups have masks of different kinds, but a step perturbs all of them "
            "together; give all groups the same kind of mask."
        )
    taken = [(masks.take(masks.from_plain(g["mask"]), c), len(c)) for g, c in groups]
    return masks.concatenate(taken)


def check_group(group: dict) -> None:
    """Raise ValueError unless the numbers that every rule has are in range."""
    for name in ("lr", "weight_decay"):
        value = float(group[name])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, but it must be a finite number of at least 0.")
    if not (math.isfinite(float(group["eps"])) and float(group["eps"]) > 0):
        raise ValueError(f"eps is {group['eps']}, but it must be a finite number above 0.")
    if not isinstance(group["num_queries"], int) or group["num_queries"] < 1:
        raise ValueError(f"num_queries is {group['num_queries']!r}, but it must be at least 1.")
    _check_estimate(group)
    if group["dist"] not in noise.KINDS:
        raise ValueError(
            f"dist is {group['dist']!r}, but it must be one of {', '.join(noise.KINDS)}."
        )
    if group["rounding"] not in ("nearest", "stochastic"):
        raise ValueError(
            f"rounding is {group['rounding']!r}, but it must be 'nearest' or 'stochastic'."
        )
    if group["block_order"] not in blocks.ORDERS:
        raise ValueError(
            f"block_order is {group['block_order']!r}, but it must be one of "
            f"{', '.join(blocks.ORDERS)}."
        )
    noise.check_address(0, group["seed"], 0, 0)
    share, every = group["sparsity"], group["resample_every"]
    if share is not None and not 0.0 < share < 1.0:
        raise ValueError(f"sparsity is {share}, but it must be None or lie between 0 and 1.")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"resample_every is {every!r}, but it must be None or at least 1 step.")
    if every is not None and share is None:
        raise ValueError(
            f"resample_every is {every}, but there is no sparsity, whose mask it would draw "
            "again; give sparsity=0.2, or leave it out."
        )


def _check_estimate(group: dict) -> None:
    """Raise ValueError unless an estimate can be made as a group says."""
    queries, estimator, normalize = group["num_queries"], group["estimator"], group["normalize"]
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator is {estimator!r}, but it must be one of {', '.join(ESTIMATORS)}."
        )
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize is {normalize!r}, but it must be None, 'std' or 'ema'.")
    for name, value in (("estimator", estimator), ("normalize", normalize)):
        if value in ("population", "std") and queries < 2:
            raise ValueError(
                f"{name} is {value!r}, which compares a step's directions, but num_queries is "
                f"{queries}; make it at least 2, as 8 or 16."
            )
    clip = group["clip"]
    if clip is not None and not (math.isfinite(float(clip)) and float(clip) > 0):
        raise ValueError(f"clip is {clip}, but it must be None or a finite number above 0.")

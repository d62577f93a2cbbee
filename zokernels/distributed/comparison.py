"""Are the processes of a run where the others are: same settings, same weights?

Each sends three hashes: of its settings, of which elements it holds, and of these elements. What
differs is looked for only then, and named.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from zokernels.backends import shards
from zokernels.distributed.exchange import Exchange, RankError, Stepping
from zokernels.trajectory.checksum import checksum


def check(ranks: Exchange, optimizer: Stepping, whole: bool) -> None:
    """Compare settings and weights with the other processes'.

    Args:
        ranks: The processes.
        optimizer: Whose settings and weights.
        whole: Compare frozen parameters, too, and which process gathers with which.

    Raises:
        RankError: Naming the process, and the parameter or the setting that differs.
        ValueError: If processes that share a forward were given different directions.
    """
    settings = _settings(optimizer)
    text = json.dumps(settings, sort_keys=True, default=str)
    mine = [_hash(text), _hash(_places(optimizer, whole)), _weights(optimizer, whole)]
    step = optimizer.param_groups[0]["step"]
    rows = ranks.gather(torch.tensor(mine, dtype=torch.int64), step)
    if (stray := odd([row[0] for row in rows])) is not None:
        raise RankError(_explain_settings(ranks, settings, stray))
    if whole:
        _check_layout(ranks, optimizer)
    # Weights compare among those that hold the same part.
    for place in dict.fromkeys(row[1] for row in rows):
        alike = [r for r, row in enumerate(rows) if row[1] == place]
        if (n := odd([rows[r][2] for r in alike])) is not None:
            other = next(r for r in alike if rows[r][2] != rows[alike[n]][2])
            raise RankError(_explain_weights(ranks, optimizer, whole, alike[n], other))


def has_shards(optimizer: Stepping) -> bool:
    """Whether a process holds a part of the weights only."""
    return any(shards.is_sharded(p) for p in _parameters(optimizer))


def odd(values: Sequence[Any]) -> int | None:
    """Where the value stands that differs from what most have, of two the second; None if equal."""
    (usual, _), *others = Counter(values).most_common()
    return next(i for i, v in enumerate(values) if v != usual) if others else None


def _check_layout(ranks: Exchange, optimizer: Stepping) -> None:
    """Raise unless processes that gather weights for a forward run the same directions."""
    for p in _parameters(optimizer):
        if not shards.is_sharded(p):
            continue
        mesh: Any = p.device_mesh  # type: ignore[attr-defined]
        for place, placement in enumerate(p.placements):  # type: ignore[attr-defined]
            group = mesh.get_group(place)
            members = dist.get_process_group_ranks(group)
            here = {dist.get_group_rank(ranks.group, r) // ranks.data for r in members}
            if placement.is_shard() and here != {ranks.query_rank}:
                raise ValueError(
                    f"Ranks {members} hold parts of one parameter and so run each forward "
                    f"together, but {ranks!r} gives them different directions; let data be a "
                    "multiple of the number of shards, or give parallel='data'."
                )


def _explain_settings(ranks: Exchange, settings: dict[str, Any], stray: int) -> str:
    everyone = ranks.gather_objects(settings)
    other = everyone[1 if stray == 0 else 0]
    for key in sorted({*everyone[stray], *other}):
        there, here = everyone[stray].get(key), other.get(key)
        if there != here:
            return (
                f"Rank {stray} has {key} {there!r}, but the others have {here!r}; make the "
                "optimizer with the same settings in every process."
            )
    return f"Rank {stray} has other settings than the others; make them the same."


def _explain_weights(
    ranks: Exchange, optimizer: Stepping, whole: bool, stray: int, other: int
) -> str:
    step = optimizer.param_groups[0]["step"]
    chosen = _compared(optimizer, whole)
    everyone = ranks.gather_objects([checksum(shards.local(p)) for _, p in chosen])
    pairs = zip(everyone[stray], everyone[other], strict=True)
    name = next((chosen[i][0] for i, (a, b) in enumerate(pairs) if a != b), "?")
    return (
        f"Rank {stray} of {ranks.ranks} has strayed: before step {step} its parameter {name!r} is "
        f"not that of rank {other} (their checksums differ). Load the same weights in every "
        "process, and change them by nothing but step()."
    )


def _parameters(optimizer: Stepping) -> list[torch.Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def _compared(optimizer: Stepping, whole: bool) -> list[tuple[str, torch.Tensor]]:
    """Names and parameters to compare: what a step changes, or all there is."""
    if optimizer.model is not None:
        named: Sequence = list(optimizer.model.named_parameters())
    else:
        named = [(str(i), p) for i, p in enumerate(_parameters(optimizer))]
    return [(name, p) for name, p in named if whole or p.requires_grad]


def _weights(optimizer: Stepping, whole: bool) -> int:
    check = 0
    for _, p in _compared(optimizer, whole):
        own = checksum(shards.local(p)) or 0
        check = zlib.crc32(own.to_bytes(4, "little"), check)
    return check


def _places(optimizer: Stepping, whole: bool) -> str:
    return str([shards.ranges(p)[:1] for _, p in _compared(optimizer, whole)])


def _settings(optimizer: Stepping) -> dict[str, Any]:
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for i, group in enumerate(optimizer.param_groups):
        where = f" (group {i})" if len(optimizer.param_groups) > 1 else ""
        for key, value in group.items():
            if key == "params":
                value = [[list(p.shape), str(p.dtype), p.requires_grad] for p in value]
            if isinstance(value, torch.Tensor):
                value = float(value)
            if key != "history" and not (isinstance(value, dict) and "packed" in value):
                found[key + where] = value
    return found


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)

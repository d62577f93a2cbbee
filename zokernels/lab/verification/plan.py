"""All cases of this machine, and which of them a pattern names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from zokernels.lab.verification import model, noise, passes, reference, replay, training
from zokernels.lab.verification.case import Case
from zokernels.lab.verification.engines import devices, engines


@dataclass(frozen=True)
class Plan:
    """The cases, and what of this library is not there to be verified, with the reasons."""

    cases: list[Case]
    missing: dict[str, str]


def plan(deep: bool = False) -> Plan:
    """List the cases; nothing is run.

    Args:
        deep: More combinations, sizes and samples.
    """
    found, missing = engines()
    missing |= {f"training/{n}": why for n, why in model.names().items() if why is not None}
    cases = [
        *noise.cases(found),
        *noise.statistics(deep),
        *reference.cases(),
        *passes.cases(found, deep),
        *training.cases(devices(), deep),
        *training.drift(devices()),
        *replay.cases(found),
    ]
    return Plan(cases, missing)


def matches(id: str, patterns: Sequence[str]) -> bool:
    """Whether an id is one of the patterns, lies under one, or fits one with wildcards."""
    return any(
        id == p or id.startswith(p.rstrip("/") + "/") or fnmatch.fnmatchcase(id, p)
        for p in patterns
    )

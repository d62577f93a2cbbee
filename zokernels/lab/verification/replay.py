"""A recorded run, made again from its log by every backend."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import zokernels as zk
from zokernels.lab.verification import model as models
from zokernels.lab.verification.case import Case
from zokernels.lab.verification.engines import REFERENCE, Engine
from zokernels.lab.verification.training import compare, make, weights_of

# Rule, type and distribution.
_RUNS = (
    ("ZOSGD", "float32", "gaussian"),
    ("ZOSGD", "bfloat16", "gaussian"),
    ("ZOSGDMomentum", "float16", "gaussian"),
    ("ZOAdam", "bfloat16", "gaussian"),
    ("ZOSGD", "bfloat16", "rank1"),
    ("ZOAdam", "float32", "rank1"),
)
_STEPS = 12


def cases(engines: Sequence[Engine]) -> Iterator[Case]:
    """A recording by the default backend, replayed by each engine."""
    for rule, dtype, dist in _RUNS:
        for engine in (REFERENCE, *engines):
            run = functools.partial(_replays, rule, dtype, dist, engine)
            yield Case(f"replay/{engine.name}/{rule}/{dtype}/{dist}", run)


# The engines of a run come one after the other.
@functools.lru_cache(maxsize=1)
def _recorded(rule: str, dtype: str, dist: str) -> tuple[bytes, list[str], list[torch.Tensor]]:
    """The log of a run, and the names and values of the weights that it ended with."""
    model, loss = models.build("module", dtype, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zk"
        optimizer = make(rule, model, dtype, dist=dist)
        optimizer.record(path)
        for _ in range(_STEPS):
            optimizer.step(loss)
        optimizer.trajectory.close()
        return path.read_bytes(), *weights_of(model)


def _replays(rule: str, dtype: str, dist: str, engine: Engine) -> str:
    log, names, expected = _recorded(rule, dtype, dist)
    model, _ = models.build("module", dtype, engine.device)
    with tempfile.TemporaryDirectory() as folder, engine.chosen():
        path = Path(folder) / "run.zk"
        path.write_bytes(log)
        # Chunks that do not divide the steps.
        zk.replay(model, path, backend=engine.backend, chunk=5)
    got = weights_of(model)[1]
    compare(names, expected, got, "the replayed weights are not the trained ones")
    return f"{_STEPS} steps, {len(log):,} bytes"

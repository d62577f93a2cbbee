"""A recorded run, made again from its log by every backend."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from zokernels.trajectory import replay
from zokernels.verification import model as models
from zokernels.verification.case import Case
from zokernels.verification.engines import REFERENCE, Engine
from zokernels.verification.training import compare, make, weights_of

_RUNS = {
    "ZOSGD": ("float32", "bfloat16"),
    "ZOSGDMomentum": ("float16",),
    "ZOAdam": ("bfloat16",),
}
_STEPS = 12


def cases(engines: Sequence[Engine]) -> Iterator[Case]:
    """A recording by the default backend, replayed by each engine."""
    for rule, dtypes in _RUNS.items():
        for dtype in dtypes:
            for engine in (REFERENCE, *engines):
                run = functools.partial(_replays, rule, dtype, engine)
                yield Case(f"replay/{engine.name}/{rule}/{dtype}", run)


def _replays(rule: str, dtype: str, engine: Engine) -> str:
    model, loss = models.build("module", dtype, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zk"
        optimizer = make(rule, model, dtype)
        optimizer.record(path)
        for _ in range(_STEPS):
            optimizer.step(loss)
        optimizer.trajectory.close()
        again, _ = models.build("module", dtype, engine.device)
        with engine.chosen():
            # Chunks that do not divide the steps.
            replay(again, path, backend=engine.backend, chunk=5)
        size = path.stat().st_size
    names, expected = weights_of(model)
    compare(names, expected, weights_of(again)[1], "the replayed weights are not the trained ones")
    return f"{_STEPS} steps, {size:,} bytes"

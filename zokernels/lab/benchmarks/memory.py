"""Peak memory of a step, measured in a process of its own, beside what arithmetic says.

On a CPU the peak is the process's high-water mark over two steps, less what the process held before
the model was built; on CUDA it is the most that the allocator gave out, which one process can
measure for one cell after the other. A step that would not fit is not started: its row is
arithmetic alone, and says so.

``python -m zokernels.lab.benchmarks.memory CELL``, with a cell as JSON, measures one and prints it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zokernels.lab.benchmarks import high_water, machine, models, timing
from zokernels.lab.benchmarks.instruments import footprint
from zokernels.lab.benchmarks.instruments.footprint import Cell, Footprint
from zokernels.lab.runs import optimizers
from zokernels.lab.runs.out_of_memory import says_out

COLUMNS = (
    *machine.COLUMNS, "model", "optimizer", "perturb", "dtype", "rows", "length", "source",
    "peak_mb", "theory_mb", "weights_mb", "state_mb", "scratch_mb", "run_mb", "step_s", "dist",
    "points",
)  # fmt: skip
# Those that files of earlier versions lack.
LATER = (*machine.LATER, "dist", "points")
MEASURED, ARITHMETIC, KILLED = "measured", "arithmetic", "killed for memory"
FAILED = "failed: "
# What the system, and libraries for themselves, need besides a cell's own bytes.
_MARGIN, _SLACK = 1 << 30, 1.25
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_STEPS = 2
# For a guess of the time: seconds of a process that imports torch and builds a model, and what a
# step comes to in forwards, where it is not two.
_START = 12.0
_FORWARDS = {"zo-sgd-cons": 3, "forward-grad": 3, "fo-sgd": 3, "fo-adam": 3}
_BASE: dict[str, Any] = dict(
    lr=1e-7, eps=1e-3, weight_decay=0.0, fo_lr=1e-7, fo_optimizer="fo-adam"
)


def row(cell: Cell, measure: bool = True, here: bool = False) -> dict[str, Any]:
    """The values of `COLUMNS`: measured where it fits, and by arithmetic in any case.

    Args:
        cell: What to measure.
        measure: Whether to try.
        here: Measure in this process, whose other memory on a CPU blurs it.
    """
    theory = _theory(cell)
    found: dict[str, Any] = {"source": ARITHMETIC}
    if measure and fits(theory, cell.device):
        found = run_here(cell) if here else run(cell)
    peak: int | None = found.get("peak")
    return {
        **machine.about(cell.device),
        **{k: v for k, v in asdict(cell).items() if k != "device"},
        **{k: "" for k in ("perturb", "dist", "points") if not is_perturbed(cell.optimizer)},
        "source": found["source"],
        "peak_mb": "" if peak is None else f"{peak / 2**20:.0f}",
        "theory_mb": f"{theory.total / 2**20:.0f}",
        **{f"{k}_mb": f"{v / 2**20:.0f}" for k, v in asdict(theory).items()},
        "step_s": f"{found['seconds']:.2f}" if "seconds" in found else "",
    }


def guess(cell: Cell, product: float) -> float:
    """Seconds that a cell may take to measure, by its sizes; 0 if it is not to be started.

    Args:
        cell: What to measure.
        product: Seconds of one multiplication and addition.
    """
    theory = _theory(cell)
    if not fits(theory, cell.device):
        return 0.0
    weights = theory.weights / getattr(torch, cell.dtype).itemsize
    products = weights * cell.rows * cell.length * _STEPS * _FORWARDS.get(cell.optimizer, 2)
    return _START + product * products


@functools.lru_cache(maxsize=1024)
def _theory(cell: Cell) -> Footprint:
    # It takes a second, and is asked for before a cell is measured and after it.
    return footprint.of(cell)


def is_perturbed(optimizer: str) -> bool:
    """Whether an optimizer has a way of perturbing weights."""
    kind = footprint.KINDS[optimizer]
    return kind.perturbs and not kind.tangent


def fits(theory: Footprint, device: str) -> bool:
    """Whether a cell can be measured here without driving the machine out of memory."""
    free = machine.free_memory(device)
    return free is None or theory.total * _SLACK + _MARGIN < free


def run(cell: Cell) -> dict[str, Any]:
    """Measures in a fresh process: the source, peak bytes, and seconds of the last step.

    If that fails, the source says why, and there are no numbers.
    """
    done = subprocess.run(
        [sys.executable, "-m", "zokernels.lab.benchmarks.memory", json.dumps(asdict(cell))],
        capture_output=True,
        text=True,
        env=machine.environment(),
    )
    if done.returncode == 0:
        return {"source": MEASURED, **json.loads(done.stdout.splitlines()[-1])}
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    # The kernel kills with 9; allocators say it.
    if done.returncode == -9 or said == "MemoryError" or says_out(said):
        return {"source": KILLED}
    return {"source": FAILED + said}


def run_here(cell: Cell) -> dict[str, Any]:
    """Measures in this process; what `run` gives."""
    try:
        return {"source": MEASURED, **_measure(cell)}
    except torch.OutOfMemoryError:
        return {"source": KILLED}
    finally:
        _tidy()


def step_of(model: Any, cell: Cell) -> Callable[[], Any]:
    """One step of a cell's optimizer; of "inference" the two forwards of one."""
    inputs = models.batch(model, cell.rows, cell.length, caches=False)

    def closure() -> torch.Tensor:
        return model(**inputs).loss

    @torch.no_grad()
    def forwards() -> None:
        float(closure())
        float(closure())

    if cell.optimizer == "inference":
        return forwards
    options = {**_BASE, "hybrid_split": footprint.split(model.config.num_hidden_layers)}
    if is_perturbed(cell.optimizer):
        options |= dict(perturb=cell.perturb, dist=cell.dist, points=cell.points)
        options["num_queries"] = max(1, cell.points // 2)
    opt = optimizers.build(cell.optimizer, model, options)
    return lambda: opt.step(closure)


def _measure(cell: Cell) -> dict[str, Any]:
    dtype = getattr(torch, cell.dtype)
    # What torch and its libraries take when they are first used is not the step's.
    tiny = _tiny(cell, dtype).to(cell.device).eval()
    warm = step_of(tiny, Cell(**{**asdict(cell), "rows": 1, "length": 8}))
    for _ in range(_STEPS):
        warm()
    del tiny, warm
    _tidy()
    before = high_water.held(cell.device)
    step = step_of(models.build(cell.model, dtype, cell.device), cell)
    _tidy()
    high_water.reset(cell.device)
    for _ in range(_STEPS):
        began = time.perf_counter()
        step()
        timing.synchronize(cell.device)
        seconds = time.perf_counter() - began
    return {"peak": high_water.mark(cell.device) - before, "seconds": seconds}


def _tiny(cell: Cell, dtype: torch.dtype) -> Any:
    """A model of the same classes that is small in every way."""
    config = models.config(cell.model)
    small = dict(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, vocab_size=512)
    for name, value in small.items():
        setattr(config, name, value)
    for name in ("ffn_dim", "intermediate_size", "word_embed_proj_dim", "num_key_value_heads"):
        if hasattr(config, name):
            setattr(config, name, 4 if name == "num_key_value_heads" else 64)
    if hasattr(config, "head_dim"):
        config.head_dim = 16
    return models.of_config(config, dtype)


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # The C library keeps what was freed; where it is another one than glibc, it can't be asked.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    if _OOM_SCORE.exists():
        # If memory runs out after all, it is this process that goes.
        _OOM_SCORE.write_text("1000")
    print(json.dumps(_measure(Cell(**json.loads(sys.argv[1])))))

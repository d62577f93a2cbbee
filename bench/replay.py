"""Replay against its floor, and a record's cost: ``python -m bench.replay``, into replay.csv.

The floor of K recorded steps is the making of their noise: one pass of K seeds, which rounds once.
Replay rounds to the weights' type after every step; step by step, the weights go through memory
every time. All run in turn within the same moments, and the medians are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import zokernels as zk
from zokernels.lab.benchmarks import machine, results, timing
from zokernels.lab.benchmarks.passes import Tensors
from zokernels.trajectory.playback import CHUNK

RESULTS = results.FOLDER / "replay.csv"
STEPS = CHUNK
# On a disk and not in memory, so that syncs cost what they do.
SCRATCH = os.environ.get("ZOKERNELS_BENCH_DIR", ".")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write a row for each type."""
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__)
    parser.add_argument("--numel", type=int, default=4_000_000, help="weights in a tensor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    options = parser.parse_args(arguments)
    about = {**machine.about(), "gcc": machine.gcc(), "numel": options.numel}
    rows = [
        {**about, **measure(dtype, options.numel, options.repeats)}
        for dtype in ("float32", "bfloat16")
    ]
    results.write(options.out, list(rows[0]), rows)
    print(options.out.read_text(), end="")


def measure(dtype: str, numel: int, repeats: int) -> dict[str, str | int]:
    """Times in ns a weight and step, and what a record takes."""
    model = nn.Module()
    model.weight = nn.Parameter(Tensors(numel).weights(dtype))
    base = model.weight.detach().clone()
    opt = zk.ZOSGD(model, lr=1e-6, backend="native", perturb="in_place")
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        path = Path(scratch) / "run.zk"
        recorder = opt.record(path)
        empty = path.stat().st_size
        losses = iter(range(10**9))
        for _ in range(STEPS):
            opt.step(lambda: float(next(losses) % 7))
        recorder.close()
        size = (path.stat().st_size - empty) / STEPS
        seeds, coeffs = list(range(STEPS)), [1e-7 * (k % 7 + 1) for k in range(STEPS)]
        weight = model.weight.detach()

        def replay() -> None:
            zk.replay(model, path, STEPS, backend="native")

        def floor() -> None:
            zk.ops.add_noise_([weight], seeds, coeffs, backend="native")

        def by_step() -> None:
            for seed, c in zip(seeds, coeffs, strict=True):
                zk.ops.add_noise_([weight], [seed], [c], backend="native")

        times: dict[str, list[float]] = {"replay": [], "floor": [], "by_step": []}
        for _ in range(repeats):
            # Replay begins by comparing the weights with their checksum, which is in its time.
            weight.copy_(base)
            for name, run in (("replay", replay), ("floor", floor), ("by_step", by_step)):
                times[name].append(timing.clock(run))
    each = {name: statistics.median(t) / numel / STEPS * 1e9 for name, t in times.items()}
    return {
        "dtype": dtype,
        "steps": STEPS,
        "replay_ns": f"{each['replay']:.4f}",
        "floor_ns": f"{each['floor']:.4f}",
        "by_step_ns": f"{each['by_step']:.4f}",
        "replay_over_floor": f"{each['replay'] / each['floor']:.3f}",
        "bytes_a_step": f"{size:.1f}",
        "record_us": f"{record_seconds() * 1e6:.1f}",
        "sync_ms": f"{sync_seconds() * 1e3:.2f}",
    }


def sync_seconds(syncs: int = 100) -> float:
    """Median time of bringing a record to the disk."""
    spent = []
    with tempfile.TemporaryFile(dir=SCRATCH) as file:
        for _ in range(syncs):
            os.write(file.fileno(), b"x" * 36)
            spent.append(timing.clock(lambda: os.fsync(file.fileno())))
    return statistics.median(spent)


def record_seconds(steps: int = 5000) -> float:
    """Mean time that recording takes of a step; of short ones, so that syncs hardly count."""
    spent = 0.0

    def timed(function: Callable) -> Callable:
        def run(*args: object, **options: object) -> object:
            nonlocal spent
            started = time.perf_counter()
            result = function(*args, **options)
            spent += time.perf_counter() - started
            return result

        return run

    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        opt = zk.ZOSGD([nn.Parameter(torch.ones(8))], lr=1e-6, perturb="in_place")
        recorder = opt.record(Path(scratch) / "run.zk")
        for name in ("_scalars", "write"):
            setattr(recorder, name, timed(getattr(recorder, name)))
        for step in range(steps):
            opt.step(lambda step=step: float(step % 7))
        recorder.close()
    return spent / steps


if __name__ == "__main__":
    main()

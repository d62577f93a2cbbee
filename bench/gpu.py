"""The passes on a CUDA device, beside a copy of the same bytes and the peers.

``python -m bench.gpu --out FILE``; bench/on_gpu.sh runs it with the tests. A case is timed by CUDA
events, after warming up, over buffers far larger than the cache; medians are taken, and the copy is
timed again for each type in the same minute.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton
import triton.language as tl

from zokernels import ops
from zokernels.benchmarks.machine import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "gpu.csv"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-3
COLUMNS = (
    "date", "commit", "device", "torch", "triton", "numel", "dtype", "case", "ms", "spread_ms",
    "ps_per_weight", "gb_per_s", "ratio_to_copy", "speedup_over_mezo",
)  # fmt: skip


@triton.jit
def _randn_kernel(w_ptr, seed, scale, n, BLOCK: tl.constexpr):
    """What Triton itself offers: w + scale · randn, by its own Philox and Box–Muller."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + at, mask=at < n).to(tl.float32)
    w += scale * tl.randn(seed, at)
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=at < n)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--numel", type=int, nargs="+", default=[10**8, 10**9])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("Nothing to measure: torch sees no CUDA device.")
    about = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    rows = []
    for numel in options.numel:
        for dtype in DTYPES:
            need = 6 * numel * DTYPES[dtype].itemsize
            if torch.cuda.mem_get_info()[0] < need:
                print(f"{numel:,} × {dtype} left out: needs {need / 1e9:.0f} GB", file=sys.stderr)
                continue
            rows += [about | row for row in measure(numel, dtype, options.repeats)]
            torch.cuda.empty_cache()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows written to {options.out}", file=sys.stderr)


def measure(numel: int, dtype: str, repeats: int) -> list[dict[str, object]]:
    """The rows of one size and type."""
    p = torch.empty(numel, dtype=DTYPES[dtype], device="cuda").normal_(std=0.02)
    rows: list[dict[str, object]] = []
    taken: dict[str, float] = {}
    size = p.element_size()
    for name, (build, accesses) in cases(numel, size).items():
        try:
            run = build(p)
            times = clock(run, repeats)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        taken[name] = statistics.median(times)
        moved = accesses * numel
        row = {
            "numel": numel,
            "dtype": dtype,
            "case": name,
            "ms": f"{taken[name]:.4f}",
            "spread_ms": f"{max(times) - min(times):.4f}",
            "ps_per_weight": f"{taken[name] / numel * 1e9:.2f}",
            "gb_per_s": f"{moved / taken[name] / 1e6:.0f}",
            "ratio_to_copy": f"{taken[name] / taken['copy']:.3f}",
            "speedup_over_mezo": f"{taken['mezo'] / taken[name]:.2f}",
        }
        rows.append(row)
        print(
            f"{numel:>13,} {dtype:9} {name:28} {row['ms']:>9} ms {row['gb_per_s']:>6} GB/s "
            f"{row['ratio_to_copy']:>7} × copy {row['speedup_over_mezo']:>7} × MeZO"
        )
    return rows


Build = Callable[[torch.Tensor], Callable[[], object]]


def cases(numel: int, size: int) -> dict[str, tuple[Build, int]]:
    """Each case, and the bytes a weight that it must move."""
    found: dict[str, tuple[Build, int]] = {"copy": (_copy, 2 * size), "mezo": (_mezo, 2 * size)}
    found["mezo-inplace"] = (_inplace, 2 * size)
    found["mezo-compiled"] = (_compiled(_published), 2 * size)
    found["mezo-inplace-compiled"] = (_compiled(_published_inplace), 2 * size)
    found["triton-randn"] = (_randn, 2 * size)
    for dist in ("gaussian", "rademacher"):
        for k in (1, 2, 8):
            found[f"add_noise {dist} K={k}"] = (_add_noise(dist, k), 2 * size)
    found["add_noise gaussian stochastic"] = (_add_noise("gaussian", 1, "stochastic"), 2 * size)
    for rule, states in (("sign", 0), ("momentum", 1), ("adam", 2), ("amsgrad", 3)):
        if numel <= 10**8:
            found[rule] = (_update(rule, states), 2 * size + 8 * states)
    return found


def clock(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repetition, on the device's own clock."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def _copy(p: torch.Tensor) -> Callable[[], object]:
    other = torch.empty_like(p)
    return lambda: other.copy_(p)


def _published(p: torch.Tensor) -> torch.Tensor:
    # MeZO's perturbation as published.
    z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
    return p + z * EPS


def _published_inplace(p: torch.Tensor) -> None:
    p.add_(torch.randn_like(p), alpha=EPS)


def _mezo(p: torch.Tensor) -> Callable[[], object]:
    return lambda: _published(p)


def _inplace(p: torch.Tensor) -> Callable[[], object]:
    return lambda: _published_inplace(p)


def _compiled(function: Callable) -> Build:
    def build(p: torch.Tensor) -> Callable[[], object]:
        compiled = torch.compile(function, dynamic=False, fullgraph=True)
        return lambda: compiled(p)

    return build


def _randn(p: torch.Tensor) -> Callable[[], object]:
    grid = (triton.cdiv(p.numel(), 1024),)
    return lambda: _randn_kernel[grid](p, 7, EPS, p.numel(), BLOCK=1024)


def _add_noise(dist: str, k: int, rounding: str = "nearest") -> Build:
    def build(p: torch.Tensor) -> Callable[[], object]:
        seeds, coeffs = list(range(k)), [EPS] * k
        return lambda: ops.add_noise_(
            [p], seeds, coeffs, dist=dist, rounding=rounding, backend="triton"
        )

    return build


def _update(rule: str, states: int) -> Build:
    def build(p: torch.Tensor) -> Callable[[], object]:
        made = [[torch.zeros(p.numel(), device="cuda") for _ in range(states)]]
        name, amsgrad = ("adam", True) if rule == "amsgrad" else (rule, False)
        return lambda: ops.apply_update_(
            [p], made, name, [1], [EPS], lr=1e-6, amsgrad=amsgrad, backend="triton"
        )

    return build


if __name__ == "__main__":
    main()

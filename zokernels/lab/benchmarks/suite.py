"""What `zokernels bench all` runs, how long that may take, and what it says of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zokernels.lab.benchmarks import peers

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One command.

    Attributes:
        command: Of ``zokernels bench``; it takes ``--csv``, ``--json`` and ``--plot``.
        options: Its others.
        minutes: What it takes on two cores.
        name: Of its files and its line in the summary; rows of one command share a CSV file.
        needs: The package that it can't do without, if there is one.
    """

    command: str
    options: tuple[str, ...]
    minutes: float
    name: str
    needs: str = ""

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped: four times what it takes."""
        return 240 * self.minutes


def runs(full: bool) -> list[Run]:
    """The commands, with settings that suit this machine."""
    hf = "transformers"
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    shape = ("--rows", "16", "--length", "64") if on_gpu else ("--rows", "2", "--length", "64")
    step = ("--model", "opt-1.3b" if on_gpu else "opt-125m", *shape, "--device", device)
    capability = torch.cuda.get_device_capability() if on_gpu else (9, 0)
    here = ("--sm", str(10 * capability[0] + capability[1]))
    sizes = ("--full", "--seconds", "400") if full else ("--quick", "--seconds", "30")
    found = [
        Run("ops", (*sizes, "--device", device), 12 if full else 1, "ops"),
        Run("step", (*step, "--dtype", "bfloat16" if on_gpu else "float32", "--repeats",
                     "20" if full else "6"), 3 if full else 1.5, "step", hf),
    ]  # fmt: skip
    if full:
        narrow = (*step, "--dtype", "bfloat16")
        found.append(Run("step", (*narrow, "--dist", "rademacher"), 4, "step-rademacher", hf))
        found.append(Run("step", (*narrow, "--dist", "rank1"), 4, "step-rank1", hf))
        found.append(
            Run("step", (*narrow, "--loss", "candidates", "--no-peers"), 2, "step-candidates", hf)
        )
        found.append(Run("step", (*narrow, "--scheme", "lora", "--no-peers"), 2, "step-lora", hf))
    lengths = ("64", "256", "1024") if full else ("64", "512")
    named = [part for length in lengths for part in ("--length", length)]
    chosen = () if full else ("--optimizer", "zo-sgd", "--optimizer", "fo-adam")
    found.append(
        Run("memory", (*chosen, *named, "--device", device), 10 if full else 2, "memory", hf)
    )
    found.append(Run("codegen", () if full else here, 3 if full else 1, "codegen", "triton"))
    return found


def headline(command: str, rows: Rows) -> list[str]:
    """The few lines of the summary that a run's rows come to."""
    return _HEADLINES.get(command, lambda rows: [f"{len(rows)} rows"])(rows)


def _ops(rows: Rows) -> list[str]:
    said: dict[str, str] = {}
    for row in rows:
        ours = row["dist"] == "gaussian" and row["case"].split("-")[0] in ("native", "triton")
        if not ours or row["variant"] or row["op"] not in ("add_noise_", "adam"):
            continue
        what = f"{row['op']} {row['dtype']}"
        faster = row["speedup_over_fastest_peer"]
        beside = f", {faster} times as fast as {row['fastest_peer']}" if faster else ""
        # Of several instruction sets the first is the fastest.
        said.setdefault(what, f"{what}: {row['ratio_to_floor_median']} times its floor{beside}")
    return list(said.values())


def _step(rows: Rows) -> list[str]:
    first = peers.beside(rows)
    found = ((name, first.get(name)) for name in ("mezo", "fo-sgd", "fo-adamw"))
    beside = ", ".join(f"{name} {ratio}" for name, ratio in found if ratio)
    lines = [
        f"{row['perturb']}, {row['dtype']}: {row['ratio']} times its forwards "
        f"({row['low']}–{row['high']})"
        for row in rows
    ]
    return [*lines, f"beside it: {beside}"] if beside else lines


def _codegen(rows: Rows) -> list[str]:
    spilled = sum(int(row["spills"]) > 0 for row in rows)
    lines = [
        f"{row['case']}, sm_{row['sm']}: {row['instructions_per_weight']} instructions a weight"
        for row in rows
        if row["case"].startswith("add_noise") and row["case"].endswith("gaussian")
    ]
    return [*lines[:3], f"{spilled} of {len(rows)} kernels spill registers"]


def _memory(rows: Rows) -> list[str]:
    return [
        f"{row['optimizer']}, {row['rows']} × {row['length']} tokens: "
        f"{float(row['peak_mb'] or row['theory_mb']) / 1024:.2f} GiB, {row['source']}"
        for row in rows
    ]


_HEADLINES: dict[str, Callable[[Rows], list[str]]] = {
    "ops": _ops,
    "step": _step,
    "memory": _memory,
    "codegen": _codegen,
}

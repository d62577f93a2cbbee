"""All parts of the documents that are made from rows."""

from __future__ import annotations

from bench.report.figures import accuracy, roofline, step
from bench.report.figures import estimates as learned
from bench.report.figures import gpu as gpu_steps
from bench.report.figures import ops as passes
from bench.report.figures import reward as rewards
from bench.report.figures import study as all_cells
from bench.report.parts import Figure, Part, Table
from bench.report.tables import (
    advice,
    codegen,
    directions,
    estimates,
    gpu,
    hybrid,
    instructions,
    numerics,
    ops,
    optimizers,
    quantised,
    quickstart,
    replay,
    reward,
    steps,
    study,
    wheels,
)
from bench.report.tables import memory as memories
from zokernels.lab.benchmarks import peaks

README, PERFORMANCE = "README.md", "docs/performance.md"
OPTIMIZERS, NUMERICS = "docs/optimizers.md", "docs/numerics.md"

# What bench/on_gpu.sh writes, where there was a GPU.
GPU = ("gpu/check.csv", "gpu/ops.csv", "gpu/step.csv")

PARTS: tuple[Part, ...] = (
    Table("gpu-status", README, GPU, gpu.status, optional=True),
    Table("memory-summary", README, ("memory.csv", "gpu/memory.csv"), memories.summary, True),
    Table("step-summary", README, ("step.csv",), steps.summary),
    Table("ops", PERFORMANCE, ("ops.csv",), ops.tables),
    Table("instructions", PERFORMANCE, ("instructions.csv",), instructions.table),
    Table("step", PERFORMANCE, ("step.csv",), steps.tables),
    Table("step-targets", PERFORMANCE, ("step.csv",), steps.targets),
    Table("gpu", PERFORMANCE, GPU, gpu.tables, optional=True),
    Table("codegen", PERFORMANCE, ("codegen.csv",), codegen.table),
    Table("codegen-reading", PERFORMANCE, ("codegen.csv",), codegen.reading),
    Table("memory", "docs/memory.md", ("memory.csv",), memories.measured),
    Table("memory-arithmetic", "docs/memory.md", ("memory.csv",), memories.arithmetic),
    Table("gpu-memory", "docs/memory.md", ("gpu/memory.csv",), gpu.memory, optional=True),
    Table("quantised", "docs/memory.md", ("quantised.csv",), quantised.table),
    Table("study", "docs/study.md", ("study.csv",), study.tables),
    Table("study-rates", "docs/study.md", ("study_rates.csv",), study.tables),
    Table("directions", "docs/study.md", ("directions.csv",), directions.table),
    Table("gain", README, ("estimates.csv",), estimates.gain),
    Table("estimates", "docs/study.md", ("estimates.csv",), estimates.table),
    Table("advice", "docs/study.md", ("advice.csv", "estimates.csv"), advice.table, True),
    Table("reward", "docs/recipes/reward.md", ("reward.csv",), reward.table),
    Table("generation", "docs/recipes/reward.md", ("generation.csv",), reward.generation),
    Table("quickstart", "docs/finetune.md", ("quickstart.csv",), quickstart.table),
    Table("rules", OPTIMIZERS, (), optimizers.rules),
    Table("costs", OPTIMIZERS, ("optimizers.csv",), optimizers.costs),
    Table("hybrid", OPTIMIZERS, ("hybrid.csv",), hybrid.table),
    Table("estimate", NUMERICS, ("numerics.csv",), numerics.estimate),
    Table("rank1", NUMERICS, ("numerics.csv",), numerics.rank1),
    Table("update", NUMERICS, ("numerics.csv",), numerics.update),
    Table("restore", NUMERICS, ("numerics.csv",), numerics.restore),
    Table("replay", "docs/reliability.md", ("replay.csv",), replay.table),
    Table("recording", "docs/reliability.md", ("replay.csv",), replay.recording),
    Table("wheels", "docs/install.md", ("wheels.csv",), wheels.table),
    Figure("step", ("step.csv",), step.draw, version=3),
    Figure("ops", ("ops.csv",), passes.draw, version=1),
    Figure("gpu-step", ("gpu/step.csv",), gpu_steps.draw, version=1, optional=True),
    Figure("roofline", ("codegen.csv",), roofline.draw, version=1),
    Figure("memory", ("memory.csv",), peaks.draw, version=3),
    Figure("accuracy", ("study.csv", "quickstart.csv"), accuracy.draw, version=2),
    Figure("estimates", ("estimates.csv",), learned.draw, version=1),
    Figure("reward", ("reward.csv",), rewards.draw, version=1),
    Figure("study", ("study.csv",), all_cells.draw, version=1),
)

#!/usr/bin/env bash
# The rows of bench/results/step.csv on a CPU: each target of docs/performance.md, and each idea
# with and without. About 25 minutes on two cores; nothing else should run.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-bench/results/step.csv}
ZOKERNELS=${ZOKERNELS:-.venv/bin/zokernels}
# An idle thread that spins loses its core on a shared virtual machine, and is late for the next pass.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-2000}

step() { "$ZOKERNELS" bench step --csv "$OUT" --repeats "${REPEATS:-20}" "$@"; }

step --perturb on_entry --perturb paired --perturb in_place
step --perturb on_entry --perturb paired --perturb in_place --dtype bfloat16
step --no-peers --rows 8 --length 32
step --no-peers --dist rademacher
step --no-peers --dist rademacher --dtype bfloat16
step --no-peers --loss candidates
step --no-peers --loss candidates --dtype bfloat16
step --no-peers --scheme lora
step --no-peers --no-lazy-logits
step --no-peers --no-lazy-logits --dtype bfloat16
step --perturb on_entry --perturb paired --dist rank1
step --perturb on_entry --perturb paired --dist rank1 --dtype bfloat16
step --no-peers --dist rank1 --rows 8 --length 32
step --no-peers --dist rank1 --loss candidates
step --no-peers --dist rank1 --loss candidates --dtype bfloat16
for dtype in float32 bfloat16; do
    step --no-peers --dist rank1 --queries 8 --perturb on_entry --dtype "$dtype"
    step --no-peers --dist rank1 --queries 8 --perturb paired --points 16 --dtype "$dtype"
done

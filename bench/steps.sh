#!/usr/bin/env bash
# The rows of bench/results/step.csv on a CPU: each target of docs/performance.md, and each idea
# with and without. About ten minutes on two cores; nothing else should run.
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
step --no-peers --queries 4 --repeats 8

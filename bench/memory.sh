#!/usr/bin/env bash
# The rows of docs/memory.md, into bench/results/memory.csv: measured on a CPU what fits in a few
# GiB, and by arithmetic the paper's model and task. Memory hardly depends on other load, so this
# needs no quiet machine; some ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-bench/results/memory.csv}"
python="${PYTHON:-.venv/bin/python}"

bench() { "$python" -m zokernels.lab.cli bench memory --csv "$out" "$@"; }

bench --rows 1 --length 64 --length 256 --length 1024
bench --rows 4 --rows 16 --length 64 --optimizer zo-sgd --optimizer fo-sgd --optimizer fo-adam
for perturb in paired in_place; do
    bench --rows 1 --length 256 --optimizer zo-sgd --perturb "$perturb"
done
bench --rows 1 --length 256 --dtype bfloat16 \
    --optimizer zo-sgd --optimizer zo-adam --optimizer fo-sgd --optimizer fo-adam
# Along rank one, with a forward a point, and with both sides or sixteen points in one.
for points in 2 4 16; do
    bench --rows 1 --length 256 --optimizer zo-sgd --dist rank1 --perturb paired --points "$points"
done
bench --rows 1 --length 256 --optimizer zo-sgd --dist rank1
# MultiRC on OPT-13B, which no machine at hand holds.
bench --model opt-13b --dtype bfloat16 --rows 16 --length 128 --length 512 --length 2048 \
    --no-measure

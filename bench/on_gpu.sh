#!/usr/bin/env bash
# Everything that needs a CUDA device, in one run of under ten minutes: the native library built in
# place, the tests marked gpu, and the timings. Nothing is installed; results go to $OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

export PYTHONPATH=$PWD
"$PYTHON" setup.py -q build_ext --inplace > "$OUT/build.log" 2>&1 || tail -5 "$OUT/build.log"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv > "$OUT/gpu.txt" 2>&1
timeout 220 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py > "$OUT/tests.log" 2>&1
tests=$?
tail -15 "$OUT/tests.log"

export COLUMNS=120
bench() {
  local limit=$1
  shift
  timeout "$limit" "$PYTHON" -m zokernels.cli bench "$@" --device cuda 2>> "$OUT/bench.err" \
    | tee -a "$OUT/bench.txt"
  return "${PIPESTATUS[0]}"
}
ops=0
# Every pass beside its peers, and then ours alone on a larger tensor.
bench 120 ops --full --rounds 1 --seconds 30 --csv "$OUT/ops.csv" --plot "$OUT/ops.png" || ops=$?
bench 60 ops --no-peers --numel 1000000000 --seconds 20 --csv "$OUT/ops.csv" || ops=$?
# Whole steps at the shapes of SST-2 and MultiRC. The paper: ZO-SGD's step takes 41.9% less time than
# FO-SGD's (OPT-13B, MultiRC).
step() { bench 55 step --dtype bfloat16 --repeats 8 --csv "$OUT/step.csv" "$@"; }
for shape in "16 64" "16 512"; do
  read -r rows length <<< "$shape"
  step --model opt-1.3b --rows "$rows" --length "$length"
  step --model opt-13b --rows "$rows" --length "$length" --no-peers
done
tail -3 "$OUT/bench.err"
cat "$OUT/gpu.txt"
echo "tests: exit $tests; passes: exit $ops; results in $OUT"
[ "$tests" -eq 0 ] && [ "$ops" -eq 0 ]

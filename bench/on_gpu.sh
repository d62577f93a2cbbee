#!/usr/bin/env bash
# Is it right on this GPU, and how fast? All that needs a CUDA device, in eight minutes.
#
#   bench/on_gpu.sh [check] [ops] [step] [memory] [all] [--dry] [--out DIR]
#
# Without a part it does all. Each part has a time of its own, counted for an H100 or H200 with 16
# processor cores, and does its most telling work first; what does not fit is named and left. Rows
# and a line of summary are written as they come, so that a run that is cut off has lost only what
# was still to come.
#
#   part    seconds  what, and how the time is made up
#   build        20  the native library, if it is not there: a dozen C++ files on all cores
#   check       150  every Triton kernel against the CPU, bit for bit; steps in every mode, graphs,
#                    replay, the command line's runs: some 460 cases, kernels to compile in most, 1
#                    to 2 s each: 460 to 920 s on 16 cores are 30 to 60 s, and 30 s to start 16
#                    processes
#   ops         100  each pass at 1e9 weights beside a copy of the same bytes, shapes of groups, and
#                    MeZO's expressions: 25 s to compile ours, 30 s MeZO's, 30 s timing, 15 s start
#   step        150  OPT-1.3B and OPT-13B in bfloat16, 16 x 64 and 16 x 512 tokens, every mode,
#                    eager and as a graph, beside MeZO's step and SGD's by backpropagation: 120 s of
#                    steps, 10 s to build the models, 15 s start
#   memory       60  the allocator's peak of ZO-SGD, SGD and Adam on OPT-1.3B by length: 12 cells of
#                    3.3 s, 15 s start
#   all         480  the sum
#
# In --out DIR (runs/gpu) come check.csv, ops.csv, step.csv, memory.csv, summary.txt, check.log,
# errors.log and gpu.txt. To publish them: copy the CSV files to bench/results/gpu, and run
# `make report`. Where the checkout has no history, or an older one, COMMIT=abc1234 in the environment
# goes into the rows.
#
# --dry runs the same code on the CPU, on tiny sizes and with interpreted kernels: three minutes on
# two cores; a part has twice its time there.
#
# It needs Python with torch for CUDA, triton, transformers, peft, typer, rich, pytest,
# pytest-xdist, pytest-timeout and hypothesis, and g++. Nothing is installed. PYTHON names the
# interpreter.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

declare -A SECONDS_OF=([check]=150 [ops]=100 [step]=150 [memory]=60)
PARTS=(check ops step memory)

fail() {
  echo "$1" >&2
  exit 2
}

chosen=() dry=() OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3}
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' bench/on_gpu.sh && exit ;;
    --dry) dry=(--dry) ;;
    --out) shift && OUT=${1:-} && [ -n "$OUT" ] || fail "--out needs a folder." ;;
    all) chosen+=("${PARTS[@]}") ;;
    *)
      [ -n "${SECONDS_OF[$1]:-}" ] || fail "'$1' is no part; the parts are ${PARTS[*]} and all."
      chosen+=("$1")
      ;;
  esac
  shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${PARTS[@]}")

mkdir -p "$OUT" || exit 2
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 COLUMNS=120 HF_HUB_OFFLINE=1
# torch.compile would give a process another one, where nothing is compiled yet.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$HOME/.triton/cache}
if [ -n "${COMMIT:-}" ]; then export ZOKERNELS_COMMIT=$COMMIT; fi
if [ ${#dry[@]} -gt 0 ]; then
  export ZOKERNELS_GPU_DRY=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi
: > "$OUT/summary.txt"
: > "$OUT/errors.log"
library=zokernels/backends/_native.so
if [ ! -e $library ]; then
  timeout 60 "$PYTHON" setup.py -q build_ext --inplace >> "$OUT/errors.log" 2>&1
  [ -e $library ] || echo "The native library was not built, so the CPU's side is slow: see" \
    "$OUT/errors.log." | tee -a "$OUT/summary.txt"
fi
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv \
  > "$OUT/gpu.txt" 2>&1

code=0
for part in "${chosen[@]}"; do
  rm -f "$OUT/$part.csv"
  # The part itself stops in time; this stops one that hangs.
  limit=$((SECONDS_OF[$part] * (1 + ${#dry[@]})))
  timeout --signal=INT --kill-after=5 "$limit" "$PYTHON" -m "bench.gpu.$part" \
    --began "$(date +%s)" --seconds $((limit - 5)) --out "$OUT" "${dry[@]}" 2>> "$OUT/errors.log"
  ended=$?
  if [ $ended -ne 0 ]; then
    code=1
    echo "$part: exit code $ended; the end of $OUT/errors.log:" | tee -a "$OUT/summary.txt"
    tail -n 5 "$OUT/errors.log"
  fi
done
echo "In short:"
grep -E 'exit code| FAILED | done, ' "$OUT/summary.txt" | head -n 40
echo "Rows, summary.txt and logs are in $OUT."
exit $code

#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine, in calls of less than ten minutes:
#
#   benchmarks/gpu/run.sh OUT --phase check       build, tests on the GPU, compute-sanitizer
#   benchmarks/gpu/run.sh OUT --phase speed       build, kernels, whole steps, memory, profile
#   benchmarks/gpu/run.sh OUT --phase training    build, a CIFAR-10 run (needs DATA=CIFAR10.npz)
#
# Needs nvcc, a CUDA build of torch >= 2.11, setuptools, ninja, numpy, pytest, hypothesis. Pure-Python wheels worth
# bringing along and putting on PYTHONPATH: opacus (with scipy and opt-einsum, where missing); without it its columns
# say so.
#
# Environment: PYTHON (python3), ARCH (9.0), SECONDS_ALL (560, the whole call), SKIP_BUILD=1, STAGES (of the phase
# speed, "name:seconds ..."), DATA, ARGUMENTS (more arguments of every stage; "--device cpu --tiny" rehearses).
# OUT gets gpu.json, gpu.md, tests.xml and one log a phase. Nothing stops at a failure; the summary lists them and the
# exit status is 1.
set -uo pipefail

OUT=${1:?usage: run.sh OUT [--phase check|speed|training]}
PHASE=check
[ "${2:-}" = --phase ] && PHASE=${3:?--phase needs check, speed or training}
case "$PHASE" in check | speed | training) ;; *) echo "unknown phase $PHASE: check, speed or training" >&2; exit 2 ;; esac

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
DATA=${DATA:+$(realpath "$DATA")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
LOG=$OUT/$PHASE.log
DEADLINE=$((SECONDS + ${SECONDS_ALL:-560}))
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
SUMMARY=()
FAILED=0

left() { echo $((DEADLINE - SECONDS)); }

# within LIMIT NAME COMMAND...: runs it with the smaller of LIMIT and what is left of the call.
within() {
  local limit=$1 name=$2 start=$SECONDS status
  shift 2
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    SUMMARY+=("$name: no time left")
    FAILED=1
    return 1
  fi
  echo "#### $name (at most $limit s)" | tee -a "$LOG"
  timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  SUMMARY+=("$name: status $status, $((SECONDS - start)) s")
  [ "$status" -eq 0 ] || FAILED=1
  return "$status"
}

build() {
  [ "${SKIP_BUILD:-0}" = 1 ] && return 0
  TORCH_CUDA_ARCH_LIST=${ARCH:-9.0} FORCE_CUDA=1 MAX_JOBS=$(nproc) \
    within 300 build "$PYTHON" setup.py --quiet build_ext --inplace
}

# One stage of the benchmarks a process. One that hangs is killed, and the rest of it done without the case that hung.
stage() {
  local name=$1 seconds=$2
  shift 2
  [ "$seconds" -gt $(($(left) - 30)) ] && seconds=$(($(left) - 30))
  if [ "$seconds" -lt 5 ]; then
    SUMMARY+=("$name: no time left")
    FAILED=1
    return 0
  fi
  within $((seconds + 30)) "$name" "$PYTHON" benchmarks/gpu/run.py --out "$OUT" --stages "$name" --seconds "$seconds" "$@" ${ARGUMENTS:-}
  local status=$?
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    within $((seconds / 2 + 20)) "$name, the rest" \
      "$PYTHON" benchmarks/gpu/run.py --out "$OUT" --stages "$name" --seconds $((seconds * 3 / 2)) --resume "$@" ${ARGUMENTS:-}
  fi
  return 0
}

: >"$LOG"
nvidia-smi 2>&1 | tee -a "$LOG"
if ! build; then
  printf '%s\n' "${SUMMARY[@]}" "the build failed: nothing else can run" | tee -a "$LOG"
  exit 1
fi
within 60 "what was built" "$PYTHON" -c "import engm; print(engm.build_info())"
stage self_test 40

case "$PHASE" in
  check)
    # Workers, where pytest-xdist is there: one whose CUDA context died, or that hung, is replaced by another.
    extra=()
    "$PYTHON" -c "import xdist" 2>/dev/null && extra+=(-n 4 --max-worker-restart 30)
    "$PYTHON" -c "import pytest_timeout" 2>/dev/null && extra+=(--timeout 90 --timeout-method thread)
    within 240 tests "$PYTHON" -m pytest -m gpu tests/gpu -v --junitxml "$OUT/tests.xml" -p no:cacheprovider --tb=short \
      --durations=10 "${extra[@]}"
    within $(($(left) - 5)) sanitize make --no-print-directory sanitize GPU_PYTHON="$PYTHON" \
      SANITIZE="--seconds $((($(left) - 15) / 3))"
    ;;
  speed)
    for entry in ${STAGES:-ceilings:20 kernels:125 steps:125 pgd:80 memory:25 profile:20 tune:30}; do
      stage "${entry%%:*}" "${entry##*:}"
    done
    ;;
  training)
    stage training $(($(left) - 50)) --data "${DATA:?set DATA to CIFAR-10 as .npz}"
    ;;
esac

echo "#### summary" | tee -a "$LOG"
printf '%s\n' "${SUMMARY[@]}" | tee -a "$LOG"
exit "$FAILED"

#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine, in calls of less than ten minutes:
#
#   benchmarks/gpu/run.sh OUT --phase check       the tests on the GPU
#   benchmarks/gpu/run.sh OUT --phase sanitize    compute-sanitizer: memcheck, synccheck, racecheck
#   benchmarks/gpu/run.sh OUT --phase speed       recorded steps, kernels, steps by hand, memory, a profile
#   benchmarks/gpu/run.sh OUT --phase recorded    recorded steps, then by every backend, compiled ones too
#   benchmarks/gpu/run.sh OUT --phase training    seconds an epoch, and how faithful weights are (needs DATA)
#   benchmarks/gpu/run.sh OUT --phase runs        adversarial training by three methods, resumable (needs DATA)
#   benchmarks/gpu/run.sh OUT --rehearse          all of them on the CPU, with the device faked as far as it can be
#
# Each phase builds what is not built and tries every kernel first. The last line says what the phases take on a GPU.
#
# Needs nvcc, a CUDA build of torch >= 2.11, setuptools, ninja, numpy, pytest, hypothesis; for 'runs' safetensors and
# filelock too. No make, no network. Pure-Python wheels worth bringing along and putting on PYTHONPATH: opacus (with
# scipy and opt-einsum, where missing); without it its columns say so.
#
# Environment:
#   PYTHON        the interpreter (python3)
#   ARCH          compute capabilities to build for (9.0)
#   SKIP_BUILD=1  take engm/_C*.so as it is, if it can be imported and has the CUDA kernels; else build
#   SECONDS_ALL   seconds of a whole call (560; 3600 in a rehearsal)
#   STAGES        of a phase of benchmarks, "name:seconds[:grace] ...": a stage begins no case after its seconds, and
#                 is killed when its grace is over too (30)
#   DATA          CIFAR-10 as .npz, or a part of it (benchmarks/gpu/subset.py)
#   RUNS          folder that 'runs' goes on from (build/gpu/runs); 90 megabytes of checkpoint a method, twice
#   PHASES        of a rehearsal (all)
#   ARGUMENTS     more arguments of every stage: "--seeds 1", "--training-precision bf16"
#
# OUT gets at most seven small files: gpu.json (written after every stage), gpu.md, outcomes.jsonl (how every step of
# this script ended), tests.xml, cost_table.json and one log a phase. A step that fails or hangs is ended and costs the
# others nothing; the exit status is 1 then.
set -uo pipefail

USAGE="usage: run.sh OUT [--phase check|sanitize|speed|recorded|training|runs] [--rehearse]"
OUT=${1:?$USAGE}
shift
PHASE=
REHEARSE=0
while [ $# -gt 0 ]; do
  case "$1" in
    --phase) PHASE=${2:?$USAGE}; shift 2 ;;
    --rehearse) REHEARSE=1; shift ;;
    *) echo "$USAGE" >&2; exit 2 ;;
  esac
done
ALL="check sanitize speed recorded training runs"
[ -n "$PHASE" ] || [ "$REHEARSE" = 1 ] || PHASE=check
case " $ALL " in *" ${PHASE:-check} "*) ;; *) echo "unknown phase $PHASE: one of $ALL" >&2; exit 2 ;; esac

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
DATA=${DATA:+$(realpath "$DATA")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
RUNS=${RUNS:-build/gpu/runs}
KEPT=${KEPT:-$RUNS} # what the last line names; a rehearsal trains elsewhere
PATH=$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH # its ninja, were it a package of PYTHON's
export PATH

# What a GPU would take: the last line of every call.
costs() {
  local so tree
  tree=$(git ls-files -z 2>/dev/null | xargs -0 du -cb 2>/dev/null | tail -1 | cut -f1)
  so=$(cat engm/_C*.so 2>/dev/null | wc -c)
  echo "on a card: a call of at most 600 s for each of '$ALL' ('benchmarks/gpu/run.sh OUT --phase P'; 'runs' once more" \
    "as long as it says so); carry the tree ($((${tree:-0} / 1048576 + 1)) MiB), DATA for the last two (35 MiB from" \
    "'python benchmarks/gpu/subset.py CIFAR10.npz DATA.npz') and, to spare each call the build, engm/_C*.so" \
    "($((so / 1048576)) MiB, SKIP_BUILD=1); back come at most 7 files; keep $KEPT from call to call"
}

if [ "$REHEARSE" = 1 ]; then
  export ENGM_TEST_DEVICE=cpu SECONDS_ALL=${SECONDS_ALL:-3600} BUILD_SECONDS=${BUILD_SECONDS:-3000}
  case "${ARGUMENTS:-}" in *--device*) ;; *) export ARGUMENTS="--device fake --tiny ${ARGUMENTS:-}" ;; esac
fi
if [ -z "$PHASE" ]; then # a rehearsal of every phase, each in a call of its own, as on a card
  export DATA=${DATA:-$PWD/build/gpu/made-up.npz} RUNS=build/gpu/rehearsed-runs KEPT
  rm -rf "$RUNS"
  [ -f "$DATA" ] || "$PYTHON" benchmarks/gpu/subset.py made-up "$DATA" --train 64 --test 16 || exit 1
  worst=0 table=()
  for phase in ${PHASES:-$ALL}; do
    begun=$SECONDS
    rm -rf "${OUT:?}/$phase"
    bash benchmarks/gpu/run.sh "$OUT/$phase" --phase "$phase" --rehearse
    status=$?
    [ "$status" -eq 0 ] || worst=1
    files=$(find "$OUT/$phase" -type f | wc -l) kilobytes=$(du -sk "$OUT/$phase" | cut -f1)
    if [ "$files" -gt 8 ] || [ "$kilobytes" -gt 16384 ] || [ -n "$(find "$OUT/$phase" -mindepth 1 ! -type f)" ]; then
      status="$status, too much in OUT" worst=1
    fi
    errors=$(cat "$OUT/$phase/gpu.json" 2>/dev/null | grep -c '"error": "') # a case that fails costs a card's call nothing
    [ "$errors" -eq 0 ] || worst=1
    table+=("$phase: status $status, $errors failing cases, $((SECONDS - begun)) s, $files files of $kilobytes KiB")
    export SKIP_BUILD=1
  done
  printf '%s\n' "#### rehearsed" "${table[@]}"
  costs
  exit "$worst"
fi

if [ -z "$DATA" ] && { [ "$PHASE" = training ] || [ "$PHASE" = runs ]; }; then
  echo "set DATA to CIFAR-10 as .npz, or to a part of it (python benchmarks/gpu/subset.py)" >&2
  exit 2
fi
LOG=$OUT/$PHASE.log
DEADLINE=$((SECONDS + ${SECONDS_ALL:-560}))
CORES=$(env -u OMP_NUM_THREADS nproc) # which would answer that variable otherwise
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((REHEARSE ? 1 : 4))}
SUMMARY=()
FAILED=0

left() { echo $((DEADLINE - SECONDS)); }

say() { printf '%s\n' "$@" | tee -a "$LOG"; }

# outcome NAME STATUS SECONDS: notes how a step ended, at once.
outcome() {
  SUMMARY+=("$1: status $2, $3 s")
  printf '{"phase": "%s", "step": "%s", "status": "%s", "seconds": %s}\n' "$PHASE" "$1" "$2" "$3" >>"$OUT/outcomes.jsonl"
  [ "$2" = 0 ] || FAILED=1
}

# within LIMIT NAME COMMAND...: runs it with the smaller of LIMIT and what is left of the call. What it prints goes to the
# log alone, and 'tail' shows it: a pipe would be kept open by a grandchild that outlives the command, and this script
# or its caller would wait for that.
within() {
  local limit=$1 name=$2 start=$SECONDS status shown
  shift 2
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    outcome "$name" "no time left" 0
    return 1
  fi
  say "#### $name (at most $limit s)"
  tail -c 0 -f -s 0.2 --pid=$$ "$LOG" 2>/dev/null &
  shown=$!
  timeout -s INT -k 10 "$limit" "$@" >>"$LOG" 2>&1 </dev/null
  status=$?
  sleep 0.5
  kill "$shown"
  wait "$shown" 2>/dev/null
  outcome "$name" "$status" $((SECONDS - start))
  return "$status"
}

# Whether what is built can be taken.
built() {
  "$PYTHON" - <<'END' >>"$LOG" 2>&1
import os, sys, engm
sys.exit(not (engm.build_info()["cuda"] or "ENGM_TEST_DEVICE" in os.environ))
END
}

build() {
  if [ "${SKIP_BUILD:-0}" = 1 ]; then
    built && return 0
    say "SKIP_BUILD=1, but what is built cannot be taken: it is built anew"
  fi
  local forced=1
  [ "$REHEARSE" = 1 ] && [ -z "$(command -v nvcc)" ] && forced=0
  TORCH_CUDA_ARCH_LIST=${ARCH:-9.0} FORCE_CUDA=$forced MAX_JOBS=${MAX_JOBS:-$CORES} \
    within "${BUILD_SECONDS:-300}" build "$PYTHON" setup.py --quiet build_ext --inplace
}

# stage NAME SECONDS GRACE ARGUMENTS...: one stage of the benchmarks, in a process of its own. One that hangs is killed,
# and the rest of it done without the case that hung.
stage() {
  local name=$1 seconds=$2 grace=$3 status
  shift 3
  [ "$REHEARSE" = 1 ] && grace=$((grace + 600)) # limits are meant for a card, and this machine may have other work
  [ "$seconds" -gt $(($(left) - grace)) ] && seconds=$(($(left) - grace))
  if [ "$seconds" -lt 5 ]; then
    outcome "$name" "no time left" 0
    return 0
  fi
  local command=("$PYTHON" benchmarks/gpu/run.py --out "$OUT" --stages "$name" "$@")
  # shellcheck disable=SC2086
  within $((seconds + grace)) "$name" "${command[@]}" --seconds "$seconds" ${ARGUMENTS:-}
  status=$?
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    within $((seconds / 2 + grace)) "$name, the rest" \
      "${command[@]}" --seconds $((seconds + seconds / 2 + grace)) --resume ${ARGUMENTS:-}
  fi
  return 0
}

# stages DEFAULT ARGUMENTS...: those of STAGES, or the default ones.
stages() {
  local entry name seconds grace wanted=${STAGES:-$1}
  shift
  for entry in $wanted; do
    IFS=: read -r name seconds grace <<<"$entry"
    stage "$name" "$seconds" "${grace:-30}" "$@"
  done
}

: >"$LOG"
nvidia-smi 2>&1 | tee -a "$LOG"
if ! build; then
  say "${SUMMARY[@]}" "the build failed: nothing else can run"
  costs
  exit 1
fi
within 60 "what was built" "$PYTHON" -c "import engm; print(engm.build_info())"
stage self_test 40 30

case "$PHASE" in
  check)
    # Workers, where pytest-xdist is there: one whose CUDA context died, or that hung, is replaced by another.
    # One in a rehearsal, since there are tests that take 17 gigabytes.
    extra=()
    workers=$((REHEARSE ? 1 : CORES < 8 ? CORES : 8))
    "$PYTHON" -c "import xdist" 2>/dev/null && extra+=(-n "$workers" --max-worker-restart 30)
    "$PYTHON" -c "import pytest_timeout" 2>/dev/null && extra+=(--timeout 90 --timeout-method thread)
    within $(($(left) - 15)) tests "$PYTHON" -m pytest -m gpu tests/gpu -v --junitxml "$OUT/tests.xml" \
      -p no:cacheprovider --tb=short --durations=10 "${extra[@]}"
    ;;
  sanitize)
    limits="memcheck:170 synccheck:110 racecheck:600" # racecheck takes what is left
    [ "$REHEARSE" = 1 ] && limits="memcheck:900 synccheck:900 racecheck:900"
    for entry in $limits; do
      seconds=$((${entry##*:} < $(left) - 20 ? ${entry##*:} : $(left) - 20))
      within $((seconds + 10)) "${entry%%:*}" \
        "$PYTHON" tests/gpu/sanitize.py --tools "${entry%%:*}" --seconds "$seconds"
    done
    ;;
  speed)
    # Recorded steps come first: where a launch takes the host long, the others are the host's figures.
    stages "ceilings:10 recorded:160 kernels:90 steps:60 pgd:60 memory:20 profile:15 tune:20"
    ;;
  recorded)
    # A compilation that takes longer than its grace is killed.
    stages "recorded:160 backends:250:120"
    ;;
  training) stages "training:400:60" --data "$DATA" ;;
  runs)
    # What is left, but for the looks at the test set and the last checkpoints.
    stages "runs:480:60" --data "$DATA" --runs "$RUNS"
    ;;
esac

say "#### summary" "${SUMMARY[@]}"
costs
exit "$FAILED"

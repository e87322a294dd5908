#!/usr/bin/env bash
# One command on a machine with a GPU, its torch already installed and no internet: install, GPU tests, benchmarks.
# Full results go to $OUT (default bench/results/gpu); a short table is printed last. DRY=1 only prints the plan.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 VREFLECTION_SKIP_EXT=1
summary=()
part() { # name, seconds, command…
  local name=$1 limit=$2
  shift 2
  if [ -n "${DRY:-}" ]; then summary+=("$name: would run within $limit s: $*"); return; fi
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
  local code=$?
  summary+=("$name: exit $code: $(grep -E 'passed|failed|error' "$OUT/$name.log" | tail -n 1)")
}
part install 60 python3 -m pip install --no-deps --no-build-isolation -e .
part versions 60 python3 -m vreflection info --json
part gpu_tests 180 python3 -m pytest -q -m gpu tests
part suite 240 python3 -m pytest -q tests/test_modules.py tests/test_losses.py tests/ops tests/model tests/decoding
part bench_modules 120 python3 -m pytest -q -s bench/bench_modules.py --benchmark-json="$OUT/bench_modules.json"
part bench_decode 120 python3 -m pytest -q -s bench/bench_decode.py --benchmark-json="$OUT/bench_decode.json"
grep -hE 'absorbed|host generate' "$OUT"/bench_*.log 2>/dev/null
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"

#!/usr/bin/env bash
# One command on a machine with a GPU, its torch already installed and no internet: install, GPU tests, benchmarks, table.
# Full results go to $OUT (default bench/results/gpu), at most eight files; a short table is printed last. DRY=1 only
# prints the plan. PARTS="tests" or PARTS="bench" runs one half, where a command may take ten minutes at most.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
PARTS=${PARTS:-tests bench}
summary=()
part() { # name, seconds, command…; every part's output is appended to one log
  local name=$1 limit=$2 log
  shift 2
  if [ -n "${DRY:-}" ]; then summary+=("$name: would run within $limit s: $*"); return; fi
  log=$(mktemp)
  timeout "$limit" "$@" > "$log" 2>&1
  local code=$?
  { printf '\n===== %s (exit %s)\n' "$name" "$code"; cat "$log"; } >> "$OUT/log.txt"
  summary+=("$name: exit $code: $(grep -E 'passed|failed|[0-9]+ error|Error' "$log" | tail -n 1)")
  rm -f "$log"
}
bench() { part "$1" "$2" python3 -m pytest -q -s "bench/$1.py" --benchmark-json="$OUT/$1.json"; }
part install 90 python3 -m pip install --no-deps --no-build-isolation -e .
part versions 60 python3 -m vreflection info --json
if [[ $PARTS == *tests* ]]; then
  part gpu_tests 300 python3 -m pytest -q -m gpu tests --maxfail=20
  part race_check 120 compute-sanitizer --tool racecheck --error-exitcode 9 \
    python3 -m pytest -q -m gpu tests/test_gpu_ops.py -k "shipped and 0"
fi
if [[ $PARTS == *bench* ]]; then
  bench bench_probe_attention 180
  bench bench_region_attention 100
  bench bench_roi_align 40
  bench bench_distillation_loss 40
  bench bench_growth 60
  bench bench_boundary 30
  bench bench_decode 60
fi
if [[ -z "${DRY:-}" && $PARTS == *bench* ]]; then
  python3 bench/report.py "$OUT"/bench_*.json --markdown "$OUT/table.md" --plot "$OUT/growth.svg" \
    > /dev/null 2>> "$OUT/log.txt"
  python3 - "$OUT" <<'PY'
import glob, json, sys
rows = {path: json.load(open(path)) for path in sorted(glob.glob(sys.argv[1] + "/bench_*.json"))}
json.dump(rows, open(sys.argv[1] + "/raw.json", "w"))
PY
  rm -f "$OUT"/bench_*.json
  cut -c1-150 "$OUT/table.md" 2>/dev/null
fi
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"

#!/usr/bin/env bash
# One command on a machine with a GPU, its torch already installed and no internet: install, GPU tests, benchmarks, table.
# Full results go to $OUT (default bench/results/gpu), at most eight files; a short table is printed last. DRY=1 only
# prints the plan. PARTS="tests", "bench", "decode-tests" or "decode" runs only that, where a command may take ten minutes
# at most; SIZES="7b" or "3b" runs half of "decode".
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
PARTS=${PARTS:-tests bench decode-tests decode}
SIZES=${SIZES:-7b 3b}
wanted() { [[ " $PARTS " == *" $1 "* ]]; }
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
if wanted tests; then
  part gpu_tests 300 python3 -m pytest -q -m gpu tests --maxfail=20 --ignore-glob='tests/test_gpu_decode*' --ignore=tests/engine
  part race_check 120 compute-sanitizer --tool racecheck --error-exitcode 9 \
    python3 -m pytest -q -m gpu tests/test_gpu_ops.py -k "shipped and 0"
fi
if wanted decode-tests; then
  part decode_tests 400 python3 -m pytest -q -m gpu tests/test_gpu_decode*.py tests/engine --maxfail=20
fi
if wanted bench; then
  bench bench_probe_attention 180
  bench bench_region_attention 100
  bench bench_roi_align 40
  bench bench_distillation_loss 40
  bench bench_growth 60
  bench bench_boundary 30
  bench bench_decode 60
fi
if wanted decode; then
  for size in $SIZES; do # each bounds itself to BENCH_SECONDS; the rest is for building and what is under way
    part "decode_$size" 420 python3 -m pytest -q -s bench/bench_decode_shapes.py -k "$size" \
      --benchmark-json="$OUT/bench_decode_$size.json"
  done
fi
if [[ -z "${DRY:-}" ]] && { wanted bench || wanted decode; }; then
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

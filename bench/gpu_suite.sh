#!/usr/bin/env bash
# One command on a machine with a GPU, its torch installed and no internet: install, GPU tests, benchmarks at real shapes,
# a training step of each size, a short table last. Ends within BUDGET_S seconds (default 530) whatever hangs or fails.
#   OUT=folder        where results go (default bench/results/gpu): rows.jsonl (raw, one row as soon as it is measured),
#                     log.txt, summary.txt, table.md, figures; at most eight files
#   PARTS="a b"       only these parts or groups: tests, ops, decode, training, rest (default: all, by value)
#   ALL_VARIANTS=1    also variants known to be slower (overlapped launches)
#   DRY=1             runs nothing: prints the plan, each part taking all the time it may
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-bench/results/gpu}
BUDGET_S=${BUDGET_S:-530}
RESERVE_S=${RESERVE_S:-20} # kept for the table
LEAST_S=${LEAST_S:-8}      # a part that would get less is not started
PARTS=${PARTS:-tests ops decode training rest}
DRY=${DRY:-}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 BENCH_ROWS="$OUT/rows.jsonl"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
work=$(mktemp -d)
child='' running='' planned=0 linked='' finished=''
rm -f "$OUT"/rows.jsonl "$OUT"/log.txt "$OUT"/summary.txt "$OUT"/table.md "$OUT"/*.svg

tell() { printf '%s\n' "$*" | cut -c1-200 >> "$OUT/summary.txt"; }

outcome() { # log: pytest's last line, or what its tests said before it was killed
  local last
  last=$(grep -aE '^(=+ )?[0-9]+ (passed|failed|skipped|error)' "$1" | tail -n 1)
  if [ -n "$last" ]; then printf '%s' "$last"; return; fi
  local counted
  counted=$(grep -aoE '\b(PASSED|FAILED|ERROR|SKIPPED)\b' "$1" | sort | uniq -c | awk '{printf "%s%s %s", sep, $1, $2; sep=", "}')
  printf '%s' "${counted:-$(grep -aE 'Error' "$1" | tail -n 1)}"
}

keep() { # name, what became of it, log
  { printf '\n===== %s (%s)\n' "$1" "$2"; cat "$3" 2>/dev/null; } >> "$OUT/log.txt"
  local said
  said=$(outcome "$3")
  tell "$1: $2${said:+: $said}"
  grep -aE '^FAILED|^ERROR|\bFAILED tests' "$3" 2>/dev/null | head -n 5 | while read -r line; do tell "    $line"; done
}

part() { # name, most seconds, command…
  local name=$1 limit=$2 log="$work/$1.log" left code
  shift 2
  left=$((BUDGET_S - RESERVE_S - SECONDS - planned))
  if ((left < LEAST_S)); then tell "$name: left out: the $BUDGET_S s are used up"; return 1; fi
  ((limit > left)) && limit=$left
  if [ -n "$DRY" ]; then
    planned=$((planned + limit))
    tell "$name: would run within $limit s: $*"
    return 0
  fi
  running=$name
  local begin=$SECONDS
  # In the background, so that a signal to this script is handled at once and not after the part.
  timeout -k 5 "$limit" "$@" > "$log" 2>&1 &
  child=$!
  wait "$child"
  code=$?
  child='' running=''
  local became="exit $code after $((SECONDS - begin)) s"
  ((code == 124 || code == 137)) && became="stopped at its $limit s"
  keep "$name" "$became" "$log"
  return "$code"
}

finish() { # always, also when stopped from outside
  trap - EXIT TERM INT HUP
  if [ -n "$finished" ]; then return; fi
  finished=1
  if [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null
    keep "$running" "stopped from outside" "$work/$running.log"
  fi
  [ -n "$linked" ] && rm -f vreflection/kernels
  if [ -s "$BENCH_ROWS" ]; then
    timeout -k 2 "$RESERVE_S" python3 -m vreflection bench report "$BENCH_ROWS" --out "$OUT/table.md" --short --plots "$OUT" \
      > "$work/short.txt" 2>> "$OUT/log.txt" || printf 'no table: see log.txt; the rows are in rows.jsonl\n' >> "$work/short.txt"
    grep -v '\.svg$' "$work/short.txt"
  fi
  printf '%s\n' '--- parts'
  cat "$OUT/summary.txt"
  printf '%s\n' "--- $SECONDS s of $BUDGET_S; everything in $OUT"
  rm -rf "$work"
}
trap finish EXIT
trap 'finish; exit 143' TERM INT HUP

wanted() { # group, name
  [[ " $PARTS " == *" $1 "* || " $PARTS " == *" $2 "* ]]
}
tests() { wanted tests "$1" && part "$@"; }
suite() { # group, suite, seconds, further pytest arguments
  local group=$1 name=$2 limit=$3
  shift 3
  wanted "$group" "$name" || return 0
  # What a suite bounds itself to, so that it ends between two cases and not within one.
  BENCH_SECONDS=$((limit * 3 / 4)) part "$name" "$limit" python3 -m pytest -q -s -p no:cacheprovider "bench/bench_${name%%@*}.py" "$@"
}

if ! part install 90 python3 -m pip install --no-deps --no-build-isolation -e .; then
  if [ -z "$DRY" ]; then
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    if [ ! -e vreflection/kernels ]; then ln -s ../kernels vreflection/kernels && linked=1; fi
    tell "NOT INSTALLED: runs from the source tree, without what the build makes (C++ and CUDA operators)"
  fi
fi
part versions 40 python3 -m vreflection info --json
parallel=()
python3 -c 'import xdist' 2>/dev/null && parallel=(-n 7)
tests gpu_tests 130 python3 -m pytest -v -m gpu tests ${parallel[@]+"${parallel[@]}"} -p no:cacheprovider --durations=5
suite ops probe_attention 50
suite ops region_attention 40
suite decode decode_shapes@7b 70 -k 7b
suite training training_shapes@7b 60 -k 7b
suite training training_shapes@3b 45 -k 3b
suite decode decode_shapes@3b 40 -k 3b
suite rest losses 30
suite rest memory 15
suite rest roi_align 20
suite rest growth 25
suite rest distillation_loss 15
suite rest prefill 20
suite rest boundary 15
tests race_check 60 compute-sanitizer --tool racecheck --error-exitcode 9 \
  python3 -m pytest -q -m gpu tests/test_gpu_ops.py -k "shipped and 0" -p no:cacheprovider
exit 0

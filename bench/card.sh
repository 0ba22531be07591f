#!/usr/bin/env bash
# What is measured on a card, in the order of worth when time there is short.
#
#   bench/card.sh [--small] [--wait SECONDS] [OUT [STEP ...]]
#
# OUT is the folder of logs, lines and records, by default runs/card; steps by default: all. `runs`
# trains detached from the caller, with its log in OUT/runs.log: called again it waits on, for
# --wait seconds (540, so that a command may be bounded to ten minutes), and says how far it is.
# What is measured waits for it: exit code 75. `pack` makes OUT/card.tar.gz of what is worth keeping.
# No step stops the next; the last lines tell of each what it was, its seconds and its exit code.
# --small tries all of it at sizes that a CPU gets through in minutes. Nothing is installed.
set -u
python=$(command -v python || command -v python3) || { echo "error: no python" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
small= wait=540
while [[ ${1:-} == --* ]]; do
  case $1 in
    --small) small=--small ;;
    --wait) wait=${2:?seconds}; shift ;;
    *) echo "error: $1 must be --small or --wait SECONDS" >&2; exit 2 ;;
  esac
  shift
done
[ $# -gt 0 ] || set -- "$root/runs/card"
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
all=(tests epochs forms overhead runs kernels loaders pack)
[ $# -gt 0 ] && steps=("$@") || steps=("${all[@]}")
for step in "${steps[@]}"; do
  [[ " ${all[*]} chain " == *" $step "* ]] && continue
  echo "error: STEP must be one of ${all[*]}, got $step" >&2
  exit 2
done
cd "$root" || exit 2

if [ -n "$small" ]; then
  paper=(--preset quick --dataset synthetic --synthetic-samples 1000 --batch-size 50)
  few=(--epochs 2 --host-syncs count) epochs=4 quick=(--quick) sizes=(--quick --sizes 5000)
  forms=(--quick --forms channels_last graph)
else
  paper=(--preset paper --loader dali)
  few=(--epochs 4 --host-syncs count) epochs=200 quick=() sizes=(--sizes 50000 1280000 1000000000)
  forms=(--models r50 --forms amp compiled graph)
fi

# A folder that is not there yet: a step that is called again keeps what it had.
new() {
  local folder=$out/$1 number=1
  while [ -e "$folder" ]; do number=$((number + 1)) folder=$out/$1-$number; done
  echo "$folder"
}

train() { timeout "$1" "$python" -m infobatch_fast.train "${paper[@]}" "${@:2}"; }

# One run of the chain, unless it is done; one that was killed goes on.
run() {
  local folder=$out/runs/$1
  [ -e "$folder/summary.json" ] && return
  if [ -e "$folder/checkpoint.pt" ]; then
    timeout 3600 "$python" -m infobatch_fast.train --resume "$folder"
  else
    rm -rf "$folder"
    train 3600 --out "$folder" "${@:2}"
  fi
  echo "== run $1: exit code $?"
}

chain() {
  mkdir -p "$out/runs"
  run r0.5 --epochs $epochs --ratio 0.5
  run full --epochs $epochs --delta 0
  # As many epochs of full data as see the samples that r=0.5 trained on.
  local shorter
  shorter=$("$python" - "$out/runs/r0.5/summary.json" <<'PYTHON'
import json
import sys

summary = json.load(open(sys.argv[1]))
print(max(1, round(summary["epochs"] * (1 - summary["saved_share"]))))
PYTHON
  ) && run shorter --epochs "$shorter" --delta 0
  run r0.3 --epochs $epochs --ratio 0.3
  run r0.7 --epochs $epochs --ratio 0.7
  touch "$out/runs/finished"
}

training() {
  [ ! -e "$out/runs/finished" ] && [ -e "$out/runs/pid" ] &&
    kill -0 "$(cat "$out/runs/pid")" 2>/dev/null
}

runs() {
  if ! training; then
    mkdir -p "$out/runs"
    rm -f "$out/runs/finished"
    setsid nohup bash "$root/bench/card.sh" $small "$out" chain >>"$out/runs.log" 2>&1 </dev/null &
    echo $! >"$out/runs/pid"
  fi
  local until=$((SECONDS + wait))
  while training && [ $SECONDS -lt $until ]; do sleep 1; done
  tail -n 3 "$out/runs.log"
  training && { echo "the runs go on: bench/card.sh $out runs"; return 75; }
  local name
  for name in r0.5 full shorter r0.3 r0.7; do
    [ -e "$out/runs/$name/summary.json" ] || { echo "run $name is not done"; return 1; }
  done
}

pack() {
  local to=$out/card.tar.gz code
  # A log may grow meanwhile, which tar tells by 1.
  (cd "$out" && find . -type f ! -name '*.pt' ! -name '*.tar.gz*' \
    ! \( -name '*.npy' -size +1M \) -print0 | tar --null -czf "$to.part" -T -)
  code=$?
  [ $code -le 1 ] && mv "$to.part" "$to" && ls -l "$to"
}

step() {
  case $1 in
    epochs | forms | overhead | kernels | loaders)
      training && { echo "$1 would share the card with the runs, which go on"; return 75; } ;;
  esac
  case $1 in
    # An interrupt, so that pytest tells the failures so far; a caller in the background ignores it.
    tests) timeout -s INT -k 20 240 env --default-signal=INT "$python" -m pytest -v --tb=short \
      --continue-on-collection-errors -m "gpu and not slow" ;;
    epochs) train 300 --out "$(new epochs)" "${few[@]}" ;;
    forms) timeout 570 "$python" bench/throughput.py "${forms[@]}" --foreach-lars \
      --torch-cross-entropy --batch-sizes --out "$(new forms)" ;;
    overhead) timeout 570 "$python" bench/overhead.py "${quick[@]}" --out "$(new overhead)" ;;
    runs) runs ;;
    kernels) timeout 570 "$python" bench/kernels_bench.py "${sizes[@]}" --out "$(new kernels)" ;;
    loaders) timeout 570 "$python" bench/throughput.py "${quick[@]}" --models \
      --out "$(new loaders)" ;;
    pack) pack ;;
  esac
}

if [ "${steps[0]}" = chain ]; then
  chain
  exit
fi
told=()
for name in "${steps[@]}"; do
  began=$SECONDS
  printf '\n== %s\n' "$name"
  step "$name" 2>&1 | tee -a "$out/$name.txt"
  code=${PIPESTATUS[0]}
  told+=("$(printf '%-10s %5d s  exit code %d' "$name" $((SECONDS - began)) "$code")")
  printf '%s\n' "${told[-1]}" >>"$out/steps.txt"
done
printf '\n'
printf '%s\n' "${told[@]}"

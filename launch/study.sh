#!/usr/bin/env bash
# Trains and judges variants of the digits config with two seeds each, and compares them:
#
#   bash launch/study.sh [OUT] ["VARIANT [--config.KEY=VALUE ...]" ...]
#
# OUT defaults to runs/study, the variants to sm, sm_compounding and ism. About 4 minutes a run on
# 2 cores; run again, it goes on where it was.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out="${1:+$(absolute "$1")}"
out="${out:-$PWD/runs/study}"
runs=("${@:2}")
[ ${#runs[@]} -gt 0 ] || runs=(sm sm_compounding ism)
ensure_env test
workdirs=()
for run in "${runs[@]}"; do
  read -r variant overrides <<< "$run"
  for seed in 0 1; do
    workdir="$out/$variant$(echo "$overrides" | tr -cs '[:alnum:]._=\n' -)-$seed"
    workdirs+=("$workdir")
    [ ! -e "$workdir/evaluation.json" ] || continue
    for mode in train evaluate; do
      # shellcheck disable=SC2086 # the overrides are words
      python -m ism_jax.main --config="configs/digits.py:$variant" --workdir="$workdir" \
        --mode="$mode" --config.seed="$seed" --config.evaluation.seeds="($seed,)" $overrides
    done
  done
done
python -m ism_jax.compare --out="$out" "${workdirs[@]}"
cat "$out/comparison.md"

#!/usr/bin/env bash
# The digits study of the README: bash launch/study.sh [OUT] [VARIANT ...]
# Trains and judges each variant with two seeds (default sm, sm_compounding, ism), then compares.
# About 5 minutes a run on 2 cores; run again, it continues where it stopped.
set -euo pipefail
out="$(realpath -m "${1:-"$(dirname "$0")/../runs/study"}")"
variants=("${@:2}")
[ ${#variants[@]} -gt 0 ] || variants=(sm sm_compounding ism)
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_env test
workdirs=()
for variant in "${variants[@]}"; do
  for seed in 0 1; do
    workdir="$out/$variant-$seed"
    workdirs+=("$workdir")
    [ ! -e "$workdir/evaluation.json" ] || continue
    for mode in train evaluate; do
      python -m ism_jax.main --config="configs/digits.py:$variant" --workdir="$workdir" \
        --mode="$mode" --config.seed="$seed" --config.evaluation.seeds="($seed,)"
    done
  done
done
python -m ism_jax.compare --out="$out" "${workdirs[@]}"
cat "$out/comparison.md"

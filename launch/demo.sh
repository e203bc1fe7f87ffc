#!/usr/bin/env bash
# Trains iSM on the bundled handwritten digits and judges it: bash launch/demo.sh [WORKDIR]
# Run again in the same WORKDIR (default runs/digits), it continues where it stopped.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
workdir="${1:+$(absolute "$1")}"
workdir="${workdir:-$PWD/runs/digits}"
ensure_env test
run=(python -m ism_jax.main --config=configs/digits.py --workdir="$workdir")
"${run[@]}" --mode=train
"${run[@]}" --mode=evaluate
echo
cat "$workdir/evaluation.md"
echo "Sample grids: $workdir/samples_*.png"

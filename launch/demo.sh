#!/usr/bin/env bash
# Trains iSM on the bundled handwritten digits and judges it: bash launch/demo.sh [WORKDIR]
# Run again in the same WORKDIR (default runs/digits), it continues where it stopped.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/commands.sh
source launch/commands.sh
workdir="${1:+$(absolute "$1")}"
workdir="${workdir:-$PWD/runs/digits}"
ensure_env test
python -m ism_jax train --config=configs/digits.py --workdir="$workdir"
# Without 128 steps, which take longer than all others together.
python -m ism_jax evaluate --workdir="$workdir" --config.evaluation.steps="(1,2,4,8)"
echo
cat "$workdir/evaluation.md"
echo
# As they are printed, these work in any folder, without the environment's activation.
echo "Open $workdir/samples.png (each w and number of steps), evaluation.png beside it, and grids/ (while it trained)."
ours=("$VENV/bin/python" -m ism_jax)
echo "Another w, other steps: $(quoted "${ours[@]}" sample --workdir="$workdir" --out="$workdir/samples.npz" --config.sample.w=1 --config.sample.steps=2)"
echo "Your own images: $(quoted "${ours[@]}" train --config=configs/images.py:quick) --config.data.dir=FOLDER; README.md, \"Your own images\"."

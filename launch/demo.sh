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
run=(python -m ism_jax.main --workdir="$workdir")
"${run[@]}" --config=configs/digits.py
"${run[@]}" --mode=evaluate --config.evaluation.steps="(1,2,4,8)" # 128 takes longer than all others
echo
cat "$workdir/evaluation.md"
echo
# As they are printed, these work in any folder, without the environment's activation.
echo "Open $workdir/samples_steps1_w0.5.png (one step), evaluation.png beside it, and grids/ (while it trained)."
echo "Another w, other steps: $(quoted "$VENV/bin/${run[0]}" "${run[@]:1}" --mode=sample --out="$workdir/samples.npz" --config.sample.w=1 --config.sample.steps=2)"
echo "Your own images, in a folder for each class: $(quoted "$VENV/bin/python" -m ism_jax encode) --images=FOLDER --out=LATENTS; README.md, \"ImageNet on a pod\", goes on from there."

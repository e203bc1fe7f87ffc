#!/usr/bin/env bash
# Makes anew what ism_jax.load("digits") loads: bash launch/digits.sh [WORKDIR]
# Trains and judges as launch/demo.sh does (minutes on two cores; WORKDIR, by default runs/digits,
# is continued), and puts the export into the package, without the code that other exports have.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
workdir="${1:+$(absolute "$1")}"
workdir="${workdir:-$PWD/runs/digits}"
place=ism_jax/pretrained/digits
ensure_env test
python -m ism_jax train --config=configs/digits.py --workdir="$workdir"
# The random network is the same on every machine: a test scores the package's weights by it.
python -m ism_jax evaluate --workdir="$workdir" --config.evaluation.steps="(1,2,4,8)" \
  --config.evaluation.networks=classifier,random
export="$(mktemp -d)/digits"
python -m ism_jax export --workdir="$workdir" --out="$export"
note="It comes with ism_jax as \`digits\`, without the code that is named below: \`python -m ism_jax export --workdir=digits --out=DIR\` writes all, and \`bash launch/digits.sh\` trains it anew."
mkdir -p "$place/transformer"
awk -v note="$note" '/^## Use$/ { print note "\n\n![Samples](samples.png)\n" } { print }' \
  "$export/README.md" > "$place/README.md"
for file in config.json evaluation.json samples.png transformer/diffusion_pytorch_model.safetensors; do
  cp "$export/$file" "$place/$file"
done
chmod -R u=rwX,go=rX "$place"
du -sh "$place"

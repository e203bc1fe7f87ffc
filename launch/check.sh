#!/usr/bin/env bash
# Checks a set-up from end to end: real photographs to latents, latents to a checkpoint, a checkpoint
# to decoded samples and their FID, with all devices, in a few minutes on two CPU cores:
#
#   bash launch/check.sh [OUT]        OUT defaults to runs/check
#
# The photographs are those that scikit-learn and scikit-image ship, so nothing is downloaded; the
# network is tiny, the autoencoder and Inception are at random weights, so samples and numbers mean
# nothing. On a pod it runs on every machine, each with its own copy of the data, and they train together; OUT must then
# be a folder that all see:
#
#   bash launch/tpu.sh run -- bash launch/check.sh gs://BUCKET/check
#
# EXTRAS names extras to install besides, such as EXTRAS=tpu or EXTRAS=cuda.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out="$PWD/runs/check"
if [ $# -eq 0 ]; then
  rm -rf "$out"
else
  out="$(absolute "$1")"
fi
[ ! -e "$out/checkpoints" ] || {
  echo "Error: $out holds a run already, which would not train again. Name another folder." >&2
  exit 1
}
ensure_env "check${EXTRAS:+,$EXTRAS}"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python launch/photographs.py "$scratch/photographs"

# Of several machines each sees all of it for itself, without the devices that start together.
alone=(--coordinator=localhost:1 --processes=1 --process=0)
JAX_PLATFORMS=cpu python -m ism_jax encode --images="$scratch/photographs" \
  --out="$scratch/latents" --vae=random-small --images_per_shard=16 "${alone[@]}"
JAX_PLATFORMS=cpu python -m ism_jax statistics --images="$scratch/photographs" \
  --out="$scratch/statistics" --weights=random "${alone[@]}"
# Four rows for each device, so that all three losses have some on each.
devices="$(python -c 'from ism_jax.runtime import multihost
multihost.initialize()
import jax
print("devices:", jax.device_count())' | sed -n 's/^devices: //p')"
python -m ism_jax train --config=configs/check.py --workdir="$out" \
  --config.data.dir="$scratch/latents" --config.batch_size=$((devices > 8 ? 4 * devices : 32))
python -m ism_jax sample --workdir="$out" --out="$out/samples.npz"
python -m ism_jax evaluate --workdir="$out" \
  --config.evaluation.reference="$scratch/statistics/inception.npz"
echo "The set-up works. Checkpoints, logs, decoded samples and evaluation.md are in $out;" \
  "grids/ has pictures."

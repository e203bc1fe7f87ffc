#!/usr/bin/env bash
# From a folder of images to few-step samples: trains, finds the best w for each number of steps, and
# writes samples as PNGs.
#
#   bash launch/images.sh IMAGES [OUT] [-- --config.KEY=VALUE ...]
#
# IMAGES is a folder of images, or of class folders; a tar or a zip of them. OUT defaults to
# runs/images. CONFIG=configs/images.py:quick is the default, for two CPU cores in minutes; with
# CONFIG=configs/images.py size and length follow from the images, for an accelerator. Run again, it
# goes on where it was.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/commands.sh
source launch/commands.sh
# shellcheck disable=SC2154 # command and options are set there
take_command "$@"
images="${options[0]-}"
[ -n "$images" ] || fail "IMAGES is missing: name a folder of images."
images="$(absolute "$images")"
out="$(absolute "${options[1]-$PWD/runs/images}")"
ensure_env test

python -m ism_jax train --config="${CONFIG:-configs/images.py:quick}" \
  --config.data.dir="$images" --workdir="$out" ${command[@]+"${command[@]}"}
python -m ism_jax sweep --workdir="$out"
[ -e "$out/samples" ] || python -m ism_jax sample --workdir="$out" --out="$out/samples/"
echo "Open $out/sweep/sweep.md, sweep.png beside it, and $out/samples/ (delete it to draw them anew)."

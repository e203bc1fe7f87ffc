#!/usr/bin/env bash
# A run on one machine with NVIDIA GPUs: makes the environment, and runs the command in it.
#
#   bash launch/gpu.sh [--dry-run] -- \
#     python -m ism_jax train --config=configs/imagenet256.py --config.data.dir=LATENTS \
#       --workdir=W
#
# One process drives all GPUs of the machine, which is what JAX does by default: images are read once,
# and nothing has to find anything. For several machines there is slurm.sh. SIGTERM (or Ctrl-C for
# less patience) reaches the command itself; run again, it continues.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/commands.sh
source launch/commands.sh
# shellcheck source=launch/flags.sh
source launch/flags.sh

take_command "$@"
for option in ${options[@]+"${options[@]}"}; do
  case "$option" in
    --dry-run) dry_run=1 ;;
    *) fail "$option is unknown; the command comes behind --." ;;
  esac
done
[ ${#command[@]} -gt 0 ] || fail "no command behind --, such as
  -- python -m ism_jax train --config=configs/digits.py --workdir=runs/digits"
need nvidia-smi "install NVIDIA's driver (580 or newer, for CUDA 13)."
gpu_flags
if [ "$dry_run" = 1 ]; then
  echo "source launch/env.sh; ensure_env cuda"
  quoted env "XLA_FLAGS=$XLA_FLAGS" "${command[@]}"
  exit
fi
ensure_env cuda
# pip's CUDA libraries may be newer than the driver; JAX would go on without GPUs.
python -c 'import jax; jax.devices("cuda")' > /dev/null ||
  fail "JAX finds no GPU here; the reason is above."
exec "${command[@]}"

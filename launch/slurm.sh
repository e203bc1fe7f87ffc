#!/usr/bin/env bash
# A run on the GPUs of a Slurm cluster:
#
#   bash launch/slurm.sh submit [--dry-run] --nodes=N --gpus-per-node=G [SBATCH FLAG ...] -- \
#     python -m ism_jax train --config=configs/imagenet256.py --config.data.dir=LATENTS \
#       --workdir=FOLDER
#   bash launch/slurm.sh stop [--dry-run] JOB
#
# submit makes the environment (the checkout is on a file system that the nodes see too) and hands
# the job in; --time, --partition, --account and whatever else sbatch knows go to it as they are.
# What the job says is in runs/slurm-JOB.log. It is queued again when it is preempted, and at its
# time limit: Slurm sends SIGTERM, training saves and ends with 143, and the job asks to be queued
# again. An error ends it. stop saves and does not queue it again; scancel leaves 30 s to save,
# or what else the cluster's KillWait is.
set -euo pipefail
if [ "${1-}" = job ]; then
  # sbatch runs a copy of this file, from --chdir.
  launch=launch
else
  launch="$(dirname "${BASH_SOURCE[0]}")"
fi
# shellcheck source=launch/env.sh
source "$launch/env.sh"
# shellcheck source=launch/commands.sh
source launch/commands.sh
# shellcheck source=launch/flags.sh
source launch/flags.sh

# Of the warning before a time limit, in seconds: to finish a compiled call, and to write 14 GB
# (SiT-XL/2 with Adam and both EMAs in float32) to a shared file system.
WARNING=300

submit() {
  local option gpus="" nodes="" flags=()
  for option in ${options[@]+"${options[@]}"}; do
    case "$option" in
      --dry-run) dry_run=1 ;;
      --nodes=*) nodes="${option#*=}" ;;
      --gpus-per-node=*) gpus="${option#*=}" ;;
      *) flags+=("$option") ;;
    esac
  done
  [ -n "$nodes" ] && [ -n "$gpus" ] || fail "submit needs --nodes=N and --gpus-per-node=G."
  [ ${#command[@]} -gt 0 ] || fail "submit needs the training command behind --."
  need sbatch "run this where jobs are handed in, on a login node of the cluster."
  if [ "$dry_run" = 1 ]; then
    echo "source launch/env.sh; ensure_env cuda"
  else
    ensure_env cuda
    mkdir -p runs
  fi
  # One process per GPU: where JAX finds a Slurm job, each process takes the one GPU of its number
  # on the node (SLURM_LOCALID). So each must see all GPUs of the node (no --gpus-per-task).
  step sbatch --job-name=ism_jax "--nodes=$nodes" "--gpus-per-node=$gpus" \
    "--ntasks-per-node=$gpus" --requeue --open-mode=append "--signal=TERM@$WARNING" \
    "--chdir=$PWD" --output=runs/slurm-%j.log ${flags[@]+"${flags[@]}"} \
    "$PWD/launch/slurm.sh" job -- "${command[@]}"
}

# On the first node, in the environment that submit has made.
job() {
  local code=0
  PATH="$VENV/bin:$PATH"
  gpu_flags
  # Each process ends when its share of a checkpoint is written; none may be killed because another
  # was faster. (One that fails ends the others itself.)
  srun --kill-on-bad-exit=0 "${command[@]}" || code=$?
  if [ "$code" = 143 ]; then
    echo "Stopped by SIGTERM; a checkpoint is saved."
    # Refused after `stop`.
    scontrol requeue "$SLURM_JOB_ID" || true
  fi
  exit "$code"
}

stop() {
  local option jobs=()
  for option in ${options[@]+"${options[@]}"}; do
    case "$option" in
      --dry-run) dry_run=1 ;;
      -*) fail "$option is unknown; stop takes the number of a job." ;;
      *) jobs+=("$option") ;;
    esac
  done
  [ ${#jobs[@]} = 1 ] || fail "stop needs the number of one job; squeue --me lists yours."
  need scancel "run this on a login node of the cluster."
  step scontrol update "JobId=${jobs[0]}" Requeue=0
  # To the processes of training, not to the job's shell.
  step scancel --signal=TERM "${jobs[0]}"
}

action="${1-}"
[ $# -eq 0 ] || shift
take_command "$@"
case "$action" in
  submit | job | stop) "$action" ;;
  *) fail "${action:-no command} is not among submit and stop." ;;
esac

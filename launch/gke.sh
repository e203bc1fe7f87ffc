#!/usr/bin/env bash
# A run on a GKE cluster with TPUs, through xpk:
#
#   bash launch/gke.sh create [--FLAG=VALUE ...] [XPK FLAG ...] -- \
#     python -m ism_jax train --config=configs/imagenet256.py --config.data.dir=LATENTS \
#       --workdir=gs://BUCKET/ism
#   bash launch/gke.sh list
#   bash launch/gke.sh delete
#
# Flags, or variables:
#   --cluster=     CLUSTER     one that `xpk cluster create` has made
#   --zone=        ZONE
#   --project=     PROJECT
#   --workload=    WORKLOAD    a name for the run; for create and delete
#   --tpu-type=    TPU_TYPE    such as v6e-64; for create
#   --slices=      SLICES      default 1
#   --dry-run                  prints the commands, and runs none
#
# Other flags go to `xpk workload create` as they are. The image is this checkout on top of
# python:3.12, made by xpk; each start installs into it what the checkout needs. Preempted or killed, the run is started again,
# and continues from the newest checkpoint: exit code 143 says that one is saved. An error, exit
# code 1, ends it. delete sends SIGTERM, and leaves GRACE seconds (default 600) to save.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/commands.sh
source launch/commands.sh

action="${1-}"
[ $# -eq 0 ] || shift
take_command "$@"
cluster="${CLUSTER-}" zone="${ZONE-}" project="${PROJECT-}" workload="${WORKLOAD-}"
tpu_type="${TPU_TYPE-}" slices="${SLICES:-1}" more=()
for option in ${options[@]+"${options[@]}"}; do
  case "$option" in
    --cluster=*) cluster="${option#*=}" ;;
    --zone=*) zone="${option#*=}" ;;
    --project=*) project="${option#*=}" ;;
    --workload=*) workload="${option#*=}" ;;
    --tpu-type=*) tpu_type="${option#*=}" ;;
    --slices=*) slices="${option#*=}" ;;
    --dry-run) dry_run=1 ;;
    *) more+=("$option") ;;
  esac
done
at=("--cluster=$cluster" "--zone=$zone" "--project=$project")

create() {
  local folder=ism_jax
  if [ "$dry_run" = 1 ]; then
    echo "source launch/commands.sh; pack $folder.tar.gz"
    quoted mkdir "$folder"
    quoted tar -xzf "$folder.tar.gz" -C "$folder"
  else
    folder="$(mktemp -d)"
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder' '$folder.tar.gz'" EXIT
    pack "$folder.tar.gz"
    tar -xzf "$folder.tar.gz" -C "$folder"
  fi
  # xpk passes SIGTERM on to the shell of this command and to no child of it: the command has to
  # take the shell's place, here and in worker.sh. And it starts again what ended with a code from
  # 127 to 255, such as 143.
  step xpk workload create "${at[@]}" "--workload=$workload" "--tpu-type=$tpu_type" \
    "--num-slices=$slices" --base-docker-image=python:3.12 "--script-dir=$folder" \
    --max-restarts=100 "--termination-grace-period-seconds=${GRACE:-600}" \
    ${more[@]+"${more[@]}"} "--command=exec bash launch/worker.sh run $(quoted "${command[@]}")"
}

list() {
  step xpk workload list "${at[@]}"
}

delete() {
  step xpk workload delete "${at[@]}" "--workload=$workload"
}

wanted=("CLUSTER $cluster" "ZONE $zone" "PROJECT $project")
case "$action" in
  create) wanted+=("WORKLOAD $workload" "TPU_TYPE $tpu_type") ;;
  delete) wanted+=("WORKLOAD $workload") ;;
  list) ;;
  *) fail "${action:-no command} is not among create, list and delete." ;;
esac
require "${wanted[@]}"
if [ "$action" = create ]; then
  require_command
elif [ ${#more[@]} -gt 0 ] || [ ${#command[@]} -gt 0 ]; then
  fail "${more[*]-} ${command[*]-}: $action does not take that."
fi
need xpk "pip install xpk, and see https://github.com/AI-Hypercomputer/xpk"
"$action"

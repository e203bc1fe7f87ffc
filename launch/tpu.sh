#!/usr/bin/env bash
# A run on a Cloud TPU pod, or several ("slices"), through gcloud:
#
#   bash launch/tpu.sh COMMAND [--FLAG=VALUE ...] [-- TRAINING COMMAND]
#
#   create    asks for the TPU, as a queued resource
#   wait      until it is there
#   install   copies this checkout to all its machines, and makes the environment there
#   run       starts the training command on all machines, in the background
#   status    of each machine: running, ended with an exit code, or idle
#   logs      the last lines of what machine 0 of slice 0 says (--worker=W --slice=S --lines=N)
#   stop      SIGTERM on all machines, and waits: training saves a checkpoint and ends with 143
#   watch     all of this, until training is done: create, wait, install, run, and again whatever is
#             needed after a preemption or a failure. Keep it where it is not interrupted: without it
#             training goes on, but nothing restarts it. It can be ended and started again at any
#             time (before a stop it must be ended).
#   delete    gives the TPU back, with its disks
#
# For example
#
#   export TPU_NAME=ism ZONE=... PROJECT=... ACCELERATOR_TYPE=v6e-64 RUNTIME_VERSION=v2-alpha-tpuv6e
#   bash launch/tpu.sh watch --spot -- \
#     python -m ism_jax train --config=configs/imagenet256.py --config.data.dir=LATENTS \
#       --workdir=gs://BUCKET/ism
#
# Flags, or variables:
#   --name=        TPU_NAME           of the queued resource and, with -0, -1, ..., of its slices
#   --zone=        ZONE
#   --project=     PROJECT
#   --type=        ACCELERATOR_TYPE   such as v6e-64; for create and watch
#   --version=     RUNTIME_VERSION    v2-alpha-tpuv6e, v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e),
#                                     tpu-ubuntu2204-base (v4); for create and watch
#   --slices=      SLICES             default 1
#   --spot, --reserved                for create and watch
#   --mount=BUCKET:FOLDER             for run and watch: before the command starts, gcsfuse mounts the
#                                     bucket there on all machines, e.g. --mount=my-data:/mnt/data
#   --dry-run                         prints the commands, and runs none
#                  CREATE_FLAGS       more flags for creating, such as "--internal-ips --network=N"
#                  SSH_FLAGS          more flags for ssh and scp, such as "--internal-ip"
#
# LATENTS is on every machine: a copy, or a folder in a bucket that --mount mounts.
# The workdir is to be on gs://: a TPU that was preempted comes back with empty disks. The same
# command then continues from the newest checkpoint. ssh to several machines takes the key from the
# agent: ssh-add ~/.ssh/google_compute_engine.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/commands.sh
source launch/commands.sh

POLL="${POLL:-60}" # seconds between two looks at a state
# A run that failed is started again this often in a row. Errors of one machine or of the storage
# come and go; those of the config stay.
RETRIES="${RETRIES:-3}"
LASTING="${LASTING:-1800}" # seconds after which a run that fails is not counted as the next in a row

action="${1-}"
[ $# -eq 0 ] || shift
take_command "$@"
name="${TPU_NAME-}" zone="${ZONE-}" project="${PROJECT-}" type="${ACCELERATOR_TYPE-}"
version="${RUNTIME_VERSION-}" slices="${SLICES:-1}" provisioning=() worker=0 slice=0 lines=100
bucket="" folder=""
for option in ${options[@]+"${options[@]}"}; do
  case "$option" in
    --name=*) name="${option#*=}" ;;
    --zone=*) zone="${option#*=}" ;;
    --project=*) project="${option#*=}" ;;
    --type=*) type="${option#*=}" ;;
    --version=*) version="${option#*=}" ;;
    --slices=*) slices="${option#*=}" ;;
    --worker=*) worker="${option#*=}" ;;
    --slice=*) slice="${option#*=}" ;;
    --lines=*) lines="${option#*=}" ;;
    --mount=?*:/?*)
      bucket="${option#*=}" folder="${option#*:}"
      bucket="${bucket%%:*}"
      ;;
    --mount=*) fail "$option is not --mount=BUCKET:/FOLDER, the name of a bucket and a full path." ;;
    --spot | --reserved) provisioning+=("$option") ;;
    --dry-run) dry_run=1 ;;
    *) fail "$option is unknown; the flags are in the head of launch/tpu.sh." ;;
  esac
done

# Word splitting is meant: these hold several flags.
# shellcheck disable=SC2206
create_flags=(${CREATE_FLAGS-})
# shellcheck disable=SC2206
ssh_flags=(${SSH_FLAGS-})
at=("--zone=$zone" "--project=$project")

say() {
  echo "$(date -u +%FT%TZ) $*"
}

queued() { # queued VERB FLAG ...: of the queued resource
  local verb="$1"
  shift
  step gcloud compute tpus queued-resources "$verb" "$name" "${at[@]}" "$@"
}

# The state of the queued resource, NONE where there is none; fails where it cannot be known.
state() {
  local errors
  errors="$(mktemp)" # apart from the state: gcloud has notices too
  if queued describe --format='value(state.state)' 2> "$errors"; then
    :
  elif grep -q NOT_FOUND "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    rm "$errors"
    return 1
  fi
  rm "$errors"
}

# The names of the TPUs, one per slice. (tpu-vm ssh to each, and not queued-resources ssh, which
# leaves out the TPUs that it cannot reach and reports success.)
nodes() {
  local i
  if [ "$slices" = 1 ]; then
    echo "$name"
    return
  fi
  for ((i = 0; i < slices; i++)); do
    echo "$name-$i"
  done
}

# each FUNCTION ARGUMENT ...: FUNCTION NODE ARGUMENT ... for all slices at once; fails if one does.
each() {
  local function="$1" node pids=() pid failed=0
  shift
  for node in $(nodes); do
    if [ "$dry_run" = 1 ]; then
      "$function" "$node" "$@"
    else
      "$function" "$node" "$@" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || failed=1
  done
  return "$failed"
}

on() { # on NODE WORKER COMMAND: COMMAND in a shell on those machines of a slice
  step gcloud compute tpus tpu-vm ssh "$1" "${at[@]}" "--worker=$2" \
    ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$3" < /dev/null
}

copy() { # copy NODE FILE: to the home folder on all machines of a slice
  step gcloud compute tpus tpu-vm scp "$2" "$1:ism_jax.tar.gz" "${at[@]}" --worker=all \
    ${ssh_flags[@]+"${ssh_flags[@]}"} < /dev/null
}

create() {
  local nodes=("--node-id=$name")
  [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  queued create "--accelerator-type=$type" "--runtime-version=$version" "${nodes[@]}" \
    ${provisioning[@]+"${provisioning[@]}"} ${create_flags[@]+"${create_flags[@]}"}
}

delete() {
  queued delete --force --quiet
}

# Until the state is ACTIVE; fails in a state that does not lead there.
await() {
  local now before=""
  if [ "$dry_run" = 1 ]; then
    queued describe --format='value(state.state)'
    return
  fi
  while :; do
    now="$(state)" || now="not known"
    [ "$now" = "$before" ] || say "$name is $now."
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      NONE | FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "Error: $name is $now; delete and create it, or let watch do that." >&2
        return 1
        ;;
    esac
    sleep "$POLL"
  done
}

install() {
  local archive=ism_jax.tar.gz here=ism_jax/launch/worker.sh new=ism_jax.new/launch/worker.sh
  if [ "$dry_run" = 1 ]; then
    echo "source launch/commands.sh; pack $archive"
  else
    archive="$(mktemp -d)/$archive"
    pack "$archive"
  fi
  # The code of a command that is going on stays as it is: `idle` is an error then.
  each copy "$archive" && each on all "rm -rf ism_jax.new && mkdir ism_jax.new \
&& tar -xzf ism_jax.tar.gz -C ism_jax.new && bash $new idle \
&& rm -rf ism_jax && mv ism_jax.new ism_jax && bash $here install" || return 1
  [ "$dry_run" = 1 ] || rm -r "$(dirname "$archive")"
}

run() {
  local mount="" target
  if [ -n "$bucket" ]; then
    target="$(quoted "$folder")" # the folder's owner is whoever starts the command
    mount="mountpoint -q $target || { sudo mkdir -p $target && sudo chown \$(id -u) $target \
&& gcsfuse --implicit-dirs $(quoted "$bucket") $target; } && "
  fi
  each on all "${mount}bash ism_jax/launch/worker.sh start $(quoted "${command[@]}")"
}

status() { # a machine without the checkout is idle
  each on all "if [ -e ism_jax ]; then bash ism_jax/launch/worker.sh status; else echo idle; fi"
}

stop() {
  each on all "bash ism_jax/launch/worker.sh stop"
}

# Until training has ended with 0 on all machines; see the head.
watch() {
  local now before="" said codes failures=0 started=0
  if [ "$dry_run" = 1 ]; then
    echo "# Every $POLL seconds:"
    await
    echo "# Where it is SUSPENDED or FAILED:"
    delete
    echo "# Where it is not there, or was deleted:"
    create
    echo "# Once it is ACTIVE:"
    status
    echo "# Where no machine runs the command:"
    install
    run
    return
  fi
  while :; do
    now="$(state)" || now="not known"
    [ "$now" = "$before" ] || say "$name is $now."
    before="$now"
    case "$now" in
      NONE) create || say "Creating it failed; trying again." ;;
      SUSPENDED | FAILED)
        if delete; then continue; fi
        say "Deleting it failed; trying again."
        ;;
      ACTIVE)
        if ! said="$(status)"; then
          # If it is gone, its state will say so.
          say "Not all machines can be reached."
        elif grep -q 'running$' <<< "$said"; then
          : # Where one machine fails, it ends all others.
        else
          codes="$(sed -n 's/.* ended \([0-9]*\)$/\1/p' <<< "$said" | sort -u | tr '\n' ' ')"
          if [ "$codes" = "0 " ] && ! grep -q 'idle$' <<< "$said"; then
            say "Training is done. Give the TPU back: bash launch/tpu.sh delete"
            return
          fi
          [ $((SECONDS - started)) -lt "$LASTING" ] || failures=0
          # After 143, SIGTERM, a checkpoint is saved: nothing has failed.
          if [ -n "$codes" ] && [ "$codes" != "143 " ]; then
            failures=$((failures + 1))
            say "The command has ended with exit code ${codes}($failures in a row)."
            if [ "$failures" -gt "$RETRIES" ]; then
              echo "Error: it fails again and again; see bash launch/tpu.sh logs." >&2
              return 1
            fi
          fi
          if install && run; then started="$SECONDS"; else say "That failed; trying again."; fi
        fi
        ;;
    esac
    sleep "$POLL"
  done
}

case "$action" in
  create | wait | install | run | status | logs | stop | watch | delete) ;;
  *) fail "${action:-no command} is not among create, wait, install, run, status, logs, stop, watch" \
    "and delete." ;;
esac
wanted=("TPU_NAME $name" "ZONE $zone" "PROJECT $project")
case "$action" in
  create | watch) wanted+=("ACCELERATOR_TYPE $type" "RUNTIME_VERSION $version") ;;
esac
require "${wanted[@]}"
[ "$action" != logs ] || [ -n "$(nodes | sed -n "$((slice + 1))p")" ] ||
  fail "--slice=$slice is not one of $slices, which are counted from 0."
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a number of slices."
case "$action" in
  run | watch) require_command ;;
  *) [ ${#command[@]} -eq 0 ] || fail "$action takes no training command; run and watch do." ;;
esac
need gcloud "see https://cloud.google.com/sdk/docs/install, then: gcloud auth login"

case "$action" in
  wait) await ;;
  logs) on "$(nodes | sed -n "$((slice + 1))p")" "$worker" "tail -n $lines ism_jax_run/log" ;;
  *) "$action" ;;
esac

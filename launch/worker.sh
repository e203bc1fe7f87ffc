#!/usr/bin/env bash
# What tpu.sh and gke.sh run on a TPU's machines; it can also be run on one of them by hand:
#
#   bash launch/worker.sh install            makes the environment
#   bash launch/worker.sh run COMMAND ...    in it, in the foreground, e.g. python -m ism_jax train ...
#   bash launch/worker.sh start COMMAND ...  the same in the background: the connection may end
#   bash launch/worker.sh status             one line: "HOST running", "HOST ended CODE" or "HOST idle"
#   bash launch/worker.sh idle               is an error while one runs
#   bash launch/worker.sh stop               SIGTERM, then waits until it has saved and ended
#
# What a started command says is in ~/ism_jax_run/log (ISM_JAX_RUN names another folder). One
# command runs at a time; "ended" is of the last one, "idle" where there was none, or where the
# machine went down with it. stop waits $STOP_SECONDS (default 900).
set -euo pipefail
# Outside the checkout, which an installation replaces.
export ISM_JAX_VENV="${ISM_JAX_VENV:-$HOME/ism_jax_venv}"
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
run_dir="${ISM_JAX_RUN:-$HOME/ism_jax_run}"

# Cloud TPU images come with Python 3.10, which JAX does not support any more. A Python is fit if it
# is 3.11 to 3.13 and can make environments, which Debian's needs a package for.
fit() {
  "$1" -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.13 python3; do
    if command -v "$python" > /dev/null && fit "$python"; then
      PYTHON="$python"
      return
    fi
  done
  echo "No fit Python 3.11 to 3.13 here: installing one with uv ..." >&2
  # The variable is for system Pythons that refuse packages; older pips do not know it as a flag.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  PYTHON="$(python3 -m uv python find 3.12)"
}

# A run holds this lock while it lives, so that neither a dead one nor a reused process id is taken
# for it.
locked() {
  mkdir -p "$run_dir"
  ! flock --nonblock "$run_dir/lock" true
}

busy() {
  echo "Error: $(hostname) runs a command already; stop it first." >&2
  exit 1
}

prepare() {
  [ -e "$VENV/bin/python" ] || find_python
  ensure_env tpu
}

# Waits for a command, and writes its exit code.
supervise() {
  local code child
  # Only we hold the lock: what the command leaves behind must not.
  "$@" 9>&- &
  child=$!
  echo "$child" > "$run_dir/pid"
  trap 'kill -TERM "$child"' TERM
  while :; do
    code=0
    wait "$child" || code=$?
    # A trap ends the wait early.
    kill -0 "$child" 2> /dev/null || break
  done
  echo "$code" > "$run_dir/exit_code"
  echo "$(date -u +%FT%TZ) ended with exit code $code"
}

case "${1-}" in
  install)
    prepare
    python -c 'import importlib.metadata as m; print("Installed jax", m.version("jax"))'
    ;;
  run)
    shift
    prepare
    # Not a child: who started us sends SIGTERM to this process.
    exec "$@"
    ;;
  start)
    shift
    mkdir -p "$run_dir"
    exec 9> "$run_dir/lock"
    flock --nonblock 9 || busy
    prepare
    rm -f "$run_dir/pid" "$run_dir/exit_code"
    # The lock goes with descriptor 9. A session of its own outlives the connection.
    echo "$(date -u +%FT%TZ) $*" >> "$run_dir/log"
    setsid bash launch/worker.sh supervise "$@" < /dev/null >> "$run_dir/log" 2>&1 &
    echo "$(hostname) started; what it says is in $run_dir/log"
    ;;
  supervise)
    shift
    supervise "$@"
    ;;
  status)
    if locked; then
      echo "$(hostname) running"
    elif [ -e "$run_dir/exit_code" ]; then
      echo "$(hostname) ended $(cat "$run_dir/exit_code")"
    else
      echo "$(hostname) idle"
    fi
    ;;
  idle)
    ! locked || busy
    ;;
  stop)
    if ! locked; then
      echo "$(hostname) has nothing to stop"
      exit 0
    fi
    signalled=0
    for ((i = 0; i < ${STOP_SECONDS:-900}; i++)); do
      locked || break
      # Once: a second SIGTERM kills. (A command that has just been started has no id yet.)
      if [ "$signalled" = 0 ] && [ -s "$run_dir/pid" ]; then
        kill -TERM "$(cat "$run_dir/pid")"
        signalled=1
      fi
      sleep 1
    done
    if locked; then
      echo "Error: $(hostname) has got SIGTERM and still runs; see $run_dir/log." >&2
      exit 1
    fi
    echo "$(hostname) ended $(cat "$run_dir/exit_code")"
    ;;
  *)
    echo "Error: ${1:-nothing} is not among install, run, start, status, idle and stop." >&2
    exit 2
    ;;
esac

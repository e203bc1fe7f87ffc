# shellcheck shell=bash
# Sourced by the scripts beside it, which then work from the checkout, whatever folder they are
# called from.
#
#   absolute PATH         PATH, seen from the folder the script was called in
#   ensure_env EXTRAS     makes .venv (or uses $ISM_JAX_VENV), with the package and EXTRAS installed
#   ensure_all            the same, with all that the whole test suite needs
#
# PYTHON names the interpreter of a new environment (default python3; 3.11 to 3.13).
called_from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV="${ISM_JAX_VENV:-$PWD/.venv}"

absolute() {
  case "$1" in
    /* | *://*) echo "$1" ;;
    *) echo "$called_from/$1" ;;
  esac
}

ensure_env() {
  if ! _installed "$1"; then
    mkdir -p "$(dirname "$VENV")"
    (
      # Scripts that are started at the same moment take turns, where there is flock.
      ! command -v flock > /dev/null || flock 8
      if ! _installed "$1"; then _install "$1" 8>&-; fi
    ) 8> "$VENV.lock"
  fi
  PATH="$VENV/bin:$PATH"
}

ensure_all() {
  ensure_env test,interop,aot,check,notebooks,demo,browser,tensorboard,wandb
  [ -z "$(type -P chromium chromium-browser google-chrome)" ] || return 0
  if [ "$(id -u)" = 0 ] && type -P apt-get > /dev/null; then
    echo "Installing chromium ..."
    { apt-get update -qq && apt-get install -y -qq chromium; } > /dev/null
  else
    echo "Error: the tests of the page need chromium or google-chrome on the PATH." >&2
    return 1
  fi
}

# Whether the environment works, and was installed by this setup.py, with these extras.
_installed() {
  "$VENV/bin/python" -m pip --version > /dev/null 2>&1 &&
    [ "$(cat "$VENV/.installed-$1" 2> /dev/null)" = "$PWD $(cksum < setup.py)" ]
}

# Also mends an environment whose making was interrupted.
_install() {
  local python="${PYTHON:-python3}"
  if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
      echo "Error: $("$python" --version) is not 3.11, 3.12 or 3.13; set PYTHON to one that is." >&2
      exit 1
    }
    "$python" -m venv "$VENV"
  fi
  echo "Installing ism_jax[$1] into $VENV ..."
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$1]"
  echo "$PWD $(cksum < setup.py)" > "$VENV/.installed-$1"
}

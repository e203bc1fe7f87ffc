# Sourced by the scripts beside it: enters the checkout and an environment that setup.py made.
#
#   ensure_env EXTRAS     creates .venv (or uses $ISM_JAX_VENV) and installs the package with EXTRAS
#
# PYTHON names the interpreter for a new environment (default python3; 3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${ISM_JAX_VENV:-$PWD/.venv}"

ensure_env() {
  local extras="$1" stamp wanted
  if [ ! -x "$VENV/bin/python" ]; then
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "Error: $("$python" --version) is too old; set PYTHON to a Python 3.11 or newer." >&2
      exit 1
    }
    "$python" -m venv "$VENV"
  fi
  # Installed already, by this setup.py, with these extras: nothing to do.
  stamp="$VENV/.installed-$extras"
  wanted="$(cksum setup.py)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing ism_jax[$extras] into $VENV ..."
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
    echo "$wanted" > "$stamp"
  fi
  PATH="$VENV/bin:$PATH"
}

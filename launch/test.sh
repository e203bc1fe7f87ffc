#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [--all] [PYTEST ARGUMENTS]
# --all adds the tests that take longer or need optional packages.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ "${1:-}" = --all ]; then
  ensure_env test,interop,aot,check
  shift
  exec python -m pytest "$@"
fi
ensure_env test
exec python -m pytest -m "not slow" "$@"

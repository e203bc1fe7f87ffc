#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [--all] [PYTEST ARGUMENTS]
# --all adds the tests that take longer or need optional packages.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_env test
if [ "${1:-}" = --all ]; then
  shift
  exec python -m pytest "$@"
fi
exec python -m pytest -m "not slow" "$@"

#!/usr/bin/env bash
# Runs the tests, two files at a time: bash launch/test.sh [--all] [PYTEST ARGUMENTS]
# --all adds the tests that take longer or need optional packages; -n 0 runs one after the other, and
# -n 8 eight files at a time.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# Tests of a file share what they trained or compiled. In the order of their names: xdist's own, by
# the number of tests, has the longest last.
together=(-n 2 --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --all ]; then
  ensure_env test,interop,aot,check,notebooks
  shift
  exec python -m pytest "${together[@]}" "$@"
fi
ensure_env test
exec python -m pytest "${together[@]}" -m "not slow" "$@"

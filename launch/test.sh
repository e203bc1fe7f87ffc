#!/usr/bin/env bash
# Runs the tests, two files at a time: bash launch/test.sh [--all] [PYTEST ARGUMENTS]
# --all adds the tests that take longer or need optional packages; -n 0 runs one after the other, and
# -n 8 eight files at a time.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# Tests of a file share what they trained or compiled. In the order of their names: xdist's own, by
# the number of tests, has the longest last. A worker that crashes ends the run as a failure: with a
# new one in its place, xdist waits for ever for the tests of the file that the old one was at.
together=(-n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0)
if [ "${1:-}" = --all ]; then
  ensure_all
  shift
  exec python -m pytest "${together[@]}" "$@"
fi
ensure_env test
exec python -m pytest "${together[@]}" -m "not slow" "$@"

#!/usr/bin/env bash
# Writes where the repository is on GitHub into the README, the notebooks and their badges, and the
# package's metadata, over the placeholder or an earlier place: bash launch/place.sh OWNER/NAME
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
place="${1:-}"
if ! [[ "$place" =~ ^[A-Za-z0-9-]+/[A-Za-z0-9._-]+$ ]]; then
  echo "Error: '$place' is no place on GitHub: give OWNER/NAME, such as jane/ism_jax." >&2
  exit 1
fi
before="$(sed -n 's,.*REPOSITORY = .*"https://github.com/\([^"\\]*\).*,\1,p' launch/colab/sample.ipynb)"
for file in README.md CITATION.cff setup.py launch/colab/*.ipynb; do
  sed -E -i.before "s,(github(\.com)?/)${before//./\\.}([^A-Za-z0-9._-]|$),\1$place\3,g" "$file"
  rm "$file.before"
done
echo "The repository is at https://github.com/$place now: see git diff, and commit."

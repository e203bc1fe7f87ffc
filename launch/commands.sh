# shellcheck shell=bash
# Sourced by the scripts beside it that send commands elsewhere, behind env.sh.
#
#   take_command "$@"     what follows "--", as ${command[@]}; the rest as ${options[@]}
#   fail MESSAGE          an error, with exit code 2, as argparse and absl have it
#   require "NAME VALUE" ...  an error that names all whose value is empty
#   require_command       an error without a command; a warning where its workdir is a local folder
#   need TOOL HOW         an error that says HOW, unless TOOL is installed; not in a dry run
#   quoted WORD ...       the words on one line, as a shell reads them
#   step COMMAND ...      runs the command; with dry_run=1 it is only shown, on a line
#   pack FILE             writes the checkout, without what git ignores, as a tar.gz
#
# They run on the user's own machine: bash 3.2, which macOS has, is enough.
dry_run=0
command=()
options=()

take_command() {
  options=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  [ $# -eq 0 ] || shift
  # shellcheck disable=SC2034 # for the script that sources this
  command=("$@")
}

fail() {
  echo "Error: $*" >&2
  exit 2
}

require() {
  local pair missing=""
  for pair in "$@"; do
    [ -n "${pair#* }" ] || missing="$missing ${pair%% *}"
  done
  [ -z "$missing" ] || fail "not given:$missing. Set these, or the flags in the head of $0."
}

require_command() {
  [ ${#command[@]} -gt 0 ] || fail "the training command is missing behind --, such as
  -- python -m ism_jax train --config=configs/imagenet256.py --config.data.dir=LATENTS \\
     --workdir=gs://BUCKET/FOLDER"
  case " ${command[*]} " in
    *" "*://*) ;;
    *) echo "Warning: nothing on gs://: what is written goes with the machine's disk." >&2 ;;
  esac
}

need() {
  [ "$dry_run" = 1 ] || command -v "$1" > /dev/null || fail "$1 is not installed: $2"
}

quoted() {
  local word flag mark="'" escaped="'\\''" line=""
  for word in "$@"; do
    flag=""
    case "${word%%=*}" in
      "$word" | *[!A-Za-z0-9_.-]*) ;;
      # Only the value of a flag, so that the line stays easy to read.
      --*) flag="${word%%=*}=" word="${word#*=}" ;;
    esac
    case "$word" in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$mark/$escaped}'" ;;
    esac
    line="$line${line:+ }$flag$word"
  done
  printf '%s\n' "$line"
}

step() {
  if [ "$dry_run" = 1 ]; then quoted "$@"; else "$@"; fi
}

pack() {
  local file
  git rev-parse --is-inside-work-tree > /dev/null 2>&1 ||
    fail "$PWD is not a git checkout, so what belongs to it is unknown: clone it with git."
  # Files that are new count too, those that were removed do not.
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      [ ! -e "$file" ] || printf '%s\0' "$file"
    done | COPYFILE_DISABLE=1 tar --null -czf "$1" -T -
}

#!/usr/bin/env bash
# Trains and judges rows of a study with the seeds $SEEDS (default "0 1") each, and compares them:
#
#   bash launch/study.sh [--config=configs/NAME.py] [OUT] ["VARIANT [--config.KEY=VALUE ...]" ...] \
#     [-- FLAG ...]
#
# The config defaults to configs/digits.py, OUT to runs/study (with another config, to
# runs/study-NAME), the rows to sm, sm_compounding and ism. The row "ablation" stands for all of the
# paper's ablation, iSM less one technique each, and plain l2 with its consistency weight raised to
# $GAMMA (default 6), where its gradient is about as large as that of the wavelet loss; "techniques"
# for ism with one technique each that is not the paper's; "guidance" for what intrinsic guidance
# costs, one thing at a time; "methods" for ism and the other methods. Flags after "--" go to every
# run:
#
#   bash launch/study.sh --config=configs/photos.py runs/ablation ablation -- --config.steps=1000
#
# A run on digits is 4,000 steps, which take minutes. The tables of 7,000 steps in
# configs/results/README.md were measured with a finer pairing than the config has now:
#
#   bash launch/study.sh -- --config.steps=7000 --config.coupling.threshold=1e-3
#
# and those of 4,000 with --config.steps=4000 --config.coupling.threshold=1e-3. There is one run at a
# time for each CPU core, pinned to it (JOBS=N for N at a time), and one at a time on an accelerator.
# What a run says is in WORKDIR.log. Run again, it goes on where it was.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

export CONFIG=configs/digits.py
case "${1-}" in
  --config=*)
    CONFIG="${1#--config=}"
    shift
    ;;
esac
case "$CONFIG" in
  configs/digits.py) out="$PWD/runs/study" ;;
  *) out="$PWD/runs/study-$(basename "$CONFIG" .py)" ;;
esac
if [ $# -gt 0 ] && [ "$1" != -- ]; then
  out="$(absolute "$1")"
  shift
fi
rows=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  rows+=("$1")
  shift
done
[ $# -eq 0 ] || shift
flags="$*" # of every run
[ ${#rows[@]} -gt 0 ] || rows=(sm sm_compounding ism)
gamma="--config.objective.gamma=${GAMMA:-6}"
ablation=(
  sm sm_compounding ig interval "interval $gamma" wavelet sot ism
  no_ig no_interval no_wavelet "no_wavelet $gamma" no_sot
)
objective=--config.objective
continuous="$objective.times=logit_normal $objective.grid_share=0.5 $objective.jumps=continuous"
techniques=(
  ism
  "ism $objective.rollout=True"
  "ism $objective.curriculum=1.0"
  "ism $objective.times=logit_normal $objective.grid_share=0.5"
  "ism --config.optimizer.b2=0.95"
  "ism --config.coupling.coupling=classwise"
  "ism $objective.jump_probabilities=(1.0,1.0,1.0,1.0,1.0,1.0,3.0)"
  "ism $objective.w_scaled=True"
  "ism $objective.guided_velocity=network"
  "ism $objective.w_drawn=log_uniform"
  "ism $objective.w_ramp=0.25"
  "ism $objective.t_interval_max=0.5"
  "ism --config.wavelet.tree=packet"
  "ism $continuous"
  "ism $continuous $objective.split=0.25"
  "ism $continuous $objective.split=0.1"
  imf
)
guidance=(
  ism
  no_ig
  "ism $objective.w_max=0.5 $objective.w_spacing=0.5"
  "ism $objective.guidance_parameters=target"
  "no_ig --config.batch_size=96 $objective.shares=(2,0,1)"
)
methods=(fm sm ism split meanflow plus)
expanded=()
for row in "${rows[@]}"; do
  case "$row" in
    ablation) expanded+=("${ablation[@]}") ;;
    techniques) expanded+=("${techniques[@]}") ;;
    guidance) expanded+=("${guidance[@]}") ;;
    methods) expanded+=("${methods[@]}") ;;
    *) expanded+=("$row") ;;
  esac
done

# Trains and judges a run: run_one WORKDIR SEED VARIANT [FLAG ...]
run_one() {
  local workdir="$1" seed="$2" variant="$3" core pin=() mode
  shift 3
  [ ! -e "$workdir/evaluation.json" ] || return 0
  if [ -n "${SLOT-}" ]; then
    read -r -a core <<< "$CORES"
    pin=(taskset -c "${core[SLOT % ${#core[@]}]}")
  fi
  echo "$workdir: begins."
  for mode in train evaluate; do
    # ${pin[@]+..}: an empty array is unset for bash before 4.4.
    ${pin[@]+"${pin[@]}"} python -m ism_jax "$mode" --config="$CONFIG:$variant" \
      --workdir="$workdir" --config.seed="$seed" \
      --config.evaluation.seeds="($seed,)" "$@" >> "$workdir.log" 2>&1 < /dev/null || {
      tail -n 20 "$workdir.log" >&2
      echo "Error: $mode of $workdir failed; all it said is in $workdir.log." >&2
      return 255 # xargs starts no other
    }
  done
  echo "$workdir: done."
}
export -f run_one

ensure_env test
mkdir -p "$out"
# The kind of device, then the cores that we may use.
read -r device CORES <<< "$(python -c '
import os, jax
cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
print(jax.default_backend(), *sorted(cores))')"
export CORES
jobs=1
[ "$device" != cpu ] || jobs="$(wc -w <<< "$CORES")"
jobs="${JOBS:-$((jobs))}"
slots=()
if [ "$device" = cpu ] && [ "$jobs" -gt 1 ] && command -v taskset > /dev/null; then
  slots=(--process-slot-var=SLOT)
fi

workdirs=()
todo=() # of each run the words for run_one, then an empty one
for row in "${expanded[@]}"; do
  read -r -a words <<< "$row $flags"
  for seed in ${SEEDS:-0 1}; do
    name="${words[0]}$(printf %s "${words[*]:1}" | tr -cs '[:alnum:]._=' -)"
    # A file's name has 255 bytes.
    [ ${#name} -le 200 ] || name="${name:0:150}-$(cksum <<< "$name" | cut -d ' ' -f 1)"
    workdir="$out/$name-$seed"
    [[ " ${workdirs[*]-} " != *" $workdir "* ]] || continue
    workdirs+=("$workdir")
    todo+=("$(printf '%q ' "$workdir" "$seed" "${words[@]}")")
  done
done
# shellcheck disable=SC2016 # the inner shell expands
printf '%s\0' "${todo[@]}" |
  xargs -0 -n 1 -P "$jobs" ${slots[@]+"${slots[@]}"} bash -c 'eval "run_one $1"' _ || {
  echo "Error: the study is not complete; the runs that failed are named above." >&2
  exit 1
}
python -m ism_jax compare --out="$out" "${workdirs[@]}"
cat "$out/comparison.md"

# shellcheck shell=bash
# Sourced by the scripts beside it: flags of XLA, which ends a process that names one it does not
# know. What is in the environment already comes last, and so wins.
#
#   gpu_flags             sets XLA_FLAGS
#
# There are none for TPUs (they would go into LIBTPU_INIT_ARGS). Those that are often set for
# asynchronous collectives and for data-parallel all-reduces (xla_enable_async_all_gather,
# xla_tpu_enable_async_collective_fusion, xla_tpu_overlap_compute_collective_tc,
# xla_tpu_enable_data_parallel_all_reduce_opt and their like) left train_steps as it was, instruction
# by instruction, when it was compiled ahead of time by libtpu 0.0.52 for a v5e:4x4 (sharded state)
# and for two slices of v5e:2x2 (sharded and replicated). What was tried on SiT-XL/2 is in
# ism_jax/performance/README.md.
gpu_flags() {
  # XLA's default order of a GPU's operations lets collectives wait for what comes before them. This
  # scheduler starts them as early as it can, and computes meanwhile. How much that brings here has
  # not been measured.
  local flags="--xla_gpu_enable_latency_hiding_scheduler=true"
  export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
}

"""Datasets and the input pipeline: from a name to a deterministic, resumable stream of pools."""

from ism_jax.data.pairs import noise_seeds
from ism_jax.data.pipeline import (
  DataConfig,
  all_images,
  check_same,
  directory,
  load_source,
  pools,
  to_unit_range,
)
from ism_jax.data.recipe import resolve

__all__ = [
  "DataConfig",
  "all_images",
  "check_same",
  "directory",
  "load_source",
  "noise_seeds",
  "pools",
  "resolve",
  "to_unit_range",
]

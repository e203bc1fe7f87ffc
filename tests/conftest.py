"""Tests run on 8 forced host devices."""

import tempfile

import jax
import pytest

from configs import digits

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests build the same functions again and again: within one run of pytest each compiles once.
_cache = tempfile.TemporaryDirectory(prefix="ism_jax_compilation_cache_")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def key():
  """A key of its own for every test that asks."""
  return jax.random.key(0)


def tiny_config(variant: str = "ism"):
  """Digits with pools of 4 batches of 64, which split over 8 devices or 4 micro-batches."""
  config = digits.get_config(variant)
  config.update(
    {
      "steps": 8,
      "batch_size": 64,
      "scan_steps": 2,
      "coupling": {"pool_size": 4},
      "optimizer": {"warmup_steps": 2},
      "log": {"every": 4},
      "monitor": {"every": 0},
      "checkpoint": {"every": 4},
    }
  )
  return config

"""Tests run on 8 forced host devices, before JAX starts."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Tests build the same functions again and again: within one run of pytest each compiles once.
_cache = tempfile.TemporaryDirectory(prefix="ism_jax_compilation_cache_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # noqa: E402
import pytest  # noqa: E402

from configs import digits  # noqa: E402


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
      "checkpoint": {"every": 4},
    }
  )
  return config

"""Tests run on 8 forced host devices, before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # noqa: E402
import pytest  # noqa: E402

from configs import digits  # noqa: E402


@pytest.fixture
def key():
  """A key of its own for every test that asks."""
  return jax.random.key(0)


def tiny_config(variant: str = "ism"):
  """Digits with pools of 2 batches of 64: a step on 8 devices, or in 4 micro-batches, in seconds."""
  config = digits.get_config(variant)
  config.update({
      "steps": 8,
      "batch_size": 64,
      "scan_steps": 2,
      "coupling": {"pool_size": 4},
      "optimizer": {"warmup_steps": 2},
      "log": {"every": 4},
      "checkpoint": {"every": 4},
  })
  return config

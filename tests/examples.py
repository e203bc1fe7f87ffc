"""Small runs, networks and samples, and the flags of commands, which many tests need."""

import contextlib
import importlib

from absl import flags
import jax
import numpy as np

from configs import digits
from ism_jax import __main__ as door
from ism_jax import generate, model, paths


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


def random_params(network, shape, seed: int = 0):
  """Nowhere zero, as at the initialisation, and of the size of trained ones: no layer saturates."""
  rng = np.random.default_rng(seed)

  def draw(a):
    scale = 0.7 / np.sqrt(a.shape[-2]) if a.ndim > 1 else 0.1
    return (scale * rng.standard_normal(a.shape)).astype(np.float32)

  return jax.tree.map(
    draw, jax.eval_shape(lambda: model.init_params(jax.random.key(0), network, shape))
  )


def draw_samples(exp, mesh, params, *, num_images, steps, **options):
  """(images [N, H, W, C], labels [N]) by `generate.batches`, all at once."""
  labels = generate.class_labels(exp, num_images)
  drawn = generate.batches(
    exp, mesh, params, labels, schedule=paths.parse_schedule(steps), **options
  )
  return np.concatenate([np.asarray(b.images)[: len(b.labels)] for b in drawn]), labels


@contextlib.contextmanager
def flags_of(name: str):
  """The names of a command's flags, defined while the block lasts."""
  command = door.COMMANDS[name]
  module = importlib.import_module(f"ism_jax.{command.module}")
  before = set(flags.FLAGS)
  try:
    module.define_flags(**({} if command.mode is None else {"mode": command.mode}))
    yield [flag for flag in flags.FLAGS if flag not in before]
  finally:
    for flag in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, flag)

"""Tests run on 8 forced host devices."""

import gc
import importlib.util
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from configs import digits
from ism_jax import generate, model, paths

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests build the same functions again and again: within one run of pytest each compiles once.
_cache = tempfile.TemporaryDirectory(prefix="ism_jax_compilation_cache_")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
  """Forgets what the tests of a file compiled.

  XLA maps the code of every program into memory, and at 65,530 maps, which is what Linux lets a
  process have, it crashes: one process with all tests would come near them.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def key():
  """A key of its own for every test that asks."""
  return jax.random.key(0)


@pytest.fixture(scope="session")
def pytorch():
  """PyTorch, in one thread, beside which torchvision, and so diffusers, can be imported."""
  import torch

  torch.set_num_threads(1)  # two that wait for each other on busy cores are ten times slower
  # PyPI has torchvision for CUDA alone. Beside a CPU build of PyTorch its library does not load,
  # and importing it fails for want of two operators, which nothing here calls.
  library = torch.library.Library("torchvision", "FRAGMENT")
  spec = importlib.util.find_spec("torchvision")
  try:
    for file in pathlib.Path(spec.origin).parent.glob("_C*") if spec else ():
      torch.ops.load_library(file)
  except OSError:
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  yield torch  # while the library is alive


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

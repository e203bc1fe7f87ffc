"""Tests run on 8 forced host devices."""

import gc
import importlib.util
import pathlib
import signal
import tempfile

import jax
import pytest

# A shell starts what runs in the background deaf to Ctrl-C, and so would be all processes that the
# tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

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

"""The input pipeline against scikit-learn's own arrays; killed, concurrent and resumed runs."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ism_jax import data
from ism_jax.data.digits import Digits

SIZE = 1797


def config(directory, **changes):
  values = dict(
    name="digits",
    dir=str(directory),
    image_size=8,
    channels=1,
    num_classes=10,
    seed=0,
    num_threads=2,
  )
  return data.DataConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def source(data_dir):
  return data.load_source(config(data_dir))


@pytest.fixture(scope="session")
def reference():
  """Images as the pools give them, [N, 64] float64, and labels; from scikit-learn alone."""
  digits = load_digits()
  grey = np.floor(digits.data * 255 / 16 + 0.5)
  return grey * 2 / 255 - 1, digits.target


def sorted_rows(images, labels):
  rows = np.concatenate([np.reshape(images, (len(labels), -1)), np.asarray(labels)[:, None]], 1)
  # Integers again, so that rows compare exactly: label and grey levels.
  rows = np.round((rows + 1) * 127.5).astype(np.int64)
  return rows[np.lexsort(rows.T)]


def flat(pool):
  return pool["x1"].reshape(-1, 64), pool["c"].reshape(-1)


def python(code, *args, **env):
  return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env={**os.environ, **env})


def test_all_images_are_scikit_learns_with_their_labels(source, reference):
  images, labels = data.all_images(source)
  assert images.dtype == np.uint8 and images.shape == (SIZE, 8, 8, 1)
  assert labels.dtype == np.int32
  x1 = images.astype(np.float64) / 127.5 - 1
  np.testing.assert_array_equal(sorted_rows(x1, labels), sorted_rows(*reference))


def test_an_epoch_holds_every_image_once_with_its_label(source, reference):
  # 599 batches of 3 are one epoch exactly.
  iterator = data.pools(source, batch_size=3, pool_size=599, seed=1)
  epochs = [flat(next(iterator)) for _ in range(2)]
  for x1, c in epochs:
    np.testing.assert_array_equal(sorted_rows(x1, c), sorted_rows(*reference))
  assert np.mean(epochs[0][1] == epochs[1][1]) < 0.2, "the second epoch comes in the same order"


def test_images_keep_their_grey_levels_in_minus_one_to_one(source, reference):
  pool = next(data.pools(source, batch_size=599, pool_size=3, seed=1))
  assert pool["x1"].dtype == np.float32 and pool["c"].dtype == np.int32
  levels = np.unique(pool["x1"])
  np.testing.assert_allclose(levels, np.unique(reference[0]), atol=1e-7)
  assert levels[0] == -1 and levels[-1] == 1


def test_the_order_is_a_function_of_the_seed(source):
  first, same, other = (
    next(data.pools(source, batch_size=64, pool_size=2, seed=seed, num_threads=threads))
    for seed, threads in ((5, 0), (5, 4), (6, 4))
  )
  np.testing.assert_array_equal(first["x1"], same["x1"])
  np.testing.assert_array_equal(first["c"], same["c"])
  assert not np.array_equal(first["c"], other["c"])


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all_processes_make_the_global_batch(source, processes):
  settings = dict(batch_size=500, pool_size=3, seed=2)
  whole = data.pools(source, **settings)
  parts = [
    data.pools(source, **settings, process_index=p, process_count=processes)
    for p in range(processes)
  ]
  for _ in range(2):  # the second pool crosses an epoch
    expected, rows = next(whole), [next(part) for part in parts]
    for key in ("x1", "c"):
      assert rows[0][key].shape[:2] == (3, 500 // processes)
      np.testing.assert_array_equal(np.concatenate([r[key] for r in rows], axis=1), expected[key])


def test_a_process_reads_its_own_rows_alone(source):
  class Counting:
    def __init__(self):
      self.read = 0

    def __len__(self):
      return len(source)

    def __getitems__(self, keys):
      self.read += len(keys)
      return source.__getitems__(keys)

  counting = Counting()
  settings = dict(batch_size=64, pool_size=2, seed=0, num_threads=0)
  next(data.pools(counting, **settings, process_index=1, process_count=4))
  assert counting.read == 2 * 64 // 4


def test_a_resumed_iterator_continues_bit_exactly_from_its_json(source):
  settings = dict(batch_size=100, pool_size=4, seed=3)
  iterator = data.pools(source, **settings)
  for _ in range(3):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(3)]  # 1,200 to 2,400: over the end of the epoch
  resumed = data.pools(source, **settings, num_threads=0)
  resumed.set_state(state)
  for pool in expected:
    again = next(resumed)
    np.testing.assert_array_equal(again["x1"], pool["x1"])
    np.testing.assert_array_equal(again["c"], pool["c"])
  assert resumed.get_state() == iterator.get_state()


def test_a_run_may_resume_with_other_processes_and_pools(source):
  settings = dict(batch_size=100, seed=3)
  two = [
    data.pools(source, **settings, pool_size=2, process_index=p, process_count=2) for p in range(2)
  ]
  for iterator in two:
    next(iterator)
  assert two[0].get_state() == two[1].get_state()
  one = data.pools(source, **settings, pool_size=1)
  one.set_state(two[0].get_state())
  expected = np.concatenate([next(iterator)["c"] for iterator in two], axis=1)
  for row in expected:
    np.testing.assert_array_equal(next(one)["c"][0], row)


def test_a_batch_may_be_larger_than_the_dataset(source, reference):
  c = next(data.pools(source, batch_size=2 * SIZE + 10, pool_size=1, seed=0))["c"][0]
  for epoch in (c[:SIZE], c[SIZE : 2 * SIZE]):
    np.testing.assert_array_equal(np.bincount(epoch), np.bincount(reference[1]))


def test_an_indivisible_batch_names_the_nearest_that_splits(source):
  with pytest.raises(ValueError, match=r"batch_size=30 .* 4 processes; .* 32"):
    data.pools(source, batch_size=30, pool_size=1, seed=0, process_count=4)


def test_an_unknown_dataset_lists_the_known_ones(tmp_path):
  with pytest.raises(ValueError, match=r"'digit' .*known: digits"):
    data.load_source(config(tmp_path, name="digit"))


def test_a_dataset_of_another_shape_is_refused_before_it_is_prepared(tmp_path):
  with pytest.raises(ValueError, match=r"8x8 images of 1 .* 10 classes.*32x32 images of 3 .* 7 cl"):
    data.load_source(config(tmp_path, image_size=32, channels=3, num_classes=7))
  assert not list(tmp_path.iterdir())


def test_a_killed_preparation_leaves_nothing_that_counts(tmp_path, reference):
  code = """
import os, signal, sys
from ism_jax import data
from ism_jax.data.digits import Digits
generate = Digits._generate_examples
def dying(self):
  for i, example in enumerate(generate(self)):
    if i == 100:
      os.kill(os.getpid(), signal.SIGKILL)
    yield example
Digits._generate_examples = dying
data.load_source(data.DataConfig("digits", sys.argv[1], 8, 1, 10, 0, 0))
"""
  assert python(code, tmp_path).wait(60) == -signal.SIGKILL
  assert list((tmp_path / "digits").iterdir()), "the preparation had not begun"
  _, labels = data.all_images(data.load_source(config(tmp_path)))
  np.testing.assert_array_equal(np.bincount(labels), np.bincount(reference[1]))


def test_the_loser_of_a_race_to_prepare_reads_the_winners_files(tmp_path, monkeypatch, reference):
  generate = Digits._generate_examples
  winner = []

  def overtaken(self):
    monkeypatch.setattr(Digits, "_generate_examples", generate)
    winner.append(data.load_source(config(tmp_path)))
    yield from generate(self)

  monkeypatch.setattr(Digits, "_generate_examples", overtaken)
  late = data.load_source(config(tmp_path))
  assert winner
  for source in (late, *winner):
    np.testing.assert_array_equal(
      np.bincount(data.all_images(source)[1]), np.bincount(reference[1])
    )


def test_neither_preparing_nor_reading_imports_tensorflow(tmp_path):
  # An importable impostor: where TensorFlow is not installed, a guarded import would go unnoticed.
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").touch()
  code = """
import sys
from ism_jax import data
source = data.load_source(data.DataConfig("digits", "", 8, 1, 10, 0, 1))
next(data.pools(source, batch_size=8, pool_size=1, seed=0))
assert "tensorflow" not in sys.modules
"""
  path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", ""), str(tmp_path)])
  # An empty `dir` is TFDS's own default.
  assert python(code, PYTHONPATH=path, TFDS_DATA_DIR=str(tmp_path / "default")).wait(60) == 0
  assert (tmp_path / "default" / "digits").is_dir()

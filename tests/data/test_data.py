"""The input pipeline against scikit-learn's and hand-made arrays; killed and resumed runs."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys

from etils import epath
import numpy as np
from PIL import Image
import pytest
import sklearn.datasets
from sklearn.datasets import load_digits
import tensorflow_datasets as tfds

from ism_jax import data
from ism_jax.data.digits import Digits
from ism_jax.data.photos import draw_places

SIZE = 1797


def config(directory, **changes):
  values = dict(
    name="digits",
    dir=str(directory),
    image_size=8,
    channels=1,
    num_classes=10,
    flip=False,
    seed=0,
    num_threads=2,
    vae="",
  )
  return data.DataConfig(**{**values, **changes})


def photos_config(directory):
  return config(directory, name="photos/crops16", image_size=16, channels=3, num_classes=2)


def cifar10_config(directory):
  return config(directory, name="cifar10", image_size=32, channels=3)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def source(data_dir):
  return data.load_source(config(data_dir))


@pytest.fixture(scope="session")
def reference():
  """Images as the pools give them, [N, 64] float64, and labels; only from scikit-learn."""
  digits = load_digits()
  grey = np.floor(digits.data * 255 / 16 + 0.5)
  return grey * 2 / 255 - 1, digits.target


@pytest.fixture(scope="session")
def photos(data_dir):
  """The crops: {split: (images, labels)}."""
  cfg = photos_config(data_dir)
  return {split: data.all_images(data.load_source(cfg, split)) for split in ("train", "test")}


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
  """A folder with a little `cifar10` as TFDS writes it, in PNGs, and {split: (images, labels)}."""
  rng = np.random.default_rng(0)
  made = {
    split: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.permutation(n) % 10)
    for split, n in (("train", 50), ("test", 20))
  }
  directory = tmp_path_factory.mktemp("cifar10")
  version = tfds.builder_cls("cifar10").VERSION

  with tfds.core.registered.skip_registration():  # TFDS's own code is to read it

    class Cifar10(tfds.core.GeneratorBasedBuilder):
      VERSION = version
      code_path = epath.Path(__file__)

      def _info(self):
        features = {
          "id": tfds.features.Text(),
          "image": tfds.features.Image(shape=(32, 32, 3)),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in made}

      def _generate_examples(self, split):
        for i, (image, label) in enumerate(zip(*made[split], strict=True)):
          # Of a PIL image, TFDS makes a PNG without TensorFlow.
          yield i, {"id": f"{split}{i}", "image": Image.fromarray(image), "label": label}

  Cifar10(data_dir=directory).download_and_prepare(file_format="array_record")
  return directory, made


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
    next(data.pools(source, batch_size=64, pool_size=2, seed=seed, num_threads=threads, flip=True))
    for seed, threads in ((5, 0), (5, 4), (6, 4))
  )
  np.testing.assert_array_equal(first["x1"], same["x1"])
  np.testing.assert_array_equal(first["c"], same["c"])
  assert not np.array_equal(first["c"], other["c"])


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all_processes_make_the_global_batch(source, processes):
  settings = dict(batch_size=500, pool_size=3, seed=2, flip=True)
  whole = data.pools(source, **settings)
  parts = [
    data.pools(source, **settings, rows=rows) for rows in np.split(np.arange(500), processes)
  ]
  for _ in range(2):  # the second pool crosses an epoch
    expected, rows = next(whole), [next(part) for part in parts]
    for key in ("x1", "c"):
      assert rows[0][key].shape[:2] == (3, 500 // processes)
      np.testing.assert_array_equal(np.concatenate([r[key] for r in rows], axis=1), expected[key])


def test_flips_mirror_half_of_the_images_anew_in_every_epoch(source):
  plain, flipped = (
    data.pools(source, batch_size=SIZE, pool_size=1, seed=4, flip=flip) for flip in (False, True)
  )
  coins = []
  for _ in range(2):
    before, after = next(plain), next(flipped)
    np.testing.assert_array_equal(before["c"], after["c"])
    images, seen = (pool["x1"].reshape(SIZE, 8, 8) for pool in (before, after))
    mirrored = np.array([np.fliplr(image) for image in images])
    same, mirror = ((seen == of).all(axis=(1, 2)) for of in (images, mirrored))
    assert (same | mirror).all()
    coins.append(dict(zip((image.tobytes() for image in images), mirror & ~same, strict=True)))
    assert abs(np.mean(mirror & ~same) - 0.5) < 0.05  # 4 standard deviations
  first, second = (np.array([coin[image] for image in coins[0]]) for coin in coins)
  assert abs(np.mean(first == second) - 0.5) < 0.05


def test_a_process_reads_its_own_rows_alone(source):
  class Counting:
    def __init__(self):
      self.count = 0

    def __len__(self):
      return len(source)

    def read(self, keys, mirror):
      self.count += len(keys)
      return source.read(keys, mirror)

  counting = Counting()
  settings = dict(batch_size=64, pool_size=2, seed=0, num_threads=0)
  next(data.pools(counting, **settings, rows=range(16, 32)))
  assert counting.count == 2 * 64 // 4


def test_a_resumed_iterator_continues_bit_exactly_from_its_json(source):
  settings = dict(batch_size=100, pool_size=4, seed=3, flip=True)
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
    data.pools(source, **settings, pool_size=2, rows=range(50 * p, 50 * (p + 1))) for p in range(2)
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


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("digit", r"'digit' .*known: digits, photos/crops16, photos/crops32, .* such as digits\."),
    ("cifar", r"'cifar' .*known: digits, .* such as cifar10, .*Dataset cifar not found"),
    ("photos/crops8", r"known: .*photos/crops16, .*crops8 not found"),
    ("cifar10:1.2.3", r"version 1\.2\.3, only"),
    ("no name", r"known: digits"),
  ],
)
def test_an_unknown_dataset_lists_the_known_ones(tmp_path, name, message):
  with pytest.raises(ValueError, match=message):
    data.load_source(config(tmp_path, name=name))


@pytest.mark.parametrize(
  ("name", "has"),
  [
    ("celeb_a", "'attributes'"),  # no label
    ("imagenet2012", r"shape=\(None, None, 3\)"),  # of all sizes
    ("binarized_mnist", "'image'"),
    ("voc", "'labels'"),
  ],
)
def test_a_dataset_not_of_classified_images_is_refused_with_what_it_has(tmp_path, name, has):
  with pytest.raises(ValueError, match=f"{name}' does not fit.* has .*{has}"):
    data.load_source(config(tmp_path, name=name))


def test_a_dataset_of_another_shape_is_refused_before_it_is_prepared(tmp_path):
  with pytest.raises(ValueError, match=r"8x8 images of 1 .* 10 classes.*32x32 images of 3 .* 7 cl"):
    data.load_source(config(tmp_path, image_size=32, channels=3, num_classes=7))
  assert not list(tmp_path.iterdir())


def test_a_png_dataset_of_tfds_is_read_bit_exactly_without_tensorflow(cifar10):
  directory, made = cifar10
  cfg = cifar10_config(directory)
  for split, (images, labels) in made.items():
    read = data.all_images(data.load_source(cfg, split))
    assert read[0].dtype == np.uint8 and read[0].shape == images.shape
    rows = sorted_rows(read[0] / 127.5 - 1, read[1])
    np.testing.assert_array_equal(rows, sorted_rows(images / 127.5 - 1, labels))
  assert data.directory(cfg) == str(directory / "cifar10")


def test_a_split_that_does_not_exist_lists_those_that_do(cifar10):
  directory, made = cifar10
  cfg = cifar10_config(directory)
  with pytest.raises(ValueError, match=r"'validation'.*\['train', 'test'\]"):
    data.load_source(cfg, "validation")
  assert len(data.load_source(cfg, "train[:20%]")) == len(made["train"][1]) // 5


def test_a_dataset_of_tfds_that_is_not_prepared_says_how_to(tmp_path):
  with pytest.raises(ValueError) as error:
    data.load_source(cifar10_config(tmp_path))
  for part in (
    "TensorFlow",
    "tfds.builder('cifar10', ",
    "file_format='array_record'",
    f"{tmp_path}.",
  ):
    assert part in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_dataset_of_tfds_in_another_format_is_as_good_as_none(cifar10, tmp_path):
  shutil.copytree(cifar10[0], tmp_path, dirs_exist_ok=True)
  (info,) = tmp_path.glob("cifar10/*/dataset_info.json")
  text = info.read_text()
  assert '"array_record"' in text
  info.write_text(text.replace('"array_record"', '"tfrecord"'))
  with pytest.raises(ValueError, match=r"not at .*cifar10/.* as ArrayRecord"):
    data.load_source(cifar10_config(tmp_path))


def test_no_pixel_of_a_test_crop_is_in_a_training_crop(photos, tmp_path, monkeypatch):
  # Photographs in which every pixel tells its place.
  y, x = np.mgrid[:427, :640]
  names = ("china.jpg", "flower.jpg")
  high = y // 256 + x // 256 * 2
  coded = {n: np.stack([y % 256, x % 256, high + 8 * i], -1) for i, n in enumerate(names)}
  with monkeypatch.context() as patch:
    patch.setattr(sklearn.datasets, "load_sample_image", lambda n: coded[n].astype(np.uint8))
    source = {split: data.load_source(photos_config(tmp_path), split) for split in photos}

  folder = os.path.join(os.path.dirname(sklearn.datasets.__file__), "images")
  real = np.stack([np.asarray(Image.open(os.path.join(folder, n))) for n in names])
  covered = {}
  for split, per_class in (("train", 16_384), ("test", 4_096)):
    images, labels = data.all_images(source[split])
    np.testing.assert_array_equal(np.bincount(labels), [per_class, per_class])
    low_y, low_x, high = (images[..., i].astype(int) for i in range(3))
    ys, xs, which = low_y + high % 2 * 256, low_x + high // 2 % 4 * 256, high // 8
    np.testing.assert_array_equal(which, np.broadcast_to(labels[:, None, None], which.shape))
    corner = np.stack([labels, ys[:, 0, 0], xs[:, 0, 0]], axis=1)
    np.testing.assert_array_equal(ys, corner[:, 1, None, None] + np.arange(16)[:, None] + 0 * xs)
    np.testing.assert_array_equal(xs, corner[:, 2, None, None] + np.arange(16) + 0 * ys)
    assert len(np.unique(corner, axis=0)) == 2 * per_class
    for axis in (1, 2):  # crops begin in all rows, and in all columns, about equally often
      times = np.unique(corner[:, axis], return_counts=True)[1]
      assert times.max() < 2.5 * times.mean() and times.min() > times.mean() / 4
    covered[split] = np.zeros((2, 427, 640), bool)
    covered[split][which, ys, xs] = True
    # Another preparation has the same places, of the photographs that come with scikit-learn.
    np.testing.assert_array_equal(photos[split][0], real[which, ys, xs])
    np.testing.assert_array_equal(photos[split][1], labels)
  held_out = np.zeros(640, bool)
  for start in range(40, 640, 60):
    held_out[start : start + 20] = True
  np.testing.assert_array_equal(covered["test"].any(axis=(0, 1)), held_out)
  np.testing.assert_array_equal(covered["train"].any(axis=(0, 1)), ~held_out)


@pytest.mark.parametrize("size", [1, 16, 32, 64])
def test_places_are_all_those_allowed(size):
  mask = np.tile(np.repeat([0, 0, 1], size * 5 // 4), 640)[:640]
  for held_out in (0, 1):
    allowed = {
      (y, x)
      for y in range(70 - size + 1)
      for x in range(640 - size + 1)
      if (mask[x : x + size] == held_out).all()
    }
    places = draw_places(np.random.default_rng(0), (70, 640), size, bool(held_out), len(allowed))
    assert set(map(tuple, places.tolist())) == allowed


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
data.load_source(data.DataConfig("digits", sys.argv[1], 8, 1, 10, False, 0, 0, ""))
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


def test_a_folder_where_nothing_can_be_prepared_is_named_with_the_remedy(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"'digits' is not in .*/tfds.* Set data\.dir, or TFDS_"):
    data.load_source(config(tmp_path / "file" / "tfds"))  # where not even root can write
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # as of a container's user
  with pytest.raises(ValueError, match=r"no home folder.* set data\.dir, TFDS_DATA_DIR"):
    data.load_source(config(""))
  assert [path.name for path in tmp_path.iterdir()] == ["file"]  # and none that is called ~


def test_a_dataset_that_is_prepared_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
  data.load_source(config(tmp_path))
  paths = [tmp_path, *tmp_path.rglob("*")]
  before = {path: path.stat().st_mtime_ns for path in paths}
  source = data.load_source(config(tmp_path))
  assert len(source) == 1797 and [tmp_path, *tmp_path.rglob("*")] == paths
  assert {path: path.stat().st_mtime_ns for path in paths} == before
  (info,) = tmp_path.rglob("dataset_info.json")
  for content in (b"[]", b"{", b"\xff"):
    info.write_bytes(content)
    with pytest.raises(ValueError, match=r"'digits' is not a dataset that can be read.*TFDS says"):
      data.load_source(config(tmp_path))


def test_neither_preparing_nor_reading_imports_tensorflow(tmp_path, cifar10):
  # An importable impostor: where TensorFlow is not installed, a guarded import would go unnoticed.
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").touch()
  code = """
import sys
from ism_jax import data
for values in (("digits", "", 8, 1), ("cifar10", sys.argv[1], 32, 3)):
  source = data.load_source(data.DataConfig(*values, 10, True, 0, 1, ""))
  next(data.pools(source, batch_size=8, pool_size=1, seed=0))
assert "tensorflow" not in sys.modules
"""
  path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", ""), str(tmp_path)])
  # An empty `dir` is TFDS's own default.
  env = dict(PYTHONPATH=path, TFDS_DATA_DIR=str(tmp_path / "default"))
  assert python(code, cifar10[0], **env).wait(60) == 0
  assert (tmp_path / "default" / "digits").is_dir()


def test_data_is_known_by_name_version_and_count_and_not_by_where_it_lies(
  source, cifar10, photos, data_dir, tmp_path
):
  directory, _ = cifar10
  cfg = lambda path: config(path, name="cifar10", image_size=32, channels=3)
  identity = data.load_source(cfg(directory)).identity
  version = tfds.builder_cls("cifar10").VERSION
  assert identity == {"dataset": f"cifar10/{version}", "images": 50}
  shutil.copytree(directory, tmp_path / "moved")
  assert data.load_source(cfg(tmp_path / "moved")).identity == identity
  assert data.load_source(cfg(directory), "train[:40]").identity != identity
  # Ours are made here, and the same everywhere.
  assert source.identity == data.load_source(photos_config(data_dir)).identity == {}


def test_other_data_than_the_checkpoints_is_an_error_unless_it_is_meant(caplog):
  before, now = {"listing": "ab", "images": 50}, {"listing": "cd", "images": 49, "contents": "e"}
  data.check_same(before, before, False)
  message = r"trained on: listing was 'ab', and is 'cd', images was 50, .*may_change=True"
  with pytest.raises(ValueError, match=message):
    data.check_same(before, now, False)
  data.check_same(before, now, True)
  assert "Continuing on other data: listing was 'ab'" in caplog.text
  # What one of them does not say, because it is older, tells nothing.
  data.check_same(before, before | {"contents": "e"}, False)
  data.check_same(before | {"contents": "e"}, before, False)
  with caplog.at_level("INFO", logger="absl"):
    data.check_same(None, now, False)
  assert "checkpoint does not say which data" in caplog.text


def test_of_a_dataset_that_memory_would_not_hold_evenly_spread_images_are_taken(source):
  images, labels = data.all_images(source)
  few, of_few = data.all_images(source, most=65 * 64 - 1)  # bytes of 64 images and a part of one
  rows = np.linspace(0, len(source) - 1, 64).round().astype(int)
  assert rows[0] == 0 and rows[-1] == 1796
  np.testing.assert_array_equal(few, images[rows])
  np.testing.assert_array_equal(of_few, labels[rows])
  np.testing.assert_array_equal(data.all_images(source, most=2**20)[0], images)

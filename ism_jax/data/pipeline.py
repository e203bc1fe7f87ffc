"""From a dataset's name to pools of batches, the unit of work of training.

A dataset is ArrayRecord files, prepared once by a TFDS builder and read at random; no TensorFlow
anywhere. Our own datasets are prepared here, on first use; TFDS's are only read, because preparing
them (encoding an image, for one) does need TensorFlow.

The stream is a function of the seed: epoch e is a permutation and one coin per position, drawn from
(seed, e), epochs follow each other without a gap, and batch b is the positions [b * B, (b + 1) * B)
of that sequence. Processes cut rows out of the global batch, so their number changes who reads an
image and never which batch it is in.
Axes: K batches in a pool, M rows of one process, H/W image size, C channels.
"""

import dataclasses
import difflib
import functools
import os
import sys
import textwrap

import grain
import numpy as np
import tensorflow_datasets as tfds

from ism_jax.data.digits import Digits
from ism_jax.data.photos import Photos

_OWN = (Digits, Photos)  # TFDS finds them by name, as all builders that are imported
_OWN_NAMES = "digits, photos/crops16, photos/crops32"


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which images to train on, and what the model is built for.

  Attributes:
    name: of the dataset: one of ours, or any of TFDS's ("cifar10", "imagenet_resized/32x32") that
      has uint8 images of one size in "image" and classes in "label".
    dir: where TFDS datasets are kept; "" for TFDS's default, TFDS_DATA_DIR or else
      ~/tensorflow_datasets.
    image_size: height and width, in pixels.
    channels: of an image.
    num_classes: of the labels, the null class not counted.
    flip: whether training mirrors every other image, left to right, at random.
    seed: of the shuffle and the flips.
    num_threads: that read and decode in each process; 0 reads when a pool is asked for.
  """

  name: str
  dir: str
  image_size: int
  channels: int
  num_classes: int
  flip: bool
  seed: int
  num_threads: int

  def __post_init__(self):
    for field in ("image_size", "channels", "num_classes"):
      if getattr(self, field) < 1:
        raise ValueError(f"data.{field}={getattr(self, field)} must be at least 1.")
    for field in ("seed", "num_threads"):
      if getattr(self, field) < 0:
        raise ValueError(f"data.{field}={getattr(self, field)} must be at least 0.")


def _builder(cfg):
  try:
    return tfds.builder(cfg.name, data_dir=cfg.dir or None)
  except (ValueError, AssertionError, ImportError) as error:  # the name, config, version or code
    name = cfg.name.partition("/")[0]
    close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
    raise ValueError(
      f"data.name={cfg.name!r} is not a dataset that can be read; known: {_OWN_NAMES}, and TFDS's "
      f"by name or name/config, such as {', '.join(close or ['cifar10', 'mnist'])}. TFDS says: "
      f"{str(error).splitlines()[0]}"
    ) from error


def directory(cfg):
  """The folder of the dataset, with all its versions; what is derived from the data goes there."""
  return os.path.dirname(os.fspath(_builder(cfg).data_path))


def load_source(cfg, split="train"):
  """Opens a split, and prepares the dataset first where it is ours and that has not been done.

  Preparation writes into a folder of its own and renames it when complete. So one that was
  interrupted leaves nothing that counts, and of processes that prepare the same dataset at once
  the first to finish wins. Only file systems rename atomically: prepare a dataset in a bucket from
  one process.

  Args:
    cfg: a DataConfig.
    split: as TFDS writes it: "test", "train[:90%]".
  Returns:
    A random access source of {"image": uint8 [H, W, C], "label": int}, with `__getitems__` to
    read many at once. Records may hold more keys.
  Raises:
    ValueError: the dataset is unknown, not of classified images, not what the model is built for,
      TFDS's and not prepared, or without such a split.
  """
  make = functools.partial(_builder, cfg)
  builder = make()
  _check_fits(cfg, builder.info.features)
  if isinstance(builder, _OWN):
    try:
      builder.download_and_prepare(file_format="array_record")
    except OSError:
      builder = make()  # knows what lies on the disk now
      if not builder.data_path.exists():
        raise
  try:
    return builder.as_data_source(split=split)
  # TFDS raises this for files in another format, and it assumes one where there are none.
  except NotImplementedError as error:
    raise ValueError(
      f"dataset {cfg.name!r} is not at {builder.data_path} as ArrayRecord, and preparing it takes "
      "TensorFlow, which this project does without. In an environment of its own, `pip install "
      'tensorflow-cpu tensorflow-datasets importlib_resources` and `python -c "import '
      f"tensorflow_datasets as tfds; tfds.builder({cfg.name!r}, data_dir='DIR')"
      ".download_and_prepare(file_format='array_record')\"`, with a DIR that does not have it in "
      f"another format. Then set data.dir=DIR, or copy DIR/{builder.name} to "
      f"{builder.data_dir_root}."
    ) from error


def pools(
  source,
  *,
  batch_size,
  pool_size,
  seed,
  flip=False,
  num_threads=4,
  process_index=0,
  process_count=1,
):
  """An endless iterator over pools of training batches, each image exactly once per epoch.

  Args:
    source: random access source of {"image": uint8 [H, W, C], "label": int}, which may hold fewer
      records than a batch.
    batch_size: rows of the global batch, of which process p yields [p * M, (p + 1) * M) with
      M = batch_size / process_count.
    pool_size: batches in a pool, K.
    seed: of the shuffle and the flips.
    flip: see DataConfig; does not change the order.
    num_threads: see DataConfig; does not change what is read.
  Returns:
    A grain DatasetIterator of {"x1": float32 [K, M, H, W, C] in [-1, 1], "c": int32 [K, M]}.
    Its get_state() is a small dict of JSON that counts global batches: the same in every process,
    and valid for another process_count, pool_size, num_threads or flip, but not for another source,
    seed or batch_size, which it does not notice.
  """
  if batch_size < 1 or pool_size < 1:
    raise ValueError(f"batch_size={batch_size} and pool_size={pool_size} must be at least 1.")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index={process_index} must lie in 0 .. {process_count - 1}.")
  if batch_size % process_count:
    nearest = max(1, round(batch_size / process_count)) * process_count
    raise ValueError(
      f"batch_size={batch_size} does not split over {process_count} processes; "
      f"nearest that does: {nearest}."
    )
  rows = batch_size // process_count
  size = len(source)

  # grain's own shuffle works one index at a time, and costs as much again as reading the record.
  @functools.lru_cache(maxsize=2)
  def drawn(epoch):  # [2, size]: keys, and whether to mirror
    rng = np.random.default_rng((seed, epoch))
    return np.stack([rng.permutation(size), flip * rng.integers(2, size=size)])

  def read(batch):
    start = batch * batch_size + process_index * rows
    epochs, places = np.divmod(np.arange(start, start + rows), size)
    parts = [drawn(e)[:, places[epochs == e]] for e in np.unique(epochs)]
    keys, mirror = np.concatenate(parts, axis=1)
    images, labels = _stack(source.__getitems__(keys.tolist()))
    mirror = mirror.astype(bool)
    images[mirror] = images[mirror, :, ::-1]
    return {"x1": to_unit_range(images), "c": labels}

  # One pool is read ahead while the one before it trains.
  options = grain.ReadOptions(num_threads, prefetch_buffer_size=max(pool_size, num_threads))
  batches = grain.MapDataset.range(sys.maxsize).map(read)
  return iter(batches.to_iter_dataset(options).batch(pool_size))


def to_unit_range(images):
  """uint8 0..255 -> float32 in [-1, 1]."""
  return images.astype(np.float32) / 127.5 - 1


def all_images(source):
  """A small dataset whole, in its own order: images uint8 [N, H, W, C] and labels int32 [N]."""
  return _stack(source.__getitems__(range(len(source))))


def _stack(records):
  images = np.stack([r["image"] for r in records])
  return images, np.array([r["label"] for r in records], np.int32)


def _check_fits(cfg, features):
  has = dict(features.items())
  image, label = has.get("image"), has.get("label")
  # TFDS's `dtype` needs TensorFlow.
  if (
    image is None
    or image.np_dtype != np.uint8
    or len(image.shape) != 3
    or None in image.shape
    or not isinstance(label, tfds.features.ClassLabel)
  ):
    raise ValueError(
      f"dataset {cfg.name!r} does not fit: needed are 'image', uint8 [H, W, C] of one size, and "
      f"'label', a ClassLabel. It has {textwrap.shorten(str(features), 500)}."
    )
  found = (*image.shape, label.num_classes)
  wanted = (cfg.image_size, cfg.image_size, cfg.channels, cfg.num_classes)
  if found != wanted:
    describe = "{}x{} images of {} channel(s) in {} classes".format
    raise ValueError(
      f"dataset {cfg.name!r} holds {describe(*found)}, but the model is built for "
      f"{describe(*wanted)}; set data.image_size, data.channels and data.num_classes to the "
      "dataset's, or name another dataset."
    )

"""From a dataset's name to pools of batches, the unit of work of training.

A dataset is ArrayRecord files, prepared once by a TFDS builder and read at random; no TensorFlow
anywhere. The stream is a function of the seed: epoch e is a permutation drawn from (seed, e),
epochs follow each other without a gap, and batch b is the positions [b * B, (b + 1) * B) of that
sequence. Processes cut rows out of the global batch, so their number changes who reads an image
and never which batch it is in.
Axes: K batches in a pool, M rows of one process, H/W image size, C channels.
"""

import dataclasses
import functools
import os
import sys

import grain
import numpy as np

from ism_jax.data.digits import Digits

_BUILDERS = {"digits": Digits}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which images to train on, and what the model is built for.

  Attributes:
    name: of the dataset.
    dir: where TFDS datasets are kept; "" for TFDS's default, TFDS_DATA_DIR or else
      ~/tensorflow_datasets.
    image_size: height and width, in pixels.
    channels: of an image.
    num_classes: of the labels, the null class not counted.
    seed: of the shuffle.
    num_threads: that read and decode in each process; 0 reads when a pool is asked for.
  """

  name: str
  dir: str
  image_size: int
  channels: int
  num_classes: int
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
  if cfg.name not in _BUILDERS:
    raise ValueError(
      f"data.name={cfg.name!r} is not a dataset that can be read; known: "
      f"{', '.join(sorted(_BUILDERS))}."
    )
  return _BUILDERS[cfg.name](data_dir=cfg.dir or None)


def directory(cfg):
  """The folder of the dataset, with all its versions; what is derived from the data goes there."""
  return os.path.dirname(os.fspath(_builder(cfg).data_path))


def load_source(cfg):
  """Opens the training split, and prepares the dataset first where that has not been done.

  Preparation writes into a folder of its own and renames it when complete. So one that was
  interrupted leaves nothing that counts, and of processes that prepare the same dataset at once
  the first to finish wins. Only file systems rename atomically: prepare a dataset in a bucket from
  one process.

  Returns:
    A random access source of {"image": uint8 [H, W, C], "label": int}, with `__getitems__` to
    read many at once.
  Raises:
    ValueError: the dataset is unknown, or not what the model is built for.
  """
  make = functools.partial(_builder, cfg)
  builder = make()
  _check_fits(cfg, builder.info.features)
  try:
    builder.download_and_prepare(file_format="array_record")
  except OSError:
    builder = make()  # knows what lies on the disk now
    if not builder.data_path.exists():
      raise
  return builder.as_data_source(split="train")


def pools(source, *, batch_size, pool_size, seed, process_index=0, process_count=1, num_threads=4):
  """An endless iterator over pools of training batches, each image exactly once per epoch.

  Args:
    source: random access source of {"image": uint8 [H, W, C], "label": int}, which may hold fewer
      records than a batch.
    batch_size: rows of the global batch, of which process p yields [p * M, (p + 1) * M) with
      M = batch_size / process_count.
    pool_size: batches in a pool, K.
    seed: of the shuffle.
    num_threads: see DataConfig; does not change what is read.
  Returns:
    A grain DatasetIterator of {"x1": float32 [K, M, H, W, C] in [-1, 1], "c": int32 [K, M]}.
    Its get_state() is a small dict of JSON that counts global batches: the same in every process,
    and valid for another process_count, pool_size or num_threads, but not for another source, seed
    or batch_size, which it does not notice.
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
  def order(epoch):
    return np.random.default_rng((seed, epoch)).permutation(size)

  def read(batch):
    start = batch * batch_size + process_index * rows
    epochs, places = np.divmod(np.arange(start, start + rows), size)
    keys = np.concatenate([order(e)[places[epochs == e]] for e in np.unique(epochs)])
    images, labels = _stack(source.__getitems__(keys.tolist()))
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
  found = (*features["image"].shape, features["label"].num_classes)
  wanted = (cfg.image_size, cfg.image_size, cfg.channels, cfg.num_classes)
  if found != wanted:
    describe = "{}x{} images of {} channel(s) in {} classes".format
    raise ValueError(
      f"dataset {cfg.name!r} holds {describe(*found)}, but the model is built for "
      f"{describe(*wanted)}; set data.image_size, data.channels and data.num_classes to the "
      "dataset's, or name another dataset."
    )

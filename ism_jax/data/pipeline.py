"""From a dataset's name to pools of batches, the unit of work of training.

A dataset is ArrayRecord files, prepared once and read at random; no TensorFlow anywhere. Images of
a folder and our own datasets are prepared here, on first use; TFDS's are only read. Latents are
made by `ism_jax encode`.

A source is what the stream is drawn from: `len(source)` images, of which source.read(keys, mirror)
gives ({name: array [N, ...]}, labels int32 [N]) for int keys [N] and, bool [N], which of them are
mirrored left to right. Its `identity`, a dict of JSON, says which data it is, wherever it lies;
`classes` are their names, or None where they have numbers alone, and `class_counts` how many of the
N images each class has, or None where nothing says so.

The stream is a function of the seed: epoch e is a permutation and one coin per position, drawn from
(seed, e), epochs follow each other without a gap, and batch b is the positions [b * B, (b + 1) * B)
of that sequence. Processes cut rows out of the global batch, so their number changes who reads an
image and never which batch it is in.
Axes: K batches in a pool, M rows of one process, H/W image size, C channels.
"""

import dataclasses
import functools
import os
import sys
import textwrap
from typing import Annotated

from absl import logging
import grain
import numpy as np
from PIL import ImageColor
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.siscore import labels as imagenet_labels

from ism_jax import ranges
from ism_jax.data import folders, images, latents, published
from ism_jax.pretrained.vae import SD_VAE
from ism_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which images to train on, and what the model is built for.

  Attributes:
    name: of the dataset: one of ours, or any of TFDS's ("cifar10", "imagenet_resized/32x32") that
      has uint8 images of one size in "image" and classes in "label"; "images", those of a folder;
      or "latents", which `python -m ism_jax encode` makes.
    dir: of images, what `images.open_source` takes, or a folder of them that was prepared. Of
      latents, their folder. Otherwise where TFDS datasets are kept; "" for TFDS's default,
      TFDS_DATA_DIR or else ~/tensorflow_datasets.
    image_size: height and width, in pixels, or of a latent; (height, width) where they differ.
    channels: of an image or latent.
    num_classes: of the labels, the null class not counted.
    flip: whether training mirrors every other image, left to right, at random.
    seed: of the shuffle and the flips.
    num_threads: that read and decode in each process; 0 reads when a pool is asked for.
    title: the dataset's name for people, as the title of a model card; "" is `name`.
    vae: of latents, with which the data was encoded and which decodes samples, see
      `pretrained.vae.load`; another name of the same weights will do. "" where the data is pixels.
    vae_scale, vae_shift: what the network sees are `vae_scale` times the latents less `vae_shift`:
      the scaling_factor and shift_factor of the VAE's config.json, which the manifest has, too.
    may_change: whether a run may continue on other data than that of its checkpoint.
    crop: of a folder's images, "centre", which is ADM's, or "resize", which distorts them.
    orient: whether the EXIF orientation of a folder's images is applied.
    background: the colour behind what is transparent in a folder's images, a name or "#rrggbb";
      "" drops alpha without blending, as ADM.
    max_pixels: of an image in a folder; images of more are left out.
    held_out: share of a folder's images that are the split "test", see `folders.split`.
  """

  name: str = dataclasses.field(metadata={"fixed": True})
  dir: str = dataclasses.field(metadata={"learnt": False, "path": True})
  image_size: ranges.Size = dataclasses.field(metadata={"fixed": True})
  channels: Annotated[int, "[1, 64]"] = dataclasses.field(metadata={"fixed": True})
  num_classes: Annotated[int, "[1, 100000]"] = dataclasses.field(metadata={"fixed": True})
  flip: bool = dataclasses.field(metadata={"fixed": True})
  seed: ranges.Seed = dataclasses.field(metadata={"fixed": True})
  num_threads: Annotated[int, "[0, 256]"] = dataclasses.field(metadata={"learnt": False})
  vae: str
  title: str = dataclasses.field(default="", metadata={"learnt": False})
  vae_scale: Annotated[float, "(0, 1000]"] = dataclasses.field(
    default=SD_VAE.scale, metadata={"fixed": True}
  )
  vae_shift: Annotated[float, "[-1000, 1000]"] = dataclasses.field(
    default=SD_VAE.shift, metadata={"fixed": True}
  )
  may_change: bool = False
  crop: Annotated[str, folders.CROPS] = dataclasses.field(
    default="centre", metadata={"fixed": True}
  )
  orient: bool = dataclasses.field(default=True, metadata={"fixed": True})
  background: str = dataclasses.field(default="white", metadata={"fixed": True})
  max_pixels: Annotated[int, "[1, 2^33]"] = dataclasses.field(
    default=folders.MAX_PIXELS, metadata={"learnt": False}
  )
  held_out: Annotated[float, "[0, 0.9]"] = dataclasses.field(default=0.1, metadata={"fixed": True})

  def __post_init__(self):
    ranges.check_fields(self, "data")
    try:
      _ = self.background and ImageColor.getrgb(self.background)
    except ValueError:
      raise ValueError(
        f"data.background={self.background!r} is no colour: give its name, such as white, or "
        '"#rrggbb", or "" to drop alpha.'
      ) from None
    if (self.name == latents.NAME) != bool(self.vae):
      raise ValueError(
        f"data.vae={self.vae!r} does not go with data.name={self.name!r}: {latents.NAME!r} needs "
        'the name of their VAE, such as "stabilityai/sd-vae-ft-mse", and images need "".'
      )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what the network sees."""
    return (*ranges.sides(self.image_size), self.channels)


class Images:
  """Images of one size, as a source; records are {"image", "label"} each."""

  def __init__(self, records, identity: dict, classes, class_counts=None):
    self._records, self.identity = records, identity
    self.classes, self.class_counts = names_of(classes), class_counts

  def __len__(self):
    return len(self._records)

  def read(self, keys, mirror):
    """{"x1": float32 [N, H, W, C] in [-1, 1]} and labels."""
    images, labels = self.stored(keys)
    images[mirror] = images[mirror, :, ::-1]
    return {"x1": to_unit_range(images)}, labels

  def stored(self, keys):
    """Images as they are, uint8 [N, H, W, C], and labels int32 [N]."""
    records = self._records.__getitems__(np.asarray(keys).tolist())
    labels = np.array([record["label"] for record in records], np.int32)
    return np.stack([record["image"] for record in records]), labels


def directory(cfg):
  """The folder of the dataset, with all its versions; what is derived from the data goes there."""
  if cfg.name == latents.NAME:
    return cfg.dir
  if cfg.name == folders.NAME:
    return folders.prepare(cfg.dir, folders.settings_of(cfg))
  return os.path.dirname(os.fspath(published.tfds_builder(cfg.name, cfg.dir).data_path))


def full_name(cfg: DataConfig, source) -> str:
  """The name of a dataset of images with its version: of a folder's, what they show."""
  if cfg.name == folders.NAME:
    return f"{cfg.name}/{source.identity['contents'][:16]}"
  return published.tfds_builder(cfg.name, cfg.dir).info.full_name


def class_names(cfg: DataConfig) -> list[str] | None:
  """`names_of` the classes of a dataset; None, too, where the data is not here."""
  try:
    if cfg.name in (latents.NAME, folders.NAME):
      manifest = os.path.join(cfg.dir, latents.MANIFEST)
      return names_of(files.read_json(manifest, {"classes": [str]}, "")["classes"])
    return names_of(published.tfds_builder(cfg.name, cfg.dir).info.features["label"].names)
  except (OSError, ValueError, KeyError):
    return None


def names_of(classes) -> list[str] | None:
  """The names of classes for people, by label; None where they have numbers alone.

  ImageNet's are in words, such as "tabby, tabby cat".
  """
  names = list(map(images.printable, classes))
  if names == list(map(str, range(len(names)))):
    return None
  return list(imagenet_labels.IMAGENET_LABELS_LIST) if names == _imagenet_ids() else names


def _imagenet_ids() -> list[str]:
  """The WordNet ids of ImageNet's classes, "n01440764" to "n15075141"."""
  return (
    (tfds.core.tfds_path() / "datasets/imagenet2012/labels.txt").read_text(encoding="utf-8").split()
  )


def title(cfg: DataConfig, names: list[str] | None) -> str:
  """The dataset's name for people, of which `class_names` are `names`."""
  if names == imagenet_labels.IMAGENET_LABELS_LIST:
    return "ImageNet"
  # A config for ImageNet may be given another dataset of as many classes.
  return cfg.name if names and cfg.title == "ImageNet" else cfg.title or cfg.name


def load_source(cfg: DataConfig, split="train"):
  """Opens a split as a source, and prepares the dataset first where it is ours and not prepared.

  Preparation writes into a folder of its own and renames it when complete. So one that was
  interrupted leaves nothing that counts, and of processes that prepare the same dataset at once
  the first to finish wins. Only file systems rename atomically: prepare a dataset in a bucket from
  one process.

  Args:
    split: as TFDS writes it: "test", "train[:90%]". Latents only have "train", and a folder's
      images "train" and "test".
  Raises:
    ValueError: the dataset is unknown, not of classified images, not what the model is built for,
      TFDS's and not prepared, or without such a split; latents that are not whole.
  """
  if cfg.name == latents.NAME:
    if split != "train":
      raise ValueError(f"latents have no split {split!r}: set evaluation.reference_split=train.")
    source = latents.Latents(cfg)
    source.classes = names_of(source.classes)
    return source
  if cfg.name == folders.NAME:
    return _load_folder(cfg, split)
  builder = published.tfds_builder(cfg.name, cfg.dir)
  image, label = published.image_and_label(cfg.name, builder.info.features, one_size=True)
  sizes = (*image.shape, label.num_classes)
  wanted = (*cfg.image_shape, cfg.num_classes)
  if sizes != wanted:
    describe = "{}x{} images of {} channel(s) in {} classes".format
    raise ValueError(
      f"dataset {cfg.name!r} holds {describe(*sizes)}, but the model is built for "
      f"{describe(*wanted)}; set data.image_size, data.channels and data.num_classes to the "
      "dataset's, or name another dataset."
    )
  if isinstance(builder, published.OWN):
    try:
      builder.download_and_prepare(file_format="array_record")
    except OSError as error:
      builder = published.tfds_builder(cfg.name, cfg.dir)  # knows what lies on the disk now
      if not builder.data_path.exists():
        raise OSError(
          f"dataset {cfg.name!r} is not in {builder.data_dir_root}, where it cannot be prepared "
          f"either ({error}). Set data.dir, or TFDS_DATA_DIR, to a folder that has it or that can "
          "be written."
        ) from error
  records = published.open_split(builder, split)
  # Ours are the same everywhere.
  is_ours = isinstance(builder, published.OWN)
  identity = {} if is_ours else {"dataset": builder.info.full_name, "images": len(records)}
  return Images(records, identity, label.names)


def _load_folder(cfg: DataConfig, split: str) -> Images:
  settings = folders.settings_of(cfg)
  path = folders.prepare(cfg.dir, settings)
  content = folders.read_manifest(path)
  folders.check_settings(content, settings, path)
  if len(content["classes"]) != cfg.num_classes:
    raise ValueError(
      f"data.dir={cfg.dir} has images of {len(content['classes'])} classes, but data.num_classes="
      f"{cfg.num_classes}. Set it to that, or to -1 in --config, or name another data.dir."
    )
  records = folders.Records(path, content, split, cfg.channels)
  identity = {key: content[key] for key in ("contents", "images", "counts")}
  return Images(records, identity, content["classes"], content["counts"][split])


def check_same(trained_on: dict | None, now: dict, may_change: bool) -> None:
  """Raises ValueError if a run would continue on other data than that of its checkpoint.

  Args:
    trained_on: the `identity` in the checkpoint; None of an older one.
    now: that of the data there is.
    may_change: see DataConfig.
  """
  if trained_on is None:
    if now:
      logging.info("The checkpoint does not say which data it was trained on; this is %s.", now)
    return
  short = lambda value: textwrap.shorten(repr(value), 80, placeholder="...")
  differ = ", ".join(
    f"{key} was {short(value)}, and is {short(now[key])}"
    for key, value in trained_on.items()
    if now.get(key, value) != value  # what only newer data say tells nothing
  )
  if differ and not may_change:
    raise ValueError(
      f"this is not the data that the checkpoint was trained on: {differ}. Set data.dir to that "
      "data, or train in another --workdir; if the change is meant, pass "
      "--config.data.may_change=True."
    )
  if differ:
    logging.warning("Continuing on other data: %s.", differ)


def pools(source, *, batch_size, pool_size, seed, flip=False, num_threads=4, rows=None, seeds=None):
  """An endless iterator over pools of training batches, each image exactly once per epoch.

  Args:
    source: see above; it may hold fewer images than a batch.
    batch_size: rows of the global batch.
    rows: the numbers of those M that this process reads, in order, see `sharding.local_rows`;
      default all.
    pool_size: batches in a pool, K.
    seed, flip, num_threads: see DataConfig; only the seed changes which images a batch has.
    seeds: [N, R] of the noises of each image, see `pairs`, which take turns by epochs; or None.
  Returns:
    A grain DatasetIterator of {"x1": float32 [K, M, H, W, C] in [-1, 1], "c": int32 [K, M]}; of
    latents, of {"moments": float16 [K, M, H, W, 2 C], "c"}, mean and log-variance. With `seeds`,
    also {"seed": int32 [K, M], "mirror": bool [K, M], whether the image is mirrored}.
    Its get_state() is a small dict of JSON that counts global batches: the same in every process,
    and valid for other rows, pool_size, num_threads or flip, but not for another source,
    seed or batch_size, which it does not notice.
  """
  if batch_size < 1 or pool_size < 1:
    raise ValueError(f"batch_size={batch_size} and pool_size={pool_size} must be at least 1.")
  rows = np.arange(batch_size) if rows is None else np.asarray(rows)
  size = len(source)

  # grain's own shuffle works one index at a time, and costs as much again as reading the record.
  @functools.lru_cache(maxsize=2)
  def shuffle(epoch):  # [2, size]: keys, and whether to mirror
    rng = np.random.default_rng((seed, epoch))
    return np.stack([rng.permutation(size), flip * rng.integers(2, size=size)])

  def read(batch):
    epochs, places = np.divmod(batch * batch_size + rows, size)
    parts = [shuffle(e)[:, places[epochs == e]] for e in np.unique(epochs)]
    keys, mirror = np.concatenate(parts, axis=1)
    mirror = mirror.astype(bool)
    arrays, labels = source.read(keys, mirror)
    if seeds is not None:
      arrays |= {"seed": seeds[keys, epochs % seeds.shape[1]], "mirror": mirror}
    return {**arrays, "c": labels}

  # One pool is read ahead while the one before it trains.
  options = grain.ReadOptions(num_threads, prefetch_buffer_size=max(pool_size, num_threads))
  batches = grain.MapDataset.range(sys.maxsize).map(read)
  return iter(batches.to_iter_dataset(options).batch(pool_size))


def to_unit_range(images, dtype=np.float32):
  """uint8 0..255 -> [-1, 1], of NumPy's arrays or of JAX's."""
  return images.astype(dtype) / 127.5 - 1


def all_images(source, most: int | None = None):
  """A dataset whole, in its own order: images uint8 [N, H, W, C] and labels int32 [N].

  Args:
    most: bytes of the images; of a dataset that has more, as many as fit, evenly spread.
  """
  if not isinstance(source, Images):
    raise ValueError(
      "data.name='latents' has no images, only their latents, and what was asked for compares "
      "samples with images: it takes a dataset of images."
    )
  count = len(source)
  if most is not None and count:
    count = max(1, min(count, most // source.stored([0])[0].nbytes))
  if count < len(source):
    logging.warning("%d of %d images are taken, evenly spread.", count, len(source))
  return source.stored(np.linspace(0, len(source) - 1, count).round().astype(int))

"""Images of a folder as a dataset: cropped and split once, in ArrayRecord with a manifest.

A record is an image: its label (int32, little endian) and its pixels (uint8, [H, W, 3], or
[H, W, 1] where they are grey), in the order of the source's list. `manifest.json` says what the
folder holds and which images are held out: the split `test`. Images of the same pixels are in one
split.

A prepared folder is named by the checksum of all that it is made of: the names, sizes and times of
the files, and how they are cropped. The same images are therefore not prepared again, and images
that change are another folder. Which data a run was trained on is told by the pixels alone.
Axes: N images, H/W size, C channels.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from typing import NamedTuple

from absl import logging
from array_record.python import array_record_module
import grain
import numpy as np
from PIL import Image

from ism_jax.data import images, published
from ism_jax.runtime import files, logs

NAME = "images"  # of the dataset, in a config
MANIFEST = "manifest.json"
FORMAT = 1
KIND = "ism_jax images"  # of the manifest
SPLITS = ("train", "test")
CROPS = ("centre", "resize")
MAX_PIXELS = 178_956_970  # of which PIL makes an error by default
FEW = 8  # held-out images that a small set has at least, if they are no more than a fourth
_GREY = np.array([19595, 38470, 7471])  # of 2^16: PIL's, ITU-R 601-2
_OPTIONS = "group_size:1,uncompressed"  # records are read at random
_SHARD_BYTES = 2**28
_AHEAD = 64  # images decoded ahead in each thread


@dataclasses.dataclass(frozen=True)
class Settings:
  """How images are made equal and split: the fields of `DataConfig`."""

  height: int
  width: int
  crop: str
  orient: bool
  background: str
  max_pixels: int
  held_out: float


_NEEDED = {f.name: f.type for f in dataclasses.fields(Settings)} | {
  "kind": str,
  "format": int,
  "channels": int,
  "images": int,
  "title": str,
  "classes": [str],
  "counts": {"train": [int], "test": [int]},
  "held_out_images": str,
  "shards": [int],
  "contents": str,
  "unreadable": {str: str},
}


class _Image(NamedTuple):
  label: int
  pixels: np.ndarray  # uint8 [H, W, 1 or 3]
  digest: bytes
  is_enlarged: bool


def settings_of(cfg) -> Settings:
  """Those of a DataConfig."""
  height, width, _ = cfg.image_shape
  same = ("crop", "orient", "background", "max_pixels", "held_out")
  return Settings(height, width, **{name: getattr(cfg, name) for name in same})


def is_prepared(directory: str) -> bool:
  """Whether a folder is one that `prepare` made."""
  path = os.path.join(directory, MANIFEST)
  try:
    return files.read_json(path, {"kind": str}, "")["kind"] == KIND
  except (OSError, ValueError):
    return False


def prepare(directory: str, settings: Settings) -> str:
  """The folder with the prepared images of a source, which is made where it is not there yet.

  Interrupted, it leaves nothing that counts; of processes that prepare the same images at once the
  first to finish wins.

  Args:
    directory: what `images.open_source` takes; or a folder that was prepared, which is itself.
  Raises:
    ValueError: there is no such source, or none of its images can be read.
    OSError: they cannot be reached, or nothing can be written.
  """
  if not directory:
    raise ValueError(
      f"data.name={NAME!r} needs data.dir: a folder of images, or of class folders; a zip or tar "
      "file of them; or such a folder that was prepared. Set data.dir=FOLDER."
    )
  if is_prepared(directory):
    return directory
  prepared = os.path.join(published.root(""), NAME)
  if not (directory.startswith(images.TFDS) or os.path.exists(directory)):
    raise ValueError(
      f"data.dir={directory}: there is no such file or folder. Set it to a folder or archive of "
      f"images, or to the folder in {prepared} that was prepared of them."
    )
  source = images.open_source(directory, "")
  title = images.printable(images.title(directory))
  name = re.sub(r"[^\w.-]+", "-", title, flags=re.ASCII).strip("-.") or NAME
  folder = f"{name}-{_key(source, settings)[:16]}"
  path = os.path.join(prepared, folder)
  if not is_prepared(path):
    try:
      with _pixel_limit(settings.max_pixels):
        _write(source, settings, title, path)
    except OSError:
      if not is_prepared(path):  # by another process
        raise
  return path


def _key(source: images.Source, settings: Settings) -> str:
  key = hashlib.sha256(
    json.dumps([FORMAT, source.listing, *dataclasses.astuple(settings)]).encode()
  )
  for i in range(source.size):
    status = (-1, 0.0)
    with contextlib.suppress(OSError):  # nor could it be read
      status = source.stat(i)
    key.update(repr(status).encode())
  return key.hexdigest()


@contextlib.contextmanager
def _pixel_limit(most: int):
  """Around decoding: images of more pixels raise."""
  before = Image.MAX_IMAGE_PIXELS
  Image.MAX_IMAGE_PIXELS = most // 2  # PIL warns of these, and refuses twice as many
  try:
    yield
  finally:
    Image.MAX_IMAGE_PIXELS = before


def crop(image: Image.Image, settings: Settings) -> np.ndarray:
  """uint8 [H, W, 3]: the centre of an image, or with crop="resize" all of it, distorted."""
  size = settings.height, settings.width
  if settings.crop == "centre":
    return images.centre_crop(image, size)
  return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def _read(source: images.Source, settings: Settings, i: int) -> tuple[_Image | None, str | None]:
  """(image i, None), or (None, why it cannot be read); raises as `images.attempt`."""

  def convert(item):
    content, label = item
    image = images.decode(content, orient=settings.orient, background=settings.background)
    is_enlarged = image.height < settings.height or image.width < settings.width
    pixels = crop(image, settings)
    grey = pixels[..., :1]
    pixels = np.ascontiguousarray(grey if (pixels == grey).all() else pixels)
    return _Image(label, pixels, hashlib.sha256(pixels).digest(), is_enlarged)

  return images.attempt(source.name(i), functools.partial(source.read, i), convert)


def _write(source: images.Source, settings: Settings, title: str, path: str) -> None:
  """Writes a prepared folder to `path`, whole or not at all."""
  count, threads = source.size, os.cpu_count()
  logging.info(
    f"Preparing {count} images of {len(source.classes)} classes in {path}, once; data.dir may name "
    "it, or a copy of it, as well."
  )
  labels, digests, shards, unreadable = [], [], [], {}
  channels, enlarged, progress = 1, 0, logs.Progress(count)
  per_shard = max(1, _SHARD_BYTES // (3 * settings.height * settings.width))
  read = functools.partial(_read, source, settings)
  items = images.in_order(read, range(count), ahead=_AHEAD * threads, num_threads=threads)
  with files.whole_folder(path) as folder, contextlib.closing(items):
    writer = None
    for i, (image, reason) in enumerate(items):
      progress.add(1, unreadable=image is None)
      if image is None:
        unreadable[source.name(i)] = reason
        continue
      if not shards or shards[-1] == per_shard:
        if writer is not None:
          writer.close()
        shard = os.fspath(folder / _shard_name(len(shards)))
        writer = array_record_module.ArrayRecordWriter(shard, _OPTIONS)
        shards.append(0)
      writer.write(np.int32(image.label).astype("<i4").tobytes() + image.pixels.tobytes())
      shards[-1] += 1
      labels.append(image.label)
      digests.append(image.digest)
      channels = max(channels, image.pixels.shape[-1])
      enlarged += image.is_enlarged
    if writer is None:
      name, reason = next(iter(unreadable.items()))
      raise ValueError(
        f"none of the {count} images could be read; the first is {name}: {reason}. Replace them."
      )
    writer.close()
    held_out, classes = split(digests, labels, settings.held_out), len(source.classes)
    of_split = {
      name: np.bincount(np.array(labels)[held_out == (name == "test")], minlength=classes).tolist()
      for name in SPLITS
    }
    content = dataclasses.asdict(settings) | {
      "title": title,
      "kind": KIND,
      "format": FORMAT,
      "channels": channels,
      "images": len(labels),
      "duplicates": len(labels) - len(set(digests)),
      "enlarged": enlarged,
      "classes": list(map(images.printable, source.classes)),
      "counts": of_split,
      "shards": shards,
      "listing": source.listing,
      "contents": _checksum(digests, labels, held_out),
      "unreadable_count": len(unreadable),
      "unreadable": unreadable,
      "held_out_images": np.packbits(held_out).tobytes().hex(),
    }
    files.write_here(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
  _report(content, path)


def _report(content: dict, path: str) -> None:
  """Logs what was prepared, and what its owner should know of it."""
  counts, classes = content["counts"], content["classes"]
  train, test = map(sum, counts.values())
  logging.info(f"Prepared {train} images to train on, and {test} held out.")
  if unreadable := content["unreadable"]:
    name, reason = next(iter(unreadable.items()))
    logging.warning(
      f"{len(unreadable)} images could not be read and are left out, such as {name} ({reason}); "
      f"{os.path.join(path, MANIFEST)} lists them."
    )
  if empty := [name for name, count in zip(classes, counts["train"], strict=True) if not count]:
    logging.warning(f"{len(empty)} classes have no image that can be read: {', '.join(empty)}.")
  if content["enlarged"]:
    size = f"{content['height']}x{content['width']}"
    logging.warning(
      f"{content['enlarged']} of {content['images']} images are smaller than {size} and were "
      "enlarged: set data.image_size lower if they are many."
    )


def _shard_name(shard: int) -> str:
  return f"images-{shard:05d}.array_record"


def split(digests: list[bytes], labels: list[int], share: float) -> np.ndarray:
  """Which images are held out, bool [N]: by what they show, so that equal ones go together.

  Of the n different images ceil(share n), but at least `FEW` or a fourth of them; never the last of
  a class, and none for share = 0.

  Args:
    digests: checksum of the pixels of each image.
  """
  classes_of = collections.defaultdict(set)  # of an image; copies may lie in several
  for digest, label in zip(digests, labels, strict=True):
    classes_of[digest].add(label)
  left = collections.Counter(label for of_one in classes_of.values() for label in of_one)
  n = len(classes_of)
  most = max(math.ceil(share * n), min(FEW, n // 4)) if share else 0
  out = set()
  for digest in sorted(classes_of):
    if len(out) < most and all(left[label] > 1 for label in classes_of[digest]):
      out.add(digest)
      left.subtract(classes_of[digest])
  return np.array([digest in out for digest in digests])


def _checksum(digests, labels, held_out) -> str:
  """Of the images, their classes and the split."""
  whole = hashlib.sha256()
  for digest, label, out in zip(digests, labels, held_out, strict=True):
    whole.update(digest + int(2 * label + out).to_bytes(8, "little"))
  return whole.hexdigest()


def read_manifest(path: str) -> dict:
  """That of a prepared folder; raises ValueError where it is damaged."""
  manifest, remedy = os.path.join(path, MANIFEST), f"Delete {path}: it is prepared anew."
  content = files.read_json(manifest, _NEEDED, remedy)
  if content["format"] != FORMAT:
    raise ValueError(
      f"{manifest} is of format {content['format']}, and this version reads {FORMAT}. {remedy}"
    )
  n, counts = content["images"], content["counts"]
  whole = len(content["held_out_images"]) == 2 * -(-n // 8) and n == sum(content["shards"])
  whole &= n == sum(map(sum, counts.values())) and min(content["shards"], default=0) > 0
  whole &= all(len(of_split) == len(content["classes"]) for of_split in counts.values())
  if not whole or content["channels"] not in (1, 3):
    raise ValueError(f"{manifest} is damaged: its numbers contradict each other. {remedy}")
  return content


def image_shape(content: dict) -> tuple[int, int, int]:
  """(H, W, C) of the images of a manifest."""
  return content["height"], content["width"], content["channels"]


def check_settings(content: dict, settings: Settings, path: str) -> None:
  """Raises ValueError where a prepared folder is not what a config asks for."""
  wanted = dataclasses.asdict(settings)
  if differ := [n for n in wanted if n != "max_pixels" and content[n] != wanted[n]]:
    say = lambda of: ", ".join(f"{name}={of[name]!r}" for name in differ)
    raise ValueError(
      f"data.dir={path} was prepared with {say(content)}, and the config has {say(wanted)}. Set "
      "data.image_size (height, width) and the other values of data to these, or name the folder "
      "of the images, to prepare them as the config says."
    )


class Records:
  """The images of a split of a prepared folder at random, {"image", "label"} each."""

  def __init__(self, path: str, content: dict, name: str, channels: int):
    """Opens shards, and checks that they are whole.

    Args:
      content: of the manifest.
      name: of the split.
      channels: that images are given with, 1 or 3; colours become grey as PIL makes them.
    """
    if name not in SPLITS:
      raise ValueError(f"{NAME} have no split {name!r}: known are {', '.join(SPLITS)}.")
    if channels not in (1, 3):
      raise ValueError(
        f"data.channels={channels}: images have 3, or 1 that is grey; give one of these, or -1 for "
        "what the images have."
      )
    if not sum(content["counts"][name]):
      raise ValueError(
        f"no image is held out, as data.held_out={content['held_out']} or too few images have it: "
        "set data.held_out=0.1, or add images."
      )
    self._shape, self._channels = image_shape(content)[:2], channels
    self._classes, self._path = len(content["classes"]), path
    packed = np.frombuffer(bytes.fromhex(content["held_out_images"]), np.uint8)
    held_out = np.unpackbits(packed, count=content["images"]).astype(bool)
    self._places = np.flatnonzero(held_out == (name == "test"))
    shards = []
    for i, count in enumerate(content["shards"]):
      shard = os.path.join(path, _shard_name(i))
      if (there := _count(shard)) != count:
        raise ValueError(self._damage(f"{shard} has {there} records, not {count}"))
      shards.append(f"{shard}[0:{count}]")
    self._records = grain.sources.ArrayRecordDataSource(shards)

  def __len__(self):
    return len(self._places)

  def __getitems__(self, keys):
    records = self._records.__getitems__(self._places[keys].tolist())
    return [self._parse(record) for record in records]

  def _parse(self, record: bytes) -> dict:
    label = int.from_bytes(record[:4], "little", signed=True)
    channels, rest = divmod(len(record) - 4, math.prod(self._shape))
    if rest or channels not in (1, 3) or not 0 <= label < self._classes:
      raise ValueError(self._damage(f"a record has {len(record)} bytes and label {label}"))
    pixels = np.frombuffer(record, np.uint8, offset=4).reshape(*self._shape, channels)
    if channels < self._channels:
      pixels = np.repeat(pixels, self._channels, axis=-1)
    elif channels > self._channels:
      pixels = ((pixels @ _GREY + 2**15) >> 16).astype(np.uint8)[..., None]
    return {"image": pixels, "label": label}

  def _damage(self, reason: str) -> str:
    return f"{self._path} is damaged: {reason}. Delete it: it is prepared anew from the images."


def _count(shard: str) -> int:
  """Records of a file; 0 where it is absent or not whole."""
  if not os.path.isfile(shard):
    return 0
  reader = array_record_module.ArrayRecordReader(shard)
  try:
    return reader.num_records()
  except RuntimeError:
    return 0
  finally:
    with contextlib.suppress(RuntimeError):
      reader.close()

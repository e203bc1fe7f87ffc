"""Encoded datasets: moments of a VAE in ArrayRecord shards, with a manifest beside them.

A record is one view of one image: its label (int32) and its moments (float16), little endian. Image
i of a shard has record 2 i, as it is, and record 2 i + 1, mirrored left to right. The last record
of a shard is its trailer, JSON: the settings that all shards of the folder share, and what is in
this one. `manifest.json` says the same of the whole folder, and exists once every shard does.
Axes: N images, H/W image size, h/w latent size, C channels.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import resource
import socket

from absl import logging
from array_record.python import array_record_module
import grain
import numpy as np

from ism_jax import ranges
from ism_jax.pretrained import vae as vae_lib
from ism_jax.runtime import files, logs

NAME = "latents"  # of the dataset, in a config
MANIFEST = "manifest.json"
FORMAT = 1
DOWNSAMPLING = 8  # of the VAE: pixels in a latent's row or column
VIEWS = 2  # as it is, and mirrored
_SHARD = re.compile(r"latents-(\d{5,})-of-\d{5,}\.array_record")
# Records one by one, as they are: they are read at random, and moments do not compress.
_OPTIONS = "group_size:1,uncompressed"
_VERIFIED_TOGETHER = 1024  # records, in each thread
_IDENTITY = ("listing", "contents", "crop", "size", "vae_sha256", "images", "counts")
_SPARE_FILES = 512  # open at the same time as the shards: event files, libraries, sockets


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all shards of a folder share.

  Attributes:
    vae: name of the VAE's weights.
    vae_sha256: checksum of the file of them.
    size: height and width in pixels of the images that were encoded; (height, width) where they
      differ.
    latent_channels: C; moments have twice as many.
    crop: how images came to that size.
    listing: checksum of the source's list of images, see `images.Source`.
    listed: images in the source, readable or not.
    images_per_shard: listed ones in each shard but the last.
    format: version of this layout.
    scaling_factor, shift_factor: of the VAE; the moments are not scaled. Older files, which lack
      them, were trained on with the defaults.
  """

  vae: str
  vae_sha256: str
  size: int | tuple[int, int]
  latent_channels: int
  crop: str
  listing: str
  listed: int
  images_per_shard: int
  format: int = FORMAT
  scaling_factor: float = vae_lib.SD_VAE.scale
  shift_factor: float = vae_lib.SD_VAE.shift

  def __post_init__(self):
    check_size(self.size)
    if self.images_per_shard < 1:
      raise ValueError(f"images_per_shard={self.images_per_shard} must be at least 1.")

  @property
  def shards(self) -> int:
    """How many there are."""
    return -(-self.listed // self.images_per_shard)

  @property
  def moments_shape(self) -> tuple[int, int, int]:
    """[h, w, 2 C]."""
    height, width = ranges.sides(self.size)
    return (height // DOWNSAMPLING, width // DOWNSAMPLING, 2 * self.latent_channels)

  def as_json(self) -> dict:
    """The settings as a file of JSON has them."""
    return dataclasses.asdict(self) | {"size": ranges.size_as_json(self.size)}

  def images_of(self, shard: int) -> range:
    """The places in the source's list of the images of a shard."""
    start = shard * self.images_per_shard
    return range(start, min(start + self.images_per_shard, self.listed))

  def path(self, directory: str, shard: int) -> str:
    """The file of a shard."""
    return os.path.join(directory, f"latents-{shard:05d}-of-{self.shards:05d}.array_record")


# Older files, which lack the factors, were trained on with these.
_FACTORS = {"scaling_factor": vae_lib.SD_VAE.scale, "shift_factor": vae_lib.SD_VAE.shift}
_SETTINGS = {f.name: f.type for f in dataclasses.fields(Settings) if f.name not in _FACTORS}
_SETTINGS["size"] = int | list
# In "source" of newer manifests: the arguments of `images.open_source` where they were encoded.
SOURCE = {"images": str, "tfds_dir": str}
# Shapes of JSON, see `files.parse_json`.
_COUNTED = {"images": int, "unreadable": {str: str}}
_TRAILER = _SETTINGS | _COUNTED | {"shard": int, "counts": {str: int}}
_NEEDED = _SETTINGS | _COUNTED | {"moments": [int], "classes": [str], "counts": [int]}
_NEEDED |= {"unreadable_count": int, "shards": [int]}


def check_size(size: int | tuple[int, int]) -> None:
  """Raises ValueError for a size of images that a VAE does not take."""
  for n in ranges.sides(size):
    if n < 1 or n % DOWNSAMPLING:
      nearest = max(1, round(n / DOWNSAMPLING)) * DOWNSAMPLING
      raise ValueError(
        f"size={n} must be a multiple of {DOWNSAMPLING}, by which the VAE divides it; the nearest "
        f"is {nearest}."
      )


def record_type(moments_shape) -> np.dtype:
  """The bytes of a record."""
  return np.dtype([("label", "<i4"), ("moments", "<f2", tuple(moments_shape))])


class ShardWriter:
  """Writes a shard, under another name until it is whole.

  A context: left by an error, it leaves no shard. What killed processes left is removed.
  """

  def __init__(self, directory: str, settings: Settings, shard: int):
    self._settings, self._shard = settings, shard
    self._path = settings.path(directory, shard)
    self._record = np.zeros((), record_type(settings.moments_shape))
    self._counts = collections.Counter()
    self._unreadable: dict[str, str] = {}
    self._contents: dict[str, str] = {}
    for path in glob.glob(f"{glob.escape(self._path)}.*.tmp"):
      os.remove(path)
    # No other process has this name: should one still be at it, neither renames the other's half.
    self._temporary = f"{self._path}.{socket.gethostname()}-{os.getpid()}.tmp"
    self._writer = array_record_module.ArrayRecordWriter(self._temporary, _OPTIONS)

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    try:
      if kind is None:
        trailer = (
          self._settings.as_json()
          | {
            "shard": self._shard,
            "images": self._counts.total(),
            "counts": {str(label): count for label, count in sorted(self._counts.items())},
            "unreadable": self._unreadable,
          }
          | self._contents
        )
        with self._failing_as_os_error():
          self._writer.write(json.dumps(trailer).encode())
          self._writer.close()
        with open(self._temporary, "rb") as f:
          os.fsync(f.fileno())
        os.replace(self._temporary, self._path)
    finally:
      with contextlib.suppress(RuntimeError):
        self._writer.close()
      with contextlib.suppress(FileNotFoundError):  # renamed
        os.remove(self._temporary)

  def add(self, label: int, moments: np.ndarray) -> None:
    """Writes an image: moments float16 [2, h, w, 2 C], as it is and mirrored."""
    with self._failing_as_os_error():
      for view in moments:
        self._record["label"], self._record["moments"] = label, view
        self._writer.write(self._record.tobytes())
    self._counts[label] += 1

  def add_unreadable(self, name: str, reason: str) -> None:
    """Notes an image that has no record."""
    self._unreadable[name] = reason

  def note_contents(self, contents: np.ndarray) -> None:
    """Notes the fingerprints uint32 [n, 2] of the listed images, readable or not."""
    self._contents = {"contents": contents.astype("<u4").tobytes().hex()}

  @contextlib.contextmanager
  def _failing_as_os_error(self):
    try:
      yield
    except RuntimeError as error:
      raise OSError(
        f"{self._temporary} could not be written: {error}. Make room or choose another folder; the "
        "same command continues with this shard."
      ) from error


def read_trailer(path: str) -> dict | None:
  """The trailer of a shard; None where the file is absent, truncated or none of ours."""
  if not os.path.isfile(path):  # what a FIFO has would be waited for
    return None
  reader = array_record_module.ArrayRecordReader(
    path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
  )
  try:
    if not reader.num_records():  # of a file that is not whole, too
      return None
    content = reader.read([reader.num_records() - 1])[0]
    trailer = files.parse_json(content, path, _TRAILER)
    images = sum(count for label, count in trailer["counts"].items() if label.isdecimal())
    whole = reader.num_records() == VIEWS * images + 1 and images == trailer["images"]
    return trailer if whole else None
  except (RuntimeError, ValueError):
    return None
  finally:
    with contextlib.suppress(RuntimeError):
      reader.close()


def _trailers(paths) -> dict[str, dict | None]:
  with concurrent.futures.ThreadPoolExecutor(32) as pool:
    return dict(zip(paths, pool.map(read_trailer, paths), strict=True))


def finished_shards(directory: str, settings: Settings) -> dict[int, dict]:
  """The trailers of a folder's whole shards, by number; raises ValueError for other settings."""
  matches = [m for name in sorted(os.listdir(directory)) if (m := _SHARD.fullmatch(name))]
  trailers = _trailers([os.path.join(directory, match[0]) for match in matches])
  finished = {}
  for match, trailer in zip(matches, trailers.values(), strict=True):
    if trailer is None:  # damaged since: made again
      continue
    shard = int(match[1])
    if differ := _differences(trailer, settings.as_json() | {"shard": shard}):
      raise ValueError(
        f"{directory} holds shards of another encoding: {match[0]} has {differ}. Choose another "
        "folder for --out, or the images and flags that this one was made with."
      )
    finished[shard] = trailer
  return finished


def _differences(trailer: dict, wanted: dict) -> str:
  """The values of a trailer that are not as in `wanted`: "size=512, not 256"."""
  trailer = _FACTORS | trailer
  return ", ".join(
    f"{name}={trailer.get(name)!r}, not {value!r}"
    for name, value in wanted.items()
    if trailer.get(name) != value and name != "vae"  # the checksum tells, whatever the name
  )


def manifest(settings: Settings, classes, trailers: dict[int, dict], source=None) -> str:
  """The text of `manifest.json` of all shards; raises ValueError if no image was readable.

  Args:
    source: where the images were, see `SOURCE`; None leaves it out.
  """
  ordered = [trailers[shard] for shard in range(settings.shards)]
  unreadable = {name: reason for t in ordered for name, reason in t["unreadable"].items()}
  totals = _totals(ordered, len(classes))
  if not totals["images"]:
    name, reason = next(iter(unreadable.items()))
    raise ValueError(
      f"none of the {len(unreadable)} images could be read; the first is {name}: {reason}. "
      "Replace them."
    )
  content = settings.as_json() | totals
  content |= {
    "moments": settings.moments_shape,
    "classes": list(classes),
    "unreadable": unreadable,
    "unreadable_count": len(unreadable),
  }
  if source is not None:
    content["source"] = source
  if all("contents" in t for t in ordered):  # older shards have none
    contents = "".join(t["contents"] for t in ordered)
    content["contents"] = hashlib.sha256(contents.encode()).hexdigest()
  return json.dumps(content, indent=1) + "\n"


def _totals(trailers, num_classes: int) -> dict:
  """What a manifest says of the images in the shards that have these trailers."""
  count = lambda label: sum(t["counts"].get(str(label), 0) for t in trailers)
  shards = [t["images"] for t in trailers]
  return {"images": sum(shards), "counts": list(map(count, range(num_classes))), "shards": shards}


def read_manifest(directory: str) -> dict:
  """The manifest of an encoded dataset; raises ValueError where there is none."""
  command = "python -m ism_jax encode --images=IMAGES --out=DIR"
  if not directory:
    raise ValueError(
      f"data.name={NAME!r} needs data.dir: the folder of an encoded dataset, which `{command}` "
      "makes. Set data.dir=DIR."
    )
  if "://" in os.fspath(directory):
    raise ValueError(
      f"data.dir={directory} is no folder: mount the bucket on every machine, or put a copy there."
    )
  files.check_utf8("data.dir", directory)
  path = os.path.join(directory, MANIFEST)
  remedy = "Delete it; the command that made it writes it anew."
  try:
    version = files.read_json(path, {"format": int}, remedy)["format"]
    if version != FORMAT:
      raise ValueError(
        f"{path} is of format {version}, and this version reads {FORMAT}: encode anew."
      )
    content = files.read_json(path, _NEEDED, remedy)
  except FileNotFoundError:
    reason = "is unfinished" if os.path.isdir(directory) else "does not exist"
    raise ValueError(
      f"data.dir={directory} {reason}: it has no {MANIFEST}. `{command}` makes or finishes it."
    ) from None
  content = _FACTORS | content
  if wrong := _contradiction(content):
    raise ValueError(f"{path} is damaged: {wrong}. {remedy}")
  return content


def _contradiction(content: dict) -> str:
  """What a manifest promises that it cannot hold itself; its shards tell the rest."""
  try:
    settings = _settings(content)
  except ValueError as error:
    return str(error).rstrip(".")
  count, shape = len(content["shards"]), list(settings.moments_shape)
  if count != settings.shards:
    return f"it lists {count} shards, and {settings.listed} images have {settings.shards}"
  return "" if content["moments"] == shape else f"moments={content['moments']}, not {shape}"


def _settings(content: dict) -> Settings:
  values = {f.name: content[f.name] for f in dataclasses.fields(Settings)}
  if isinstance(values["size"], list):
    files.check_shape(values["size"], [int], "size")
    values["size"] = tuple(values["size"])
  return Settings(**values)


def check_vae(directory: str, vae) -> None:
  """Raises ValueError where the dataset was encoded with other weights than those of `vae`."""
  _check_weights(directory, read_manifest(directory), vae.name, vae.sha256)


def _check_weights(directory, content, name, sha256) -> None:
  encoded = content["vae_sha256"]
  if encoded != sha256:
    raise ValueError(
      f"data.vae={name!r} has weights of sha256 {sha256[:12]}..., but those that encoded "
      f"{directory}, of the VAE {content['vae']!r}, have {encoded[:12]}...: name the weights that "
      "encoded it."
    )


class Latents:
  """The images of an encoded dataset; see `pipeline.load_source`."""

  def __init__(self, cfg):
    """Opens `cfg.dir`; raises ValueError for what is absent, damaged, or not as the DataConfig."""
    content = read_manifest(cfg.dir)
    height, width, channels = content["moments"]
    encoded = (height, width, channels // 2, len(content["classes"]))
    wanted = (*cfg.image_shape, cfg.num_classes)
    encoded += (content["scaling_factor"], content["shift_factor"], content["vae"])
    wanted += (cfg.vae_scale, cfg.vae_shift, cfg.vae)
    # Another name may be that of the same weights, if they are here to be compared.
    sha256 = None if encoded[-1] == wanted[-1] else vae_lib.checksum(cfg.vae)
    if encoded[:-1] != wanted[:-1] or (sha256 is None and encoded[-1] != wanted[-1]):
      describe = (
        "{}x{} latents of {} channels in {} classes, of scaling factor {} and shift factor {}, of "
        "the VAE {!r}"
      ).format
      size = "{}x{}".format(*ranges.sides(content["size"]))
      raise ValueError(
        f"data.dir={cfg.dir} holds {describe(*encoded)} ({size} images), but the config is "
        f"for {describe(*wanted)}. Set data.image_size, data.channels, data.num_classes, "
        "data.vae_scale, data.vae_shift and data.vae to the dataset's, or data.dir to another."
      )
    if sha256 is not None:
      _check_weights(cfg.dir, content, cfg.vae, sha256)
    self._paths = _checked_shards(cfg.dir, content)
    self.identity = {key: content[key] for key in _IDENTITY if key in content}
    self.classes, self.class_counts = content["classes"], content["counts"]
    _allow_open_files(len(self._paths) + _SPARE_FILES)
    self._type, self._classes = record_type(content["moments"]), len(content["classes"])
    self._ends = np.cumsum(content["shards"])  # of each shard, in the dataset's images
    # Without the trailers, image i of the dataset has the records 2 i and 2 i + 1.
    counts = zip(self._paths, content["shards"], strict=True)
    shards = [f"{path}[0:{VIEWS * count}]" for path, count in counts if count]
    self._records = grain.sources.ArrayRecordDataSource(shards)

  def __len__(self):
    return int(self._ends[-1])

  def read(self, keys, mirror):
    """{"moments": float16 [N, h, w, 2 C]} and labels int32 [N], see `pipeline`.

    Raises:
      ValueError: records are damaged, or hold what is no image of the dataset; names their shard.
    """
    places = VIEWS * np.asarray(keys) + np.asarray(mirror)
    try:
      return self._read(places)
    except _UNUSABLE:  # of which shard?
      shards = np.searchsorted(self._ends, places // VIEWS, side="right")
      for shard in np.unique(shards):
        try:
          self._read(places[shards == shard])
        except _UNUSABLE as error:
          raise ValueError(_damage(self._paths[shard], error)) from error
      raise

  def _read(self, places):
    records = self._records.__getitems__(places.tolist())
    moments, labels = _parse(records, self._type, self._classes)
    return {"moments": moments}, labels


_UNUSABLE = (RuntimeError, ValueError, OSError)  # what records that cannot be used raise


def _damage(path: str, error: Exception) -> str:
  reason = str(error).partition("\n")[0]
  return (
    f"{path} is damaged: {reason}. Delete it; the encoding command makes it again, and no others, "
    "and the training command then continues from its last checkpoint. `python -m ism_jax encode "
    f"--verify --out={os.path.dirname(path)}` finds all shards that are damaged."
  )


def _parse(records: list[bytes], kind: np.dtype, num_classes: int):
  """(moments float16 [N, h, w, 2 C], labels int32 [N]); a ValueError for what is no latent."""
  if wrong := {len(record) for record in records} - {kind.itemsize}:
    raise ValueError(f"a record has {min(wrong)} bytes, and {kind.itemsize} are needed")
  rows = np.frombuffer(b"".join(records), kind)
  moments, labels = rows["moments"].copy(), rows["label"].astype(np.int32)
  # As whole numbers, NaN and infinity are the largest of their sign. np.isfinite takes 20 times as
  # long.
  if moments.view(np.int16).max() >= 0x7C00 or moments.view(np.uint16).max() >= 0xFC00:
    raise ValueError("its moments hold NaN or infinity")
  if not 0 <= labels.min() <= labels.max() < num_classes:
    raise ValueError(
      f"its labels run from {labels.min()} to {labels.max()}, and the classes from 0 to "
      f"{num_classes - 1}"
    )
  return moments, labels


def _checked_shards(directory: str, content: dict) -> list[str]:
  """The shards of a folder with this manifest, from one read of each.

  Raises:
    ValueError: some are absent, damaged or of another folder, or hold other images than it says.
  """
  settings = _settings(content)
  paths = [settings.path(directory, shard) for shard in range(settings.shards)]
  trailers = _trailers(paths)
  problems = {
    "missing: {}. The": [path for path in paths if not os.path.exists(path)],
    "truncated or damaged: {}. Delete them; the": [p for p in paths if trailers[p] is None],
  }
  for problem, broken in problems.items():
    if broken:
      first = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
      raise ValueError(
        f"{len(broken)} of {len(paths)} shards are {problem.format(first)} encoding command makes "
        "them again, and no others."
      )
  num_classes = len(content["classes"])
  for shard, (path, trailer) in enumerate(trailers.items()):
    if differ := _differences(trailer, settings.as_json() | {"shard": shard}):
      raise ValueError(
        f"{path} does not belong to the other shards and their {MANIFEST}: it has {differ}. Delete "
        "it; the encoding command makes it again."
      )
    if beyond := [label for label in trailer["counts"] if not 0 <= int(label) < num_classes]:
      raise ValueError(
        f"{path} has images of class {beyond[0]}, and the {num_classes} classes of {MANIFEST} are "
        f"0 to {num_classes - 1}. Delete it; the encoding command makes it again."
      )
  totals = _totals(trailers.values(), num_classes)
  if wrong := [name for name, total in totals.items() if content[name] != total]:
    raise ValueError(
      f"{os.path.join(directory, MANIFEST)} is not that of its shards, which hold "
      f"{totals['images']} images, by their own counts: it has other {' and '.join(wrong)} "
      f"({content['images']} images). Delete it; the encoding command writes it anew, from the "
      "shards that are there."
    )
  return paths


def verify(directory: str, num_threads: int) -> None:
  """Reads every record of an encoded dataset; raises ValueError, naming all shards with damage."""
  content = read_manifest(directory)
  paths, kind = _checked_shards(directory, content), record_type(content["moments"])
  progress = logs.Progress(content["images"])

  def problem(path):
    trailer, held = read_trailer(path), collections.Counter()
    reader = array_record_module.ArrayRecordReader(path)
    try:
      for start in range(0, VIEWS * trailer["images"], _VERIFIED_TOGETHER):
        stop = min(start + _VERIFIED_TOGETHER, VIEWS * trailer["images"])
        _, labels = _parse(reader.read(start, stop), kind, len(content["classes"]))
        if (labels[::VIEWS] != labels[1::VIEWS]).any():
          raise ValueError("an image and its mirror image have two labels")
        held.update(labels[::VIEWS].tolist())
      if {str(label): count for label, count in held.items()} != trailer["counts"]:
        raise ValueError("its labels are not those that its trailer counts")
    except _UNUSABLE as error:
      return str(error).partition("\n")[0]
    finally:
      reader.close()

  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    damaged = {}
    for path, count, reason in zip(paths, content["shards"], pool.map(problem, paths), strict=True):
      progress.add(count)
      if reason is not None:
        damaged[path] = reason
        logging.error("%s is damaged: %s.", path, reason)
  if damaged:
    raise ValueError(
      f"{len(damaged)} of {len(paths)} shards are damaged: {', '.join(damaged)}. Delete them; the "
      "encoding command makes them again, and no others."
    )
  images = content["images"]
  logging.info("All %d images in the %d shards of %s are whole.", images, len(paths), directory)


def _allow_open_files(needed: int) -> None:
  """Raises the process's limit of open files: every shard stays open, and 1,024 is the usual."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY or soft >= needed:
    return
  if hard != resource.RLIM_INFINITY and hard < needed:
    raise ValueError(
      f"the dataset needs {needed} open files, and this process may have {hard}: raise the limit "
      "(ulimit -Hn), or encode with more --images_per_shard."
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

"""Reference statistics: what feature networks see in a set of images, one file for each network.

  python -m ism_jax.statistics --images=IMAGES [--size=256] --out=DIR
  python -m ism_jax.statistics --samples=FILE_OR_FOLDER --out=DIR
  python -m ism_jax.statistics --config=configs/cifar10.py [--split=train] --out=DIR

IMAGES is what `ism_jax.encode` takes; its images are cropped as ADM does, and those that cannot be
read are left out, and listed in the files. Samples are images of one size, taken as they are: an
npz or npy file or a folder, see `samples.open`. A config names a dataset of small images, which are
taken as they are, too.

--networks=inception,dinov2 makes DIR/inception.npz and DIR/dinov2.npz, in one pass over the images.
A file holds the moments mu and sigma, which other tools read, for Inception mu_s and sigma_s
besides, the features of --keep_features images (for KID, precision and recall) and how all of it
was made. Evaluation takes it by evaluation.reference=FILE.

The same command again does nothing. Of several processes the first alone works, on its own devices.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from typing import Any

from absl import app, flags, logging
import jax
from ml_collections import config_flags
import numpy as np

from ism_jax import (
  commands,
  data,
  features,
  logs,
  multihost,
  reference,
  scores,
  sharding,
)
from ism_jax import samples as samples_lib
from ism_jax.data import images as images_lib
from ism_jax.data import pipeline

SPLIT = "train"
SIZE = 256
_BATCHES_AHEAD = 4  # cropped while the devices work
# What a file says and two runs of the same protocol may differ in.
_ONLY_TOLD = ("source", "features", "images", "unreadable", "jax")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """Images of one size, in a fixed order.

  Attributes:
    count: how many are listed, readable or not.
    image_shape: (H, W, C).
    protocol: what they are, for the file: JSON.
    batches: (B, a dict) -> iterator of uint8 [B, H, W, C], the last one shorter. It puts the images
      that cannot be read into the dict, {name: reason}.
  """

  count: int
  image_shape: tuple[int, int, int]
  protocol: dict[str, Any]
  batches: Callable[[int, dict[str, str]], Iterator[np.ndarray]]


def of_images(named: str, tfds_dir: str, size: int, num_threads: int) -> ImageSet:
  """ADM's centre crops, [size, size, 3], of a source, see `images.open_source`."""
  source = images_lib.open_source(named, tfds_dir)
  crop = functools.partial(images_lib.read_crop, source, size)

  def batches(batch_size, unreadable):
    ready = []
    # Threads: PIL decodes, shrinks and resizes without Python's lock.
    with (
      concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
      contextlib.closing(
        images_lib.in_order(pool, crop, range(source.size), _BATCHES_AHEAD * batch_size)
      ) as crops,
    ):
      for found in crops:
        if found.reason is not None:
          unreadable[source.name(found.index)] = found.reason
          continue
        ready.append(found.pixels)
        if len(ready) == batch_size:
          yield np.stack(ready)
          ready = []
    if ready:
      yield np.stack(ready)

  protocol = {
    "source": named,
    "listing": source.listing,
    "listed": source.size,
    "crop": images_lib.CROP,
    "size": size,
  }
  return ImageSet(source.size, (size, size, 3), protocol, batches)


def of_samples(path: str, num_threads: int) -> ImageSet:
  """Images as they are, see `samples.open`; reads all of them once for their checksum."""
  found = samples_lib.open(path, num_threads)
  protocol = {"source": path, "sha256": found.sha256(), "listed": found.count}
  return ImageSet(
    found.count, found.image_shape, protocol, lambda size, unreadable: found.batches(size)
  )


def of_dataset(cfg: pipeline.DataConfig, split: str) -> ImageSet:
  """Images as they are, of a split of the dataset that a config trains on."""
  source = data.load_source(cfg, split)
  if not isinstance(source, pipeline.Images):
    raise ValueError(
      f"data.name={cfg.name!r} has no images, only their latents: name the images that were "
      "encoded by --images, and --size as it was then."
    )
  # With its version, which the config need not name.
  dataset = pipeline.tfds_builder(cfg.name, cfg.dir).info.full_name
  protocol = {"source": dataset, "dataset": dataset, "split": split, "listed": len(source)}

  def batches(batch_size, unreadable):
    for start in range(0, len(source), batch_size):
      yield source.stored(range(start, min(start + batch_size, len(source))))[0]

  image_shape = (cfg.image_size, cfg.image_size, cfg.channels)
  return ImageSet(len(source), image_shape, protocol, batches)


def protocol_of(images: ImageSet, network: features.Network, keep: int) -> dict:
  """What the file of a network's statistics says of how it was made, but for unreadable images."""
  return images.protocol | {
    "network": network.name,
    "weights": network.sha256,
    "features": network.what,
    "keep": min(keep, images.count),
    "jax": jax.__version__,
  }


def compute(
  images: ImageSet, networks, mesh, *, keep: int, batch_size: int
) -> tuple[dict[str, scores.Statistics], dict[str, str]]:
  """({network: statistics}, {image: why it could not be read}) in one pass over the images.

  Args:
    keep: images whose features are kept, evenly spread, at most.
    batch_size: images at a time on each device.
  Raises:
    ValueError: fewer than two images could be read, or one that must be could not.
    OSError: the images' storage fails.
  """
  tallies = {n.name: scores.Tally(n, images.count, keep=keep) for n in networks}
  rows = min(batch_size, -(-images.count // mesh.size)) * mesh.size
  progress, unreadable, told = logs.Progress(images.count), {}, 0
  with (
    contextlib.closing(images.batches(rows, unreadable)) as batches,
    contextlib.closing(_one_ahead(batches)) as ready,
  ):
    for batch, outputs in features.of_batches(networks, mesh, ready):
      for name, tally in tallies.items():
        tally.add(outputs[name])
      new, told = len(unreadable) - told, len(unreadable)
      progress.add(len(batch) + new, unreadable=new)
  if images.count - len(unreadable) < 2:
    name, reason = next(iter(unreadable.items()))
    raise ValueError(
      f"{images.protocol['source']}: {len(unreadable)} of {images.count} images could not be read, "
      f"and statistics need at least 2; the first is {name}: {reason}."
    )
  for tally in tallies.values():
    tally.leave_out(len(unreadable))
  return {name: tally.statistics() for name, tally in tallies.items()}, unreadable


def _one_ahead(batches: Iterator) -> Iterator:
  """The same batches, each made in a thread while the one before it is used."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    following = pool.submit(next, batches, None)
    while (batch := following.result()) is not None:
      following = pool.submit(next, batches, None)
      yield batch


def make(
  images: ImageSet, networks, out: str, *, keep: int, batch_size: int, devices=None
) -> dict[str, str]:
  """Writes the statistics of each network into the folder `out`, but for those that are there.

  Args:
    devices: default all that are local. Others: see `compute`.
  Returns:
    {network: file}
  Raises:
    ValueError: `out` holds statistics of another protocol; or as `compute`.
  """
  files = {n.name: os.path.join(out, f"{n.name}.npz") for n in networks}
  protocols = {n.name: protocol_of(images, n, keep) for n in networks}
  todo = [n for n in networks if not _is_done(files[n.name], protocols[n.name])]
  for network in todo:
    shape = reference.output_shapes(network, images.image_shape)["features"].shape
    if images.count <= shape[-1]:
      logging.warning(
          "%d images do not determine the covariance of the %d features of %s: distances to them "
          "are too large, and compare with no others.", images.count, shape[-1], network.name,
      )  # fmt: skip
  if not todo:
    return files
  mesh = sharding.data_mesh(jax.local_devices() if devices is None else devices)
  found, unreadable = compute(images, todo, mesh, keep=keep, batch_size=batch_size)
  seen = images.count - len(unreadable)
  if unreadable:
    logging.warning(
        "%d of %d images could not be read and are left out, such as %s; the files list them.",
        len(unreadable), images.count, next(iter(unreadable)),
    )  # fmt: skip
  for name, statistics in found.items():
    told = {"images": seen, "unreadable": unreadable}
    reference.write(files[name], statistics, protocols[name] | told)
    logging.info("The statistics of %d images by %s are in %s.", seen, name, files[name])
  return files


def _is_done(path, wanted) -> bool:
  """Whether a file of the wanted protocol is there; raises ValueError for one of another."""
  if not os.path.exists(path):
    return False
  found = reference.read_protocol(path)
  differ = [
    f"{key}={found.get(key)!r}, not {value!r}"
    for key, value in wanted.items()
    if key not in _ONLY_TOLD and found.get(key) != value
  ]
  if differ:
    raise ValueError(
      f"{path} holds statistics of another protocol: {', '.join(differ)}. Choose another --out, or "
      "delete the file."
    )
  logging.info("%s is there already, of the same images and weights.", path)
  return True


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("images", None, "Images to crop: a source that ism_jax.encode takes.")
  flags.DEFINE_string("samples", None, "Images as they are: an npz or npy file, or a folder.")
  config_flags.DEFINE_config_file(
    "config", None, "Config file that names a dataset of images, taken as they are.",
    lock_config=True,
  )  # fmt: skip
  positive = functools.partial(flags.DEFINE_integer, lower_bound=1)
  positive("size", SIZE, "With --images: height and width of the crops, in pixels.")
  flags.DEFINE_string("tfds_dir", "", "With --images=tfds:NAME: its folder; TFDS's default.")
  flags.DEFINE_string("split", SPLIT, "With --config: the dataset's split.")
  flags.DEFINE_string("out", None, "Folder of the files.")
  flags.DEFINE_string(
    "networks", "inception", f"Comma-separated, of {', '.join(features.PUBLISHED)}."
  )
  flags.DEFINE_string(
    "weights", "", "NETWORK=FILE,...; the published ones for others; random for checks."
  )
  flags.DEFINE_integer(
    "keep_features", reference.KEPT, "Images whose features are kept.", lower_bound=0
  )
  positive("batch_size", 64, "Images at a time, on each device.")
  positive("num_threads", os.cpu_count(), "Threads that decode images.")
  flags.mark_flags_as_required(["out"])
  multihost.define_flags()


def _image_set(given) -> ImageSet:
  """The images that the flags name.

  Raises:
    ValueError: they name none, or several, or say what goes with others.
  """
  sources = [name for name in ("images", "samples", "config") if given[name].value is not None]
  if len(sources) != 1:
    raise ValueError(
      f"{' and '.join(f'--{name}' for name in sources) or 'no images'} given: name the images by "
      "one of --images, --samples and --config."
    )
  for name, goes_with in (("size", "images"), ("tfds_dir", "images"), ("split", "config")):
    if given[name].present and goes_with != sources[0]:
      raise ValueError(
        f"--{name} goes with --{goes_with} alone; images of --{sources[0]} are taken as they are."
      )
  if sources[0] == "images":
    return of_images(given.images, given.tfds_dir, given.size, given.num_threads)
  if sources[0] == "samples":
    return of_samples(given.samples, given.num_threads)
  try:
    values = given.config.data
  except OSError as error:  # the flag itself says nothing of a file that is not there
    raise OSError(
      f"--config={given['config'].config_filename} cannot be read: name a file of configs/."
    ) from error
  return of_dataset(data.DataConfig(**values), given.split)


def _network_files(named: str, weights: str) -> dict[str, str]:
  """{network: file of weights, or ""} of the feature networks that the flags name."""
  names = tuple(named.split(","))
  if wrong := [name for name in names if name not in features.PUBLISHED]:
    raise ValueError(
      f"--networks={named}: {wrong[0]!r} is unknown; known are {', '.join(features.PUBLISHED)}."
    )
  if len(set(names)) < len(names):
    raise ValueError(f"--networks={named} names a network twice.")
  return dict.fromkeys(names, "") | features.parse_files("--weights", weights, names)


def main(argv):
  """Makes statistics; see the module's docstring."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}.")
  commands.quiet_libraries()
  given = flags.FLAGS
  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize(*multihost.define_flags()())
    if jax.process_index() != 0:
      return  # and wait for the first
    files = _network_files(given.networks, given.weights)
    files.check_writable(given.out)
    images = _image_set(given)
    networks = tuple(features.published(name, file) for name, file in files.items())
    make(images, networks, given.out, keep=given.keep_features, batch_size=given.batch_size)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=commands.parse_flags)

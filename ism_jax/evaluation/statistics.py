"""Reference statistics: what feature networks see in a set of images, one file for each network.

  python -m ism_jax statistics --images=IMAGES [--size=256] --out=DIR
  python -m ism_jax statistics --samples=FILE_OR_FOLDER --out=DIR
  python -m ism_jax statistics --config=configs/cifar10.py [--split=train] --out=DIR

IMAGES is what `ism_jax encode` takes; its images are cropped as ADM does, and those that cannot be
read are left out, and listed in the files. Samples are images of one size, taken as they are: an
npz or npy file or a folder, see `samples.open`. A config names a dataset of small images, which are
taken as they are, too.

--networks=inception,dinov2 makes DIR/inception.npz and DIR/dinov2.npz, in one pass over the images.
A file holds the moments mu and sigma, which other tools read, for Inception mu_s and sigma_s
besides, the features of --keep_features images (for KID, precision and recall) and how all of it
was made. Evaluation takes it by evaluation.reference=FILE.

The same command again does nothing. Only the first process works, on its own devices.
"""

from collections.abc import Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os

from absl import flags, logging
import jax
from jax.experimental import multihost_utils
from ml_collections import config_flags
import numpy as np

from ism_jax import data, experiment, ranges
from ism_jax.data import images as images_lib
from ism_jax.data import latents, pipeline, recipe, samples
from ism_jax.data.samples import ImageSet
from ism_jax.evaluation import reference, scores
from ism_jax.metrics import features
from ism_jax.pretrained import weights as weights_lib
from ism_jax.protocol import parse_files
from ism_jax.runtime import commands, files, logs, multihost, sharding

_TOGETHER = 64  # images on each device
_BATCHES_AHEAD = 4  # cropped while the devices work
# What a file says and two runs of the same protocol may differ in.
_DESCRIPTIONS = ("source", "features", "images", "unreadable", "jax")


def of_images(named: str, tfds_dir: str, size, num_threads: int) -> ImageSet:
  """ADM's centre crops of a size, see `images.centre_crop`, of a source, see `open_source`."""
  return of_source(named, images_lib.open_source(named, tfds_dir), size, num_threads)


def of_source(named: str, source: images_lib.Source, size, num_threads: int) -> ImageSet:
  """`of_images` of an open source of this name."""
  source, contents = images_lib.noting(source)
  crop, unreadable = functools.partial(images_lib.read_crop, source, size), {}

  def batches(batch_size):
    ahead = _BATCHES_AHEAD * batch_size
    crops = images_lib.in_order(crop, range(source.size), ahead=ahead, num_threads=num_threads)
    with contextlib.closing(crops):
      yield from images_lib.readable_batches(crops, batch_size, source.name, unreadable)

  def protocol():
    unread = np.flatnonzero(~contents.any(axis=1)).tolist()
    read = functools.partial(images_lib.fingerprint_of, source)
    ahead = _BATCHES_AHEAD * num_threads
    with contextlib.closing(
      images_lib.in_order(read, unread, ahead=ahead, num_threads=num_threads)
    ) as fingerprints:
      for i, content in zip(unread, fingerprints, strict=True):
        contents[i] = content
    return {
      "source": named,
      "listing": source.listing,
      "listed": source.size,
      "contents": hashlib.sha256(contents.tobytes()).hexdigest(),
      "crop": images_lib.CROP,
      "size": ranges.size_as_json(size),
    }

  shape = (*ranges.sides(size), 3)
  return ImageSet(named, source.size, shape, batches, protocol, unreadable=unreadable)


def of_dataset(cfg: pipeline.DataConfig, split: str) -> ImageSet:
  """Images as they are, of a split of the dataset that a config trains on."""
  source = data.load_source(cfg, split)
  if not isinstance(source, pipeline.Images):
    raise ValueError(
      f"data.name={cfg.name!r} has no images, only their latents: name the images that were "
      "encoded by --images, and --size as it was then."
    )
  # With its version, which the config need not name.
  dataset = pipeline.full_name(cfg, source)
  protocol = {"source": dataset, "dataset": dataset, "split": split, "listed": len(source)}

  def batches(batch_size):
    for start in range(0, len(source), batch_size):
      yield source.stored(range(start, min(start + batch_size, len(source))))[0]

  return ImageSet(dataset, len(source), cfg.image_shape, batches, lambda: protocol)


def compute(
  images: ImageSet, networks, mesh, *, keep: int, batch_size: int
) -> dict[str, scores.Statistics]:
  """{network: statistics} in one pass over the images, `batch_size` at a time on each device.

  Args:
    keep: the most images whose features the statistics hold, evenly spread.
  Raises:
    ValueError: fewer than two images could be read, or one that must be could not.
    OSError: the images' storage fails.
  """
  tallies = {n.name: scores.Tally(n, images.count, keep=keep) for n in networks}
  rows = min(batch_size, -(-images.count // mesh.size)) * mesh.size
  progress, unreadable, reported = logs.Progress(images.count), images.unreadable, 0
  with (
    contextlib.closing(images.batches(rows)) as batches,
    contextlib.closing(_one_ahead(batches)) as ready,
  ):
    for batch, outputs in features.of_batches(networks, mesh, ready):
      for name, tally in tallies.items():
        tally.add(outputs[name])
      new, reported = len(unreadable) - reported, len(unreadable)
      progress.add(len(batch) + new, unreadable=new)
  if images.count - len(unreadable) < 2:
    name, reason = next(iter(unreadable.items()))
    raise ValueError(
      f"{images.source}: {len(unreadable)} of {images.count} images could not be read, "
      f"and statistics need at least 2; the first is {name}: {reason}. Replace "
      "them."
    )
  for tally in tallies.values():
    tally.leave_out(len(unreadable))
  return {name: tally.statistics() for name, tally in tallies.items()}


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

  As `compute`, on all local devices by default; a ValueError if `out` holds statistics of another
  protocol.

  Returns:
    {network: file}
  """
  paths = {n.name: os.path.join(out, f"{n.name}.npz") for n in networks}
  what_images = functools.cache(images.protocol)

  def protocol(network):
    what = {"network": network.name, "weights": network.sha256, "features": network.what}
    what |= {"keep": min(keep, images.count), "jax": jax.__version__}
    return what_images() | what

  # Where there is no file, contents are noted while they are read, and not before.
  is_done = lambda path, n: os.path.exists(path) and _is_done(path, protocol(n))
  todo = [n for n in networks if not is_done(paths[n.name], n)]
  for network in todo:
    size = reference.output_sizes(network, images.image_shape)["features"]
    if images.count <= size:
      logging.warning(
        f"{images.count} images do not determine the covariance of the {size} features of "
        f"{network.name}: distances to them are too large, and compare with no others."
      )
  if not todo:
    return paths
  mesh = sharding.data_mesh(jax.local_devices() if devices is None else devices)
  statistics = compute(images, todo, mesh, keep=keep, batch_size=batch_size)
  unreadable, readable = images.unreadable, images.count - len(images.unreadable)
  if unreadable:
    logging.warning(
      f"{len(unreadable)} of {images.count} images could not be read and are left out, such as "
      f"{next(iter(unreadable))}; the files list them."
    )
  for network in todo:
    name = network.name
    made = protocol(network) | {"images": readable, "unreadable": unreadable}
    reference.write(paths[name], statistics[name], made)
    logging.info("The statistics of %d images by %s are in %s.", readable, name, paths[name])
  return paths


def _is_done(path, wanted) -> bool:
  """Whether a file is of the wanted protocol; raises ValueError for one of another."""
  protocol = reference.read_protocol(path)
  if "contents" in wanted and "contents" not in protocol:
    logging.info("%s is older, and does not say which contents its images had.", path)
    wanted = {key: value for key, value in wanted.items() if key != "contents"}
  differ = [
    f"{key}={protocol.get(key)!r}, not {value!r}"
    for key, value in wanted.items()
    if key not in _DESCRIPTIONS and protocol.get(key) != value
  ]
  if differ:
    raise ValueError(
      f"{path} holds statistics of another protocol: {', '.join(differ)}. Choose another --out, or "
      "delete the file."
    )
  logging.info("%s is there already, of the same images and weights.", path)
  return True


def for_latents(exp: experiment.Experiment, mesh) -> experiment.Experiment:
  """The experiment with a reference, where its data are latents and the images still there.

  Their statistics are made by the first process, and kept beside the latents, or else in the cache
  of weights. Where the manifest does not say which images were encoded, or these have gone or
  changed, the experiment is returned as it is: `reference.Reference` says what to do.
  """
  ev, names = exp.evaluation, exp.evaluation.network_names()
  if not exp.data.vae or ev.reference or not set(names) <= set(features.PUBLISHED):
    return exp
  try:
    manifest = latents.read_manifest(exp.data.dir)
    where = manifest["source"]
    files.check_shape(where, latents.SOURCE, "source")
  except (KeyError, OSError, ValueError):
    return exp
  networks = tuple(features.published(n, ev.weight_files().get(n, "")) for n in names)
  identity = [manifest[key] for key in ("listing", "contents", "crop", "size") if key in manifest]
  identity += [[n.name, n.sha256] for n in networks]
  key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  out = os.path.join(exp.data.dir, "statistics", key)
  try:
    files.check_writable(out)
  except OSError:
    out = os.path.join(weights_lib.cache(), "statistics", key)
  if jax.process_index() == 0:
    _make_for_latents(manifest, networks, out, mesh)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("statistics of the latents' images")
  paths = {name: os.path.join(out, f"{name}.npz") for name in names}
  if not all(map(os.path.exists, paths.values())):
    return exp
  reference_files = ",".join(f"{name}={path}" for name, path in paths.items())
  return dataclasses.replace(exp, evaluation=dataclasses.replace(ev, reference=reference_files))


def _make_for_latents(manifest: dict, networks, out: str, mesh) -> None:
  """Makes what is missing of the statistics of encoded images, if they are still there."""
  for path in (os.path.join(out, f"{network.name}.npz") for network in networks):
    try:
      if os.path.exists(path):
        reference.read_protocol(path)
    except ValueError as error:  # a cache may never stop a run
      logging.warning("%s Making it anew.", error)
      os.remove(path)
  missing = [n for n in networks if not os.path.exists(os.path.join(out, f"{n.name}.npz"))]
  if not missing:
    return
  where = manifest["source"]
  try:
    source = images_lib.open_source(where["images"], where["tfds_dir"])
  except (OSError, ValueError) as error:
    logging.warning("The images that were encoded are not where they were: %s", error)
    return
  if source.listing != manifest["listing"]:
    logging.warning("%s has other images than were encoded.", where["images"])
    return
  logging.info("Making the reference of the images in %s, once.", where["images"])
  size = manifest["size"] if isinstance(manifest["size"], int) else tuple(manifest["size"])
  images = of_source(where["images"], source, size, os.cpu_count())
  devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  make(images, missing, out, keep=reference.KEPT, batch_size=_TOGETHER, devices=devices)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("images", None, "Images to crop: a source that `encode` takes.")
  flags.DEFINE_string("samples", None, "Images as they are: an npz or npy file, or a folder.")
  text = "Config file that names a dataset of images, taken as they are."
  config_flags.DEFINE_config_file("config", None, text, lock_config=True)
  positive = functools.partial(flags.DEFINE_integer, lower_bound=1, upper_bound=2**20)
  text = "With --images: of the crops, in pixels, or HEIGHTxWIDTH."
  flags.DEFINE(images_lib.SizeParser(), "size", "256", text)
  flags.DEFINE_string("tfds_dir", "", "With --images=tfds:NAME: its folder; TFDS's default.")
  flags.DEFINE_string("split", "train", "With --config: the dataset's split.")
  flags.DEFINE_string("out", None, "Folder of the files.")
  text = f"Comma-separated, of {', '.join(features.PUBLISHED)}."
  flags.DEFINE_string("networks", "inception", text)
  text = "NETWORK=FILE,...; the published ones for others; random for checks."
  flags.DEFINE_string("weights", "", text)
  text = "The most images whose features a file holds."
  flags.DEFINE_integer("keep_features", reference.KEPT, text, lower_bound=0, upper_bound=2**20)
  positive("batch_size", _TOGETHER, "Images at a time, on each device.")
  positive("num_threads", os.cpu_count(), "Threads that decode images.")
  flags.mark_flags_as_required(["out"])
  multihost.define_flags()


def _image_set(args) -> ImageSet:
  """The images that the flags name."""
  sources = [name for name in ("images", "samples", "config") if args[name].value is not None]
  if len(sources) != 1:
    raise ValueError(
      f"{' and '.join(f'--{name}' for name in sources) or 'no images'} given: name the images by "
      "one of --images, --samples and --config."
    )
  for name, goes_with in (("size", "images"), ("tfds_dir", "images"), ("split", "config")):
    if args[name].present and goes_with != sources[0]:
      raise ValueError(
        f"--{name} only goes with --{goes_with}: leave it out. Images of --{sources[0]} are taken "
        "as they are."
      )
  if sources[0] == "images":
    return of_images(args.images, args.tfds_dir, args.size, args.num_threads)
  if sources[0] == "samples":
    return samples.open(args.samples, args.num_threads)
  return of_dataset(experiment.parse(recipe.resolve(args.config)).data, args.split)


def _network_files(named: str, weights: str) -> dict[str, str]:
  """{network: file of weights, or ""} of the feature networks that the flags name."""
  names = tuple(named.split(","))
  if wrong := [name for name in names if name not in features.PUBLISHED]:
    raise ValueError(
      f"--networks={named}: {wrong[0]!r} is unknown; known are {', '.join(features.PUBLISHED)}."
    )
  if len(set(names)) < len(names):
    raise ValueError(f"--networks={named} names a network twice: name each once.")
  return dict.fromkeys(names, "") | parse_files("--weights", weights, names)


def main(argv):
  """Makes statistics; see the module's docstring."""
  args = flags.FLAGS
  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize_from_flags()
    if jax.process_index() != 0:
      return  # and wait for the first
    weights = _network_files(args.networks, args.weights)
    files.check_writable(args.out)
    images = _image_set(args)
    networks = tuple(features.published(name, file) for name, file in weights.items())
    make(images, networks, args.out, keep=args.keep_features, batch_size=args.batch_size)

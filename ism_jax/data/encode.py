"""Encodes classified images to latents, once, for training.

  python -m ism_jax encode --images=IMAGES --out=DIR [--size=256] [--vae=stabilityai/sd-vae-ft-mse]

IMAGES is a folder of class folders or of images, a zip or tar file of these, a folder of class tar
files, ImageNet's ILSVRC2012_img_train.tar, or tfds:NAME with --tfds_dir, a dataset of TFDS prepared
as ArrayRecord.
Classes are numbered by their names' order. Each image is cropped as ADM does, to a square or to
--size=HEIGHTxWIDTH; it and its mirror image become float16 moments in ArrayRecord shards, see
`data/latents.py`, and `manifest.json` says what is there. Training reads DIR by data.name=latents,
data.dir=DIR, data.vae and the sizes.

The same command goes on where one that was stopped or killed was: whole shards are kept, and the
files end up the same byte for byte, as far as the devices compute the same numbers twice. With
several processes, each makes its share of the shards with its own devices. DIR must be one folder
for all of them, on a file system or a mounted bucket. Images that cannot be read are left out, and
listed in the manifest by name and reason.

  python -m ism_jax encode --verify --out=DIR

reads every record of DIR and names the shards that are damaged, or hold what is no latent of a
class.
"""

from collections.abc import Iterator
import contextlib
import functools
import itertools
import os
import time

from absl import app, flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax import data, ranges
from ism_jax.data import images, latents
from ism_jax.pretrained import vae as vae_lib
from ism_jax.pretrained import weights
from ism_jax.runtime import commands, files, logs, multihost, sharding

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_LOOKS = 5.0  # at the shards of other processes
_COMPARED = 4  # images of a finished shard whose contents are read again, whatever their files say
_BATCHES_AHEAD = 4  # decoded while the devices encode


def encode(
  source: images.Source,
  vae: weights.Pretrained,
  out: str,
  *,
  size: int | tuple[int, int],
  batch_size: int,
  images_per_shard: int,
  num_threads: int,
  process_index: int = 0,
  process_count: int = 1,
  devices=None,
) -> latents.Settings:
  """Makes the shards of a process that are not there yet, p, p + P, ...; returns what they share.

  Args:
    out: folder of the shards.
    size: of the crops, see `images.centre_crop`.
    batch_size: images at a time on each device; each shard has batches of its own, padded to this
      size, so that its bytes do not depend on where a run was stopped.
    images_per_shard: listed ones, readable or not.
    process_index, process_count: p, P.
    devices: of this process; default all that are local.
  Raises:
    ValueError: a value is out of range, or `out` holds shards of other settings.
    OSError: `out` cannot be written, or the images' files cannot be reached.
    FloatingPointError: moments are not finite.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1.")
  settings = latents.Settings(
    vae=vae.name,
    vae_sha256=vae.sha256,
    size=size,
    latent_channels=vae.cfg.latent_channels,
    crop=images.CROP,
    listing=source.listing,
    listed=source.size,
    images_per_shard=images_per_shard,
    scaling_factor=vae.cfg.scale,
    shift_factor=vae.cfg.shift,
  )
  make_folder(out)
  shards = range(process_index, settings.shards, process_count)
  finished = latents.finished_shards(out, settings)
  own = {shard: finished[shard] for shard in shards if shard in finished}
  _check_contents(source, out, settings, own, num_threads)
  source, contents = images.noting(source)
  todo = {shard: settings.images_of(shard) for shard in shards if shard not in finished}
  count = sum(map(len, todo.values()))
  logging.info(
    f"{source.size} images of {len(source.classes)} classes in {settings.shards} shards; this "
    f"process makes {len(shards)} and has {count} images to do."
  )
  mesh = sharding.data_mesh(jax.local_devices() if devices is None else devices)
  rows = batch_size * mesh.size
  batches = [listed[i : i + rows] for listed in todo.values() for i in range(0, len(listed), rows)]
  progress = logs.Progress(count)
  with contextlib.closing(_encoded(source, vae, size, batches, rows, mesh, num_threads)) as encoded:
    for shard, listed in todo.items():
      with latents.ShardWriter(out, settings, shard) as writer:
        for crop, moments in itertools.islice(encoded, len(listed)):
          name = source.name(crop.index)
          if crop.reason is not None:
            writer.add_unreadable(name, crop.reason)
          elif np.isfinite(moments).all():
            writer.add(crop.label, moments)
          else:
            raise FloatingPointError(
              f"the moments of {name} are not finite in float16: the VAE's weights are damaged, or "
              "not those of a VAE for images in [-1, 1]. Name others by --vae."
            )
          progress.add(1, unreadable=crop.reason is not None)
        writer.note_contents(contents[listed.start : listed.stop])
  return settings


def _check_contents(source, out, settings, finished: dict[int, dict], num_threads) -> None:
  """Raises ValueError if finished shards are of other images that have the names of the source's.

  Sizes are compared, and the contents of images that have changed since their shard was made, and
  of a few of each shard.
  """
  said = {
    shard: trailer["contents"] for shard, trailer in finished.items() if "contents" in trailer
  }
  if len(said) < len(finished):
    older = len(finished) - len(said)
    logging.info("%d older shards do not say of which contents they were made.", older)

  def first_other(shard) -> str | None:
    made, listed = os.path.getmtime(settings.path(out, shard)), settings.images_of(shard)
    contents = np.frombuffer(bytes.fromhex(said[shard]), "<u4").reshape(-1, 2)
    for i, noted in zip(listed, contents, strict=True):
      is_read = (i - listed.start) % -(-len(listed) // _COMPARED) == 0
      with contextlib.suppress(OSError):  # nor could it be read then
        size, changed = source.stat(i)
        is_read |= changed >= made or (size >= 0 and noted[0] != size % 2**32)
      if is_read and images.fingerprint_of(source, i) != tuple(noted.tolist()):
        return source.name(i)
    return None

  ahead = _BATCHES_AHEAD * num_threads
  answers = images.in_order(first_other, said, ahead=ahead, num_threads=num_threads)
  with contextlib.closing(answers):
    others = {s: name for s, name in zip(said, answers, strict=True) if name is not None}
  if others:
    paths = [settings.path(out, shard) for shard in others]
    raise ValueError(
      f"{len(others)} of {len(finished)} shards in {out} were made of other images of the same "
      f"names, such as {next(iter(others.values()))}. Choose another folder for --out, or delete "
      f"these shards, to make them anew: {', '.join(paths[:5])}{', ...' if paths[5:] else ''}."
    )


def _encoded(source, vae, size, batches, rows, mesh, num_threads) -> Iterator:
  """(crop, moments [2, h, w, 2 C]) of the images of all batches, in order.

  Images are decoded ahead of the devices, and results fetched one batch late.
  """
  params = jax.device_put(vae.params, sharding.replicated(mesh))
  crop = functools.partial(images.read_crop, source, size)
  indices = (i for batch in batches for i in batch)
  crops = images.in_order(crop, indices, ahead=_BATCHES_AHEAD * rows, num_threads=num_threads)

  def start(batch):
    read = [next(crops) for _ in batch]
    pixels = np.zeros((rows, *ranges.sides(size), 3), np.uint8)
    for row, image in enumerate(read):
      if image.pixels is not None:
        pixels[row] = image.pixels
    moments = both_moments(vae.cfg, mesh, params, jax.device_put(pixels, sharding.rows(mesh)))
    return [image._replace(pixels=None) for image in read], moments  # which frees the pixels

  with contextlib.closing(crops):
    started = itertools.chain(map(start, batches), [None])
    for (read, moments), _ in itertools.pairwise(started):
      yield from zip(read, np.asarray(moments).swapaxes(0, 1), strict=False)  # rows are padded


@functools.partial(jax.jit, static_argnames=("cfg", "mesh"))
def both_moments(cfg: vae_lib.VaeConfig, mesh, params, pixels):
  """Moments of images uint8 [N, H, W, 3], as they are and mirrored: float16 [2, N, h, w, 2 C].

  Rows [N] are split over the mesh.
  """
  x = data.to_unit_range(pixels)
  encode_view = functools.partial(vae_lib.encode, cfg, params)
  # One after the other: half of the memory.
  both = jax.lax.map(encode_view, jnp.stack([x, jnp.flip(x, axis=2)]))
  return jax.lax.with_sharding_constraint(both.astype(jnp.float16), sharding.rows(mesh, axis=1))


def make_folder(path: str) -> None:
  """Makes a folder to write to; raises OSError where that cannot be."""
  if "://" in path:
    raise OSError(f"--out={path} is no folder: mount the bucket, and name a folder in it.")
  files.check_utf8("--out", path)
  files.check_writable(path)
  os.makedirs(path, exist_ok=True)


def wait_for_shards(out: str, settings: latents.Settings) -> None:
  """Returns when the shards of all processes are in the folder `out`."""
  last_line = time.monotonic()
  paths = {settings.path(out, shard) for shard in range(settings.shards)}
  while missing := paths - {os.path.join(out, name) for name in os.listdir(out)}:
    if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
      last_line = time.monotonic()
      logging.info(f"Waiting for {len(missing)} shards of other processes, such as {min(missing)}.")
    time.sleep(_SECONDS_BETWEEN_LOOKS)


def write_manifest(
  source: images.Source, out: str, settings: latents.Settings, where: dict | None = None
) -> None:
  """Writes the manifest; raises ValueError if shards are missing or no image was readable.

  Args:
    where: the images are, see `latents.SOURCE`.
  """
  trailers = latents.finished_shards(out, settings)
  if missing := [s for s in range(settings.shards) if s not in trailers]:
    raise ValueError(
      f"{len(missing)} of {settings.shards} shards are missing or damaged, such as "
      f"{settings.path(out, missing[0])}. Run the same command again."
    )
  path = os.path.join(out, latents.MANIFEST)
  files.write_whole(path, latents.manifest(settings, source.classes, trailers, where))
  manifest = latents.read_manifest(out)
  if unreadable := manifest["unreadable"]:
    logging.warning(
      f"{len(unreadable)} of {settings.listed} images could not be read and are left out, such as "
      f"{next(iter(unreadable))}; {path} lists them."
    )
  counts = zip(source.classes, manifest["counts"], strict=True)
  if empty := [name for name, count in counts if not count]:
    logging.warning(f"{len(empty)} classes have no image: {', '.join(empty)}.")
  logging.info(f"{manifest['images']} images of {len(source.classes)} classes are in {out}.")


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("images", None, "Where the images are, see above.")
  flags.DEFINE_string("out", None, "Folder of the latents.")
  positive = functools.partial(flags.DEFINE_integer, lower_bound=1, upper_bound=2**20)
  flags.DEFINE(images.SizeParser(), "size", "256", "Of the crops, in pixels, or HEIGHTxWIDTH.")
  flags.DEFINE_string("vae", vae_lib.PUBLISHED, "A hub name, or a file of weights.")
  flags.DEFINE_string("tfds_dir", "", "With tfds:NAME: its folder; TFDS's default.")
  positive("batch_size", 16, "Images at a time, on each device.")
  positive("images_per_shard", 1024, "Images in a shard.")
  positive("num_threads", os.cpu_count(), "Threads that decode images, in each process.")
  flags.DEFINE_bool("verify", False, "Check every record in --out instead, and make nothing.")
  flags.mark_flags_as_required(["out"])
  multihost.define_flags()


def main(argv):
  """Encodes; see the module's docstring."""
  values = flags.FLAGS
  if values.images is None and not values.verify:
    raise app.UsageError("--images is missing; --help tells what it is.")
  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize_from_flags()
    if values.verify:
      if jax.process_index() == 0:
        latents.verify(values.out, values.num_threads)
      return
    latents.check_size(values.size)
    make_folder(values.out)
    source = images.open_source(values.images, values.tfds_dir)
    settings = encode(
      source,
      vae_lib.load(values.vae),
      values.out,
      size=values.size,
      batch_size=values.batch_size,
      images_per_shard=values.images_per_shard,
      num_threads=values.num_threads,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    if jax.process_index() == 0:
      wait_for_shards(values.out, settings)
      is_path = not values.images.startswith(images.TFDS)
      where = os.path.abspath(values.images) if is_path else values.images
      where = {"images": where, "tfds_dir": values.tfds_dir}
      write_manifest(source, values.out, settings, where)

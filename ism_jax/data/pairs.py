"""The noises of each image of a dataset, of coupling.coupling="classwise": made once, then kept.

An image has R seeds, numbers of noises of its class; see `couplings.class_seeds`. The table of them
is made from the images as they are, of latents from the VAE's means; an image that training mirrors
has the mirrored noise, which leaves its cost as it is.
Axes: N images, in the order of the source, R noises of each.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from ism_jax import couplings
from ism_jax.data import pipeline
from ism_jax.pretrained import vae, weights
from ism_jax.runtime import arrays, files, logs

# Raise it with every change that makes another table: it is part of the file's name.
VERSION = 1
LARGEST = 2**30  # numbers in the images of a class, their scores or noises: 4 GiB of a device
_READ_TOGETHER = 256  # images, in each thread
_UNIT = 64  # classes are padded to a multiple of it, so that few sizes are compiled


def noise_seeds(source, data: pipeline.DataConfig, cfg: couplings.CouplingConfig, keys):
  """The table int32 [N, R] of a source: kept in the dataset's folder, or else made and kept there.

  The first process makes or reads it, and the others are given it. Where the dataset's folder has
  none and cannot be written, or is in a bucket, it is in the cache of weights.

  Args:
    keys: of the run, see `steps.base_keys`: with another seed it is another table.
  Raises:
    ValueError: a class has too many images.
  """
  table = np.zeros((len(source), cfg.class_rounds), np.int32)
  if jax.process_index() == 0:
    table = _kept_or_made(source, data, cfg, keys)
  if jax.process_count() > 1:
    table = np.asarray(multihost_utils.broadcast_one_to_all(table))
  return table


def _kept_or_made(source, data, cfg, keys):
  digest = _digest(source, data, cfg, keys)
  folders = [os.path.join(f, "pairs") for f in (pipeline.directory(data), weights.cache())]
  folders = [folder for folder in folders if "://" not in folder]
  for path in (os.path.join(folder, f"{digest[:16]}.npz") for folder in folders):
    if os.path.exists(path):
      try:
        return _read(path, (len(source), cfg.class_rounds), digest)
      except Exception as error:  # a cache may never stop a run
        logging.warning("The kept pairs %s are no use (%s): making them anew.", path, error)
  table = _make(source, data, cfg, keys)
  try:
    path = os.path.join(_writable(folders), f"{digest[:16]}.npz")
    with files.whole_file(path) as temporary, open(temporary, "wb") as file:
      np.savez(file, seeds=table, digest=digest)
  except OSError as error:
    logging.warning("The pairs could not be kept (%s): the next start makes them again.", error)
  return table


def _writable(folders: list[str]) -> str:
  """The first that can be written, or else the last."""
  for folder in folders[:-1]:
    with contextlib.suppress(OSError):
      files.check_writable(folder)
      return folder
  return folders[-1]


def _digest(source, data, cfg, keys) -> str:
  """Of all that the table depends on."""
  is_read = lambda name: name.startswith("class_") and name != "class_penalty"
  of_class = {name: value for name, value in dataclasses.asdict(cfg).items() if is_read(name)}
  of_data = {
    field.name: getattr(data, field.name)
    for field in dataclasses.fields(data)
    if field.metadata.get("fixed") and field.name not in ("flip", "seed")
  }
  keys = [jax.random.key_data(key).tolist() for key in (keys.noise, keys.pairing)]
  facts = [VERSION, len(source), source.identity, of_data, of_class, keys]
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path, shape, digest):
  held = arrays.headers(path)
  if (held["seeds"].shape, held["seeds"].dtype) != (shape, np.int32):
    raise ValueError(f"it has {held['seeds'].dtype} {held['seeds'].shape}, not int32 {shape}")
  expected = np.asarray(digest)
  if held["digest"].dtype != expected.dtype or arrays.read(path, held["digest"]) != expected:
    raise ValueError("it is that of other data or settings")
  return arrays.read(path, held["seeds"])


def _make(source, data, cfg, keys):
  read = functools.partial(_read_images, source, data)
  with concurrent.futures.ThreadPoolExecutor(max(1, data.num_threads)) as threads:
    labels = _read_all(threads, lambda k: read(k)[1], np.arange(len(source)))
    sizes = np.bincount(labels, minlength=data.num_classes)
    _check_largest(sizes, data, cfg)
    classes = np.flatnonzero(sizes)
    logging.info("Pairing %d images of %d classes with noise, once.", len(labels), len(classes))
    table = np.zeros((len(labels), cfg.class_rounds), np.int32)
    progress, count, gains = logs.Progress(len(labels)), 0, []
    for label in classes:
      members = np.flatnonzero(labels == label)
      x = _read_all(threads, lambda k: read(k)[0], members).reshape(len(members), -1)
      table[members], of_class, gain = _pair_class(x, label, keys, cfg, data.image_shape)
      count, gains = count + of_class, [*gains, gain]
      progress.add(len(members))
  logging.info(
    "The pairs attain a gain of %.4f (1 is optimal); %.3g %% of the noises are other images', for "
    "want of coupling.class_rounds=%d of their own.",
    np.average(gains, weights=sizes[classes]),
    100 * (1 - count / table.size),
    cfg.class_rounds,
  )
  return table


def _check_largest(sizes, data, cfg) -> None:
  each = max(int(np.prod(data.image_shape)), cfg.class_batch, 2 * cfg.class_rounds)
  if sizes.max() * each > LARGEST:
    raise ValueError(
      f"class {sizes.argmax()} has {sizes.max()} images, and coupling.coupling='classwise' takes "
      f"{LARGEST // each} of data.image_size={data.image_size} with coupling.class_batch="
      f"{cfg.class_batch} and class_rounds={cfg.class_rounds}: set coupling.coupling=ot, or train "
      "on classes of fewer images."
    )


def _read_all(threads, read, keys):
  """read(some of the keys) of all, in order."""
  starts = range(0, len(keys), _READ_TOGETHER)
  return np.concatenate(list(threads.map(lambda i: read(keys[i : i + _READ_TOGETHER]), starts)))


def _read_images(source, data, keys):
  """(images [N, H, W, C] as the network sees them, of latents their means, labels [N])."""
  images, labels = source.read(keys, np.zeros(len(keys), bool))
  if not data.vae:
    return images["x1"], labels
  no_noise = np.zeros((len(keys), *data.image_shape), np.float32)
  factors = data.vae_scale, data.vae_shift
  return np.asarray(vae.sample_latent(images["moments"], no_noise, *factors)), labels


def _pair_class(x, label, keys, cfg, shape):
  """(seeds [n, R], how many of them the images were given, attained gain) of images x [n, D]."""
  pad = -len(x) % _UNIT
  is_image = np.arange(len(x) + pad) < len(x)
  x = np.pad(couplings.standardise(x), ((0, pad), (0, 0)))
  seeds, counts, gain = _pair_padded(x, is_image, np.int32(label), keys, shape, cfg)
  return np.asarray(seeds)[is_image], int(np.asarray(counts)[is_image].sum()), float(gain)


@functools.partial(jax.jit, static_argnames=("shape", "cfg"))
def _pair_padded(x, is_image, label, keys, shape, cfg):
  key_duals, key_ties = jax.random.split(jax.random.fold_in(keys.pairing, label))
  g = couplings.class_duals(x, jnp.asarray(is_image), key_duals, cfg)
  return couplings.class_seeds(x, is_image, g, label, keys.noise, key_ties, shape, cfg)

"""A judge of small labelled images: a classifier whose penultimate layer gives features.

Inception has nothing to say about 8x8 digits. The judge is trained on the data set itself, in
seconds on a CPU; its accuracy on images that it did not see says whether its opinion counts. Its
numbers compare runs on one data set, by one and the same judge, and nothing else.

Axes: N images, H/W size, C channels, F features.
"""

import dataclasses
import functools
import hashlib
import os
from typing import Any

from absl import logging
from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ism_jax.data import to_unit_range
from ism_jax.runtime import arrays, files

# Raise it with every change that trains another judge: it is part of the cache's name.
VERSION = 1
NUM_FEATURES = 64

HELD_OUT = 0.2
_STEPS = 1000
_BATCH = 128
_OPTIMIZER = optax.adamw(optax.cosine_decay_schedule(3e-3, _STEPS), weight_decay=1e-2)
# Smoothed labels keep the best logits finite, and so the features of the training images in range.
# On the digits they raised held-out accuracy from 0.983 and 0.986 to 0.994 and 0.992 (seeds 0, 1),
# and no unit died; without them one nearly did (standard deviation 0.017).
_LABEL_SMOOTHING = 0.1
_EVAL_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Judge:
  """A trained classifier."""

  params: Any  # nested dict of arrays
  held_out_accuracy: float  # on images that it was not trained on
  image_shape: tuple[int, int, int]  # (H, W, C)
  num_classes: int


class _Classifier(nn.Module):
  num_classes: int

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Conv(32, (3, 3))(x))
    x = nn.gelu(nn.Conv(64, (3, 3), strides=2)(x))
    x = x.reshape(len(x), -1)
    # GELU, not ReLU: a unit that is dead on the data makes the covariance of the features singular.
    features = nn.gelu(nn.Dense(NUM_FEATURES)(x))
    return features, nn.Dense(self.num_classes)(features)


class _RandomNetwork(nn.Module):
  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=nn.initializers.orthogonal(2))
    x = first = nn.gelu(conv(32)(x))
    x = second = nn.gelu(conv(64, strides=2)(x))
    last = nn.gelu(conv(32, strides=2)(x))
    h, w = last.shape[1] // 2, last.shape[2] // 2
    quadrants = [last[:, i : i + h, j : j + w] for i in (0, h) for j in (0, w)]
    return jnp.concatenate([a.mean((1, 2)) for a in (first, second, *quadrants)], axis=-1)


def judge_features(judge, images):
  """(features [N, 64], probabilities [N, num_classes]), of uint8 [N, H, W, C]: NumPy arrays."""
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.shape[1:] != judge.image_shape:
    raise ValueError(
      f"got {images.dtype} images of shape {images.shape}; "
      f"this judge needs uint8 of shape [N, *{judge.image_shape}]."
    )
  # Every batch has one size, so that the network is compiled once; there is one at least.
  padding = _EVAL_BATCH - len(images) % _EVAL_BATCH
  batches = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
  batches = batches.reshape(-1, _EVAL_BATCH, *judge.image_shape)
  outputs = (_forward(judge.params, batch, judge.num_classes) for batch in batches)
  return tuple(np.concatenate(a)[: len(images)] for a in zip(*outputs, strict=True))


def classify(params, images, num_classes):
  """(features [B, 64], logits [B, num_classes]) of a judge for uint8 [B, H, W, C]: pure."""
  return _Classifier(num_classes).apply({"params": params}, to_unit_range(images))


def random_params(image_shape):
  """Parameters of `random_features` for images [H, W, C], the same for ever."""
  return _RandomNetwork().init(jax.random.key(0), jnp.zeros((1, *image_shape)))


def random_features(params, images):
  """Fixed features: a convolutional network at random weights.

  Of uint8 [B, H, W, C], float32 [B, 32 + 64 + 4 * 32]: three GELU layers of 3x3 convolutions, of
  strides 1, 2 and 2; the means over the image of the first two, and the last one's over each
  quadrant. A network that was never trained sees every frequency; a classifier may ignore what does
  not tell the classes apart.
  """
  return _RandomNetwork().apply(params, to_unit_range(images))


def train_judge(images, labels, *, num_classes, seed=0):
  """Trains a judge on 80 % of images uint8 [N, H, W, C], of labels [N] in [0, num_classes).

  On one machine the same seed gives the same judge.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(
      f"got {images.dtype} images of shape {images.shape}; needed are uint8 [N, H, W, C]."
    )
  if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f"got {labels.dtype} labels of shape {labels.shape} for {len(images)} images; "
      "needed is one integer each."
    )
  if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
    raise ValueError(
      f"labels run from {labels.min()} to {labels.max()}; "
      f"num_classes={num_classes} allows 0 to {num_classes - 1}."
    )
  train, held_out = stratified_split(labels, seed)
  if not len(held_out):
    raise ValueError(f"{len(labels)} images leave none to hold out; give 5 or more of every class.")
  key_init, key_steps = jax.random.split(jax.random.key(seed))
  image_shape = images.shape[1:]
  params = _init(key_init, image_shape, num_classes)
  opt_state = _OPTIMIZER.init(params)
  train_images, train_labels = jnp.asarray(images[train]), jnp.asarray(labels[train], jnp.int32)
  for step in range(_STEPS):
    key = jax.random.fold_in(key_steps, step)
    params, opt_state = _train_step(params, opt_state, train_images, train_labels, key, num_classes)
  judge = Judge(jax.tree.map(np.asarray, params), float("nan"), image_shape, num_classes)
  _, probabilities = judge_features(judge, images[held_out])
  accuracy = np.mean(probabilities.argmax(axis=1) == labels[held_out])
  return dataclasses.replace(judge, held_out_accuracy=float(accuracy))


def load_judge(images, labels, *, num_classes, cache_dir):
  """The judge of this data set (seed 0): read from cache_dir, or trained and written there.

  The file is named by a hash of the images, the labels and `VERSION`, and holds it. A file that
  cannot be read, or is another's under this name, is reported and replaced.
  """
  facts = repr((VERSION, images.shape, num_classes)).encode() + images.tobytes()
  digest = hashlib.sha256(facts + labels.astype(np.int32).tobytes()).hexdigest()
  path = os.path.join(cache_dir, f"judge-{digest[:16]}.npz")
  if os.path.exists(path):
    try:
      return _read(path, images.shape[1:], num_classes, digest)
    # A cache may never stop a run, and zipfile and NumPy have many errors for damage.
    except Exception as error:
      logging.warning("The cached judge %s is damaged (%s); training it again.", path, error)
  logging.info("Training a classifier on %d images as the judge, once.", len(images))
  judge = train_judge(images, labels, num_classes=num_classes)
  try:
    _write(path, judge, digest)
  except OSError as error:  # as of a folder that others share
    logging.warning("The judge could not be kept (%s): the next run trains it again.", error)
  return judge


def stratified_split(labels, seed):
  """Indices (train, held_out): a fifth of every class, drawn at random, is held out."""
  rng = np.random.default_rng(seed)
  train, held_out = [], []
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    count = round(HELD_OUT * len(members))
    held_out.append(members[:count])
    train.append(members[count:])
  return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


def _init(key, image_shape, num_classes):
  return _Classifier(num_classes).init(key, jnp.zeros((1, *image_shape)))["params"]


def _shift(image, offset):
  """image [H, W, C] moved by offset - 1 pixels in each direction, edges repeated."""
  padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
  return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


@functools.partial(jax.jit, static_argnames="num_classes")
def _forward(params, images, num_classes):
  features, logits = classify(params, images, num_classes)
  return features, jax.nn.softmax(logits)


@functools.partial(jax.jit, static_argnames="num_classes", donate_argnums=(0, 1))
def _train_step(params, opt_state, images, labels, key, num_classes):
  key_index, key_shift = jax.random.split(key)
  index = jax.random.randint(key_index, (_BATCH,), 0, len(images))
  offsets = jax.random.randint(key_shift, (_BATCH, 2), 0, 3)
  x = jax.vmap(_shift)(to_unit_range(images[index]), offsets)

  def loss(params):
    _, logits = _Classifier(num_classes).apply({"params": params}, x)
    targets = optax.smooth_labels(jax.nn.one_hot(labels[index], num_classes), _LABEL_SMOOTHING)
    return optax.softmax_cross_entropy(logits, targets).mean()

  updates, opt_state = _OPTIMIZER.update(jax.grad(loss)(params), opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def _read(path, image_shape, num_classes, digest):
  expected = jax.eval_shape(lambda: _init(jax.random.key(0), image_shape, num_classes))
  expected = traverse_util.flatten_dict(expected, sep="/")
  expected["held_out_accuracy"] = jax.ShapeDtypeStruct((), np.float64)
  held = arrays.headers(path)
  if "digest" not in held:
    raise ValueError("it is of an older version")
  if held["digest"].shape == () and held["digest"].dtype.itemsize <= np.asarray(digest).nbytes:
    if (of := str(arrays.read(path, held["digest"]))) != digest:
      raise ValueError(f"it is that of other images, {of[:16]}")
  else:
    raise ValueError("its digest is none")
  for name, leaf in expected.items():
    if (held[name].shape, held[name].dtype) != (leaf.shape, leaf.dtype):
      raise ValueError(f"{name} is {held[name].dtype} {held[name].shape}, not {leaf.shape}")
  # Reading an entry also checks its CRC, so a flipped bit is an error and not another judge.
  params = {name: arrays.read(path, held[name]) for name in expected}
  accuracy = float(params.pop("held_out_accuracy"))
  return Judge(traverse_util.unflatten_dict(params, sep="/"), accuracy, image_shape, num_classes)


def _write(path, judge, digest):
  params = traverse_util.flatten_dict(judge.params, sep="/")
  with files.whole_file(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, held_out_accuracy=judge.held_out_accuracy, digest=digest, **params)

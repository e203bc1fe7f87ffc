"""Feature networks: what distances between sets of images are measured on.

One interface for all of them, a pure function of parameters and uint8 images. Two are made of the
dataset itself and serve small images: `classifier`, trained on it, and `random`, at fixed random
weights. `inception` (FID, IS, KID, precision and recall) and `dinov2` (FD-DINOv2) are published
networks for natural images.

Axes: N images, B batch, H/W size, C channels, F features.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.metrics import classifier as judge_lib
from ism_jax.pretrained import dinov2, inception
from ism_jax.runtime import sharding
from ism_jax.runtime.sharding import AXIS, P

PUBLISHED = {"inception": inception, "dinov2": dinov2}

BATCH = 512  # host images at a time, over all devices
_TOGETHER = {"classifier": 256, "random": 256, "inception": 16, "dinov2": 16}  # on each device


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A feature network with weights.

  Attributes:
    name: one of `protocol.NAMES`.
    what: its features in words.
    sha256: of its weights; "" for those made of the dataset.
    params: nested dict of arrays.
    apply: (params, uint8 [B, H, W, C]) -> {"features": float32 [B, F], and where it has them
      "spatial": [B, S] (of sFID) and "logits": [B, classes]}.
    held_out_accuracy: of a classifier of the dataset's classes; None for other networks.
  """

  name: str
  what: str
  sha256: str
  params: Any = dataclasses.field(repr=False)
  apply: Callable[[Any, jax.Array], dict[str, jax.Array]] = dataclasses.field(repr=False)
  held_out_accuracy: float | None = None


def classifier(images, labels, *, num_classes: int, cache_dir: str) -> Network:
  """The judge of this dataset, see `judge.load_judge`."""
  judge = judge_lib.load_judge(images, labels, num_classes=num_classes, cache_dir=cache_dir)

  def apply(params, x):
    features, logits = judge_lib.classify(params, x, num_classes)
    return {"features": features, "logits": logits}

  what = (
    f"{judge_lib.NUM_FEATURES} features of a classifier trained on 80 % of the training images, "
    f"right on {judge.held_out_accuracy:.3f} of the others"
  )
  return Network("classifier", what, "", judge.params, apply, judge.held_out_accuracy)


def random(images, mesh) -> Network:
  """A fixed network at random weights, each feature scaled by its deviation over `images`."""

  def apply(params, x):
    return {"features": judge_lib.random_features(params["network"], x) / params["scale"]}

  params = {"network": judge_lib.random_params(images.shape[1:]), "scale": np.float32(1)}
  unscaled = Network("random", "", "", params, apply)
  features = of_images(unscaled, mesh, images)
  what = f"{features.shape[1]} features of a fixed network at random weights"
  deviation = features.std(0)
  # A feature that all images share has only rounding, which is not to be blown up.
  scale = np.where(deviation > 1e-6 * np.abs(features).max(0), deviation, np.float32(1))
  return dataclasses.replace(unscaled, what=what, params=params | {"scale": scale})


def published(name: str, weights: str = "") -> Network:
  """`inception` or `dinov2`; errors as of `pretrained.inception.load` and `pretrained.dinov2.load`.

  Args:
    weights: a file, "" for the published ones (cached, else downloaded), or "random".
  """
  module = PUBLISHED[name]
  loaded = module.load(weights)

  def apply(params, x):
    # A grey image is one of three equal channels.
    return module.features(params, x if x.shape[-1] == 3 else jnp.repeat(x, 3, axis=-1))

  what = module.WHAT + (" at random weights" if weights == "random" else "")
  return Network(name, what, loaded.sha256, loaded.params, apply)


@functools.lru_cache(maxsize=4)
def extractor(networks: tuple[Network, ...], mesh):
  """extract(uint8 [B, H, W, C]) -> {network: {output: [B, ...]}}, on every device whole.

  Compiled; the rows, a multiple of the mesh's size, are split over the mesh. The parameters are put
  on the devices once, for all who ask for the same networks.
  """

  def on_device(params, images):
    outputs = {}
    for network in networks:
      one = lambda image, network=network: jax.tree.map(
        lambda a: a[0], network.apply(params[network.name], image[None])
      )
      outputs[network.name] = jax.lax.map(one, images, batch_size=_TOGETHER[network.name])
    return outputs

  extract = jax.shard_map(
    on_device, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False
  )
  everywhere = sharding.replicated(mesh)
  params = jax.device_put({n.name: n.params for n in networks}, everywhere)
  extract = jax.jit(extract, in_shardings=everywhere, out_shardings=everywhere)
  return functools.partial(extract, params)


def of_batches(networks, mesh, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, dict]]:
  """(batch, {network: {output: NumPy array [b, ...]}}) for each host batch, uint8 [b, H, W, C].

  All are of one size, but the last, which may be smaller.
  """
  extract, size = extractor(tuple(networks), mesh), None
  for images in batches:
    count = len(images)
    size = size or -(-count // mesh.size) * mesh.size
    outputs = extract(np.pad(images, [(0, size - count), (0, 0), (0, 0), (0, 0)]))
    yield images, jax.tree.map(lambda a: np.asarray(a)[:count], outputs)


def in_batches(images: np.ndarray) -> Iterator[np.ndarray]:
  """Host images [N, H, W, C], as many at a time as are seen together."""
  return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def of_images(network: Network, mesh, images: np.ndarray) -> np.ndarray:
  """The features [N, F] of uint8 [N, H, W, C]."""
  seen = of_batches((network,), mesh, in_batches(images))
  return np.concatenate([outputs[network.name]["features"] for _, outputs in seen])

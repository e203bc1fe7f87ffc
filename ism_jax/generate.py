"""From parameters to images: compiled sampling over the mesh, in batches, and grids to look at.

Samples of latents are decoded. Sample i depends on the seed and on i alone, whatever the batch size
or the number of devices; it has class i modulo the number of classes, or the one asked for.

Axes: N images, B batch, H/W size, C channels.
"""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ism_jax import experiment as experiment_lib
from ism_jax import model as model_lib
from ism_jax import paths, sampling, sharding
from ism_jax.experiment import Experiment
from ism_jax.pretrained import vae as vae_lib
from ism_jax.sharding import AXIS, P

GRID = (8, 10)  # rows and columns of a sample grid
DECODED_TOGETHER = 4  # latents at a time on each device: 256x256 images take about 0.3 GB each


def to_uint8(x):
  """[-1, 1] -> 0..255, rounded: the inverse of the input pipeline's u / 127.5 - 1."""
  return jnp.clip(jnp.round(127.5 * (x + 1)), 0, 255).astype(jnp.uint8)


@functools.lru_cache
def sample_function(exp: Experiment, mesh, steps):
  """draw(params, key, numbers [B], c [B], w [B]) -> (x1 [B, H, W, C], whether all is finite).

  Compiled for one schedule; the rows are split over the mesh, whose arguments are whole everywhere.
  """
  schedule, network = paths.parse_schedule(steps), exp.network()
  sample = sampling.sample
  if not exp.objective.intrinsic:
    sample = functools.partial(
      sampling.sample_fixed, t_interval=exp.objective.t_interval, null_class=exp.null_class
    )

  def draw(params, key, *per_sample):
    numbers, c, w = jax.lax.with_sharding_constraint(per_sample, sharding.rows(mesh))
    x0 = sampling.draw_noise(key, numbers, exp.image_shape)
    x1 = sample(model_lib.velocity_function(network, params), x0, c, w, schedule)
    return x1, jnp.isfinite(x1).all()

  everywhere = sharding.replicated(mesh)
  return jax.jit(draw, in_shardings=everywhere, out_shardings=(sharding.rows(mesh), everywhere))


def decode_function(cfg: vae_lib.VaeConfig, mesh):
  """decode(parameters of the VAE, x1 [B, h, w, 4]) -> uint8 [B, 8 h, 8 w, 3] on every device."""

  def on_device(params, x1):
    decode = lambda z: to_uint8(vae_lib.decode(cfg, params, z[None])[0])
    return jax.lax.map(decode, x1, batch_size=DECODED_TOGETHER)

  decode = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
  return jax.jit(decode, out_shardings=sharding.replicated(mesh))


load_vae = functools.lru_cache(vae_lib.load)


@functools.lru_cache
def pixels_function(name: str, mesh):
  """pixels(x1 [B, h, w, C]) -> uint8 [B, H, W, C] on every device.

  Args:
    name: of the VAE that decodes, see `vae.load`; "" where x1 are pixels.
  """
  everywhere = sharding.replicated(mesh)
  if not name:
    return jax.jit(to_uint8, out_shardings=everywhere)
  vae = load_vae(name)
  return functools.partial(decode_function(vae.cfg, mesh), jax.device_put(vae.params, everywhere))


def batch(exp: Experiment, mesh, params, *, numbers, labels, steps, w, seed):
  """Starts drawing the samples of these numbers [B], and does not wait for them.

  Args:
    numbers, labels, w: [B], B a multiple of the mesh's size. steps: a count or schedule.
  Returns:
    (uint8 [B, H, W, C], whether all is finite), device arrays.
  """
  draw, pixels = sample_function(exp, mesh, steps), pixels_function(exp.data.vae, mesh)
  params = jax.device_put(params, sharding.replicated(mesh))
  key = jax.random.key(seed)
  x1, finite = draw(params, key, np.int32(numbers), np.int32(labels), np.float32(w))
  return pixels(x1), finite


def class_labels(exp: Experiment, num_images: int) -> np.ndarray:
  """All classes in turn, int64 [N]."""
  return np.arange(num_images) % exp.data.num_classes


def generate(exp: Experiment, mesh, params, *, num_images, steps, w, seed, batch_size, label=-1):
  """Draws samples.

  Args:
    steps: a count or schedule. w: guidance, one number or one per image [N].
    label: a class, or -1 for all in turn.
  Returns:
    (uint8 [N, H, W, C], int64 labels [N]), NumPy arrays.
  """
  for strength in np.unique(w):
    experiment_lib.check_guidance(exp, steps, float(strength))
  w = np.broadcast_to(np.asarray(w, np.float32), (num_images,))
  labels = class_labels(exp, num_images) if label == -1 else np.full(num_images, label)
  batch_size = -(-min(batch_size, num_images) // mesh.size) * mesh.size
  images = []
  for start in range(0, num_images, batch_size):
    # The last batch wraps around to keep its size: one compilation for all.
    numbers = np.arange(start, start + batch_size)
    rows = numbers % num_images
    drawn, finite = batch(
        exp, mesh, params, numbers=numbers, labels=labels[rows], steps=steps, w=w[rows], seed=seed
    )  # fmt: skip
    if not finite:
      raise FloatingPointError(
        f"samples {start} to {start + batch_size - 1} of {steps} steps at w={np.unique(w)} are not "
        "finite: the parameters are, so the network has diverged; use an earlier checkpoint."
      )
    images.append(np.asarray(drawn)[: num_images - start])
  return np.concatenate(images), labels


def grid_png(images, enlarge: int) -> bytes:
  """The first images [N, H, W, C] in rows of ten, each pixel enlarged, as PNG."""
  images = np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=128)  # thin lines
  columns = min(GRID[1], len(images))
  rows = min(GRID[0], len(images) // columns)
  n, h, w, c = images[: rows * columns].shape
  grid = images[:n].reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4)
  grid = grid.reshape(rows * h, columns * w, c).repeat(enlarge, 0).repeat(enlarge, 1)
  png = io.BytesIO()
  Image.fromarray(grid[..., 0] if c == 1 else grid[..., :3]).save(png, "PNG")
  return png.getvalue()

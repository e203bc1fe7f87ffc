"""From parameters to images: compiled sampling over the mesh, in batches, and grids to look at.

Samples of latents are decoded. Sample i depends only on the seed and on i, whatever the batch size
or the number of devices.

Axes: N images, B batch, H/W size, C channels.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import io
import math
import os
import time
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ism_jax import experiment, guidance, model, restore, sampling
from ism_jax.data import DataConfig, pipeline, samples
from ism_jax.data import labels as labels_lib
from ism_jax.experiment import Experiment
from ism_jax.pretrained import vae as vae_lib
from ism_jax.pretrained.weights import Pretrained
from ism_jax.runtime import files, logs, sharding
from ism_jax.runtime.sharding import AXIS, P

SUFFIXES = (".npz", ".png", ".gif")  # of what samples are written to, unless it is a folder
GRID = (8, 10)  # rows and columns of a sample grid
LARGEST = 10**8  # pixels of a picture of samples
LETTERS = 14  # pixels of a picture's captions
DECODED_TOGETHER = 4  # latents at a time on each device: 256x256 images take about 0.3 GB each


def to_uint8(x, rounding: str = "nearest"):
  """[-1, 1] -> 0..255.

  Rounding to the "nearest" inverts the input pipeline's u / 127.5 - 1; "truncate" is the floor of
  the same number, as ADM's code has it: half a level darker.
  """
  to_level = {"nearest": jnp.round, "truncate": jnp.floor}[rounding]
  return jnp.clip(to_level(127.5 * (x + 1)), 0, 255).astype(jnp.uint8)


def sampler(exp: Experiment, schedule, device_kind: str | None = None) -> Callable:
  """sample(params, x0 [B, H, W, C], c [B], w [B]) -> x1 [B, H, W, C].

  With a `device_kind`, see `SiT`, only inside of shard_map: XLA cannot divide a kernel among
  devices. A `schedule` is as `paths.parse_schedule` returns it, here and everywhere in this module.
  """
  velocity, objective = functools.partial(guided_velocity, exp, device_kind), exp.objective
  integrate = sampling.sample
  if not objective.any_w:
    velocity = functools.partial(model.velocity_function, exp.network(device_kind))
    fixed = {"t_interval": objective.t_interval, "null_class": exp.null_class}
    integrate = functools.partial(sampling.sample_fixed, **fixed)
  return lambda params, x0, c, w: integrate(velocity(params), x0, c, w, schedule)


def guided_velocity(exp: Experiment, device_kind: str | None, params) -> Callable:
  """velocity(x_t, t, c, d, w) as samples follow it: with two passes where w is no input.

  Where the start of the interval is one, it is the config's `t_interval`.
  """
  network = model.at_interval(exp.network(device_kind), params, exp.objective.t_interval)
  velocity = model.velocity_function(*network)
  settings = {"t_interval": exp.objective.t_interval, "null_class": exp.null_class}
  if exp.objective.intrinsic:
    return velocity
  if exp.objective.guidance == "two_pass":
    return guidance.two_pass(velocity, **settings)
  return guidance.fixed(velocity, every_level=False, **settings)


@functools.lru_cache
def sample_function(exp: Experiment, mesh, schedule):
  """sample(params, x0 [B, H, W, C], c [B], w [B]) -> (x1 [B, H, W, C], whether all is finite).

  Compiled for one schedule; x0 and x1 are split over the mesh, the others whole everywhere.
  """
  integrate = sampler(exp, schedule, sharding.device_kind(mesh))
  specs = P(), P(AXIS), P(AXIS), P(AXIS)
  integrate = jax.shard_map(integrate, mesh=mesh, in_specs=specs, out_specs=P(AXIS))
  everywhere, rows = sharding.replicated(mesh), sharding.rows(mesh)

  def sample(params, x0, c, w):
    x1 = integrate(params, x0, c, w)
    return x1, jnp.isfinite(x1).all()

  in_shardings = (everywhere, rows, everywhere, everywhere)
  return jax.jit(sample, in_shardings=in_shardings, out_shardings=(rows, everywhere))


@functools.lru_cache
def noise_function(shape: tuple[int, int, int], mesh):
  """noise(key, numbers [B]) -> x0 [B, *shape], split over the mesh; see `sampling.draw_noise`."""
  noise = functools.partial(sampling.draw_noise, shape=shape)
  return jax.jit(noise, in_shardings=sharding.replicated(mesh), out_shardings=sharding.rows(mesh))


load_vae = functools.lru_cache(vae_lib.load)


def autoencoder(cfg: DataConfig) -> Pretrained:
  """The VAE of latents; raises ValueError where it scales them in another way than `cfg` says."""
  vae = load_vae(cfg.vae)
  if (vae.cfg.scale, vae.cfg.shift) != (cfg.vae_scale, cfg.vae_shift):
    raise ValueError(
      f"data.vae={cfg.vae!r} has scaling_factor={vae.cfg.scale} and shift_factor={vae.cfg.shift}, "
      f"but the latents are those of data.vae_scale={cfg.vae_scale} and data.vae_shift="
      f"{cfg.vae_shift}. Set these to the autoencoder's before training; after it, name the "
      f"autoencoder of the training, with the {vae_lib.CONFIG} that it had then, if any."
    )
  return vae


def check_decoder(trained: restore.Trained) -> None:
  """Raises ValueError if latents would be decoded by other weights than those that encoded."""
  cfg, encoded = trained.exp.data, trained.dataset.get("vae_sha256")
  if encoded and (sha256 := autoencoder(cfg).sha256) != encoded:
    raise ValueError(
      f"data.vae={cfg.vae!r} has weights of sha256 {sha256[:12]}..., but the data of this "
      f"run was encoded by those of {encoded[:12]}...: name these, by --config.data.vae."
    )


def decoded_shape(exp: Experiment) -> tuple[int, int, int]:
  """(H, W, C) of a sample as an image."""
  if not exp.data.vae:
    return exp.image_shape
  factor = autoencoder(exp.data).cfg.factor
  return exp.image_shape[0] * factor, exp.image_shape[1] * factor, 3


@functools.lru_cache
def pixels_function(cfg: DataConfig, mesh, rounding: str = "nearest"):
  """pixels(x1 [B, h, w, C]) -> uint8 [B, H, W, C] on every device, decoded where x1 are latents."""
  everywhere = sharding.replicated(mesh)
  if not cfg.vae:
    return jax.jit(functools.partial(to_uint8, rounding=rounding), out_shardings=everywhere)
  vae = autoencoder(cfg)

  def on_device(params, x1):
    decode = lambda z: to_uint8(vae_lib.decode(vae.cfg, params, z[None])[0], rounding)
    return jax.lax.map(decode, x1, batch_size=DECODED_TOGETHER)

  decode = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
  decode = jax.jit(decode, out_shardings=everywhere)
  return functools.partial(decode, jax.device_put(vae.params, everywhere))


def draw(exp: Experiment, mesh, params, *, numbers, labels, schedule, w, seed):
  """Starts drawing the samples of these numbers [B], and does not wait for them.

  Args:
    numbers, labels, w: [B], B a multiple of the mesh's size.
    seed: of the noise.
  Returns:
    (uint8 [B, H, W, C], whether all is finite), device arrays.
  """
  pixels = pixels_function(exp.data, mesh, exp.evaluation.rounding)
  params = jax.device_put(params, sharding.replicated(mesh))
  x0 = noise_function(exp.image_shape, mesh)(jax.random.key(seed), np.int32(numbers))
  x1, finite = sample_function(exp, mesh, schedule)(params, x0, np.int32(labels), np.float32(w))
  return pixels(x1), finite


def class_labels(exp: Experiment, num_images: int, seed: int = 0, counts=None) -> np.ndarray:
  """Labels by the protocol of `evaluation.labels`, int64 [N].

  Args:
    counts: images of each class in the data that was trained on, if they are known.
  Raises:
    ValueError: the labels are to be the data's, and nothing says how many images its classes have.
  """
  classes, kind = exp.data.num_classes, exp.evaluation.labels
  if kind == "balanced":
    return np.arange(num_images) % classes
  rng = np.random.default_rng(seed)
  if kind == "uniform":
    return rng.integers(classes, size=num_images)
  if counts is None:
    raise ValueError(
      "evaluation.labels='data', and neither the data nor what was trained on it says how many "
      "images each class has: set it to balanced or uniform. Runs on data.name=images and on "
      "latents say so, but for older checkpoints, which the next one of the same run replaces."
    )
  return rng.choice(classes, size=num_images, p=np.array(counts) / sum(counts))


class Batch(NamedTuple):
  """A batch of samples.

  Attributes:
    images: uint8 [B, H, W, C], on every device; those behind `labels` only fill the mesh.
    labels: int64 [b], b <= B.
    drawing, decoding: seconds that each took, compilation included.
  """

  images: jax.Array
  labels: np.ndarray
  drawing: float
  decoding: float


def batches(
  exp: Experiment, mesh, params, labels, *, schedule, w, seed, batch_size, noise=None
) -> Iterator[Batch]:
  """Draws samples of these labels [N], each batch when it is asked for.

  Args:
    w: guidance, one number or one per image [N].
    seed: of the noise.
    batch_size: images at a time, over all devices.
    noise: float32 [N, h, w, c], instead of the seed's.
  Raises:
    FloatingPointError: samples are not finite.
  """
  for strength in np.unique(w):
    experiment.check_guidance(exp, schedule, float(strength))
  num_images = len(labels)
  w = np.broadcast_to(np.asarray(w, np.float32), (num_images,))
  batch_size = -(-min(batch_size, num_images) // mesh.size) * mesh.size
  draw_noise, sample = noise_function(exp.image_shape, mesh), sample_function(exp, mesh, schedule)
  pixels = pixels_function(exp.data, mesh, exp.evaluation.rounding)
  params, key = jax.device_put(params, sharding.replicated(mesh)), jax.random.key(seed)
  for start in range(0, num_images, batch_size):
    # The last batch wraps around to keep its size: one compilation for all.
    numbers = np.arange(start, start + batch_size)
    rows = numbers % num_images
    began = time.perf_counter()
    if noise is None:
      x0 = draw_noise(key, np.int32(numbers))
    else:
      x0 = jax.device_put(noise[rows], sharding.rows(mesh))
    x1, finite = sample(params, x0, np.int32(labels[rows]), w[rows])
    if not finite:
      raise FloatingPointError(
        f"samples {start} to {start + batch_size - 1} of {len(schedule)} steps at w={np.unique(w)} "
        "are not finite: the parameters are, so the network has diverged; use an earlier "
        "checkpoint."
      )
    sampled = time.perf_counter()
    images = jax.block_until_ready(pixels(x1))
    decoding = time.perf_counter() - sampled
    yield Batch(images, labels[start : start + batch_size], sampled - began, decoding)


def check_output(out: str) -> None:
  """Raises unless samples can be written to `out`, see `write_samples`."""
  _, suffix = os.path.splitext(out.rstrip("/"))
  if suffix in SUFFIXES and not out.endswith("/"):
    files.check_file(out, suffix)
  elif not suffix or out.endswith("/"):
    files.check_empty(out)
  else:
    raise ValueError(
      f"--out={out} is no {', '.join(SUFFIXES)}; a folder of PNGs ends in / or has no suffix."
    )


def write_samples(config, source: str, out: str, devices=None, *, tree: str = "ema") -> None:
  """Draws `config.sample`, in the form that the name of `out` asks for.

  Args:
    config: a ConfigDict of the run.
    source: its workdir, of which the newest checkpoint samples, or an export: see `restore.read`.
    out: an npz for other evaluators, images arr_0 and labels arr_1; a png, of all images side by
      side; a gif, of the first ones on their way from noise to image; or a folder, of a PNG each.
    devices: that sample; default all.
    tree: the parameters of a workdir, see `restore.trees_of`.
  """
  check_output(out)
  mesh = sharding.data_mesh(devices)
  trained = restore.read(source, tree, config=config, mesh=mesh)
  check_decoder(trained)
  exp, cfg = trained.exp, trained.exp.sample
  names = trained.names or pipeline.class_names(exp.data)
  labels = class_labels(exp, cfg.num_images, cfg.seed, trained.class_counts)
  if cfg.label not in labels_lib.ALL:
    label = labels_lib.number_of(cfg.label, exp.data.num_classes, names)
    labels = np.full(cfg.num_images, label)
  settings = {name: getattr(cfg, name) for name in ("schedule", "w", "seed", "batch_size")}
  pixels = cfg.num_images * math.prod(decoded_shape(exp)[:2]) * exp.evaluation.enlarge**2
  if out.endswith(".png") and pixels > LARGEST:
    raise ValueError(
      f"sample.num_images={cfg.num_images} are {pixels:.3g} pixels in one picture, {out}, and "
      f"{LARGEST} are the most: draw fewer, or name a folder, of a PNG each."
    )
  if out.endswith(".gif"):
    if jax.process_count() > 1:
      raise ValueError(f"--out={out}: one process alone writes a gif.")
    columns = min(GRID[1], len(labels))
    labels = labels[: min(GRID[0], len(labels) // columns) * columns]  # those of a grid
    states = trajectory(exp, mesh, trained.params, labels, cfg.schedule, cfg.w, cfg.seed)
    files.write_whole(out, animation([grid_png(s, exp.evaluation.enlarge) for s in states]))
  else:
    parts = batches(exp, mesh, trained.params, labels, **settings)
    progress, drawn = logs.Progress(cfg.num_images), []
    with contextlib.ExitStack() as stack:
      if out.endswith(".png"):
        add = lambda images, _: drawn.append(images)
      elif out.endswith(".npz"):
        add = stack.enter_context(samples.writer(out, cfg.num_images, decoded_shape(exp)))
      else:
        add = stack.enter_context(samples.folder_writer(out, cfg.num_images, names))
      for batch in parts:
        add(np.asarray(batch.images)[: len(batch.labels)], batch.labels)
        progress.add(len(batch.labels))
    if drawn and jax.process_index() == 0:
      tiles = picture(np.concatenate(drawn), enlarge=exp.evaluation.enlarge)
      files.write_whole(out, as_png(tiles))
  logging.info("Wrote %d images of the %s to %s.", len(labels), trained.about, out)


@functools.lru_cache
def step_function(exp: Experiment, mesh, finest: bool):
  """step(params, x_t [B, H, W, C], t, d, c [B], w [B]) -> x_{t+d}, for the finest steps or others.

  For steps one by one, at any t and d: a `sample_function` is compiled for one schedule.
  """
  kind = sharding.device_kind(mesh)

  def step(params, x_t, t, d, c, w):
    if finest or exp.objective.any_w:
      velocity = guided_velocity(exp, kind, params)
    else:
      velocity = model.velocity_function(exp.network(kind), params)
    return sampling.sample(velocity, x_t, c, w, ((t, d),))

  specs = P(), P(AXIS), P(), P(), P(AXIS), P(AXIS)
  return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(AXIS)))


def trajectory(exp: Experiment, mesh, params, labels, schedule, w, seed) -> list[np.ndarray]:
  """What samples of these labels [N] look like before and after each step: uint8 [N, H, W, C]."""
  experiment.check_guidance(exp, schedule, w)
  count = len(labels)
  rows = np.arange(-(-count // mesh.size) * mesh.size)
  x_t = noise_function(exp.image_shape, mesh)(jax.random.key(seed), np.int32(rows))
  pixels = pixels_function(exp.data, mesh, exp.evaluation.rounding)
  c, strength = np.int32(labels[rows % count]), np.full(len(rows), w, np.float32)
  params, states = jax.device_put(params, sharding.replicated(mesh)), [x_t]
  for t, d in schedule:
    x_t = step_function(exp, mesh, d == 0)(params, x_t, np.float32(t), np.float32(d), c, strength)
    states.append(x_t)
  return [np.asarray(pixels(x_t))[:count] for x_t in states]


def animation(pngs: list[bytes]) -> bytes:
  """A GIF of pictures, PNG, that takes two seconds and holds the first and the last one."""
  frames = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
  durations = [max(40, 2_000 // len(frames))] * len(frames)
  durations[0], durations[-1], gif = 500, 2_000, io.BytesIO()
  frames[0].save(
    gif, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, disposal=1
  )
  return gif.getvalue()


def picture(images, *, enlarge: int = 1, columns: int = 10, gap: int | None = None) -> Image.Image:
  """Images side by side, which a notebook shows and `save` writes.

  Args:
    images: uint8 [N, H, W, 1 or 3], in rows of `columns`; or {caption: images}, a row each.
    enlarge: pixels of the picture per image pixel.
    columns: images in a row.
    gap: pixels between images; default half an enlarged one, and at least 2.
  """
  if not isinstance(images, dict):
    images = np.asarray(images)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    captions = [""] * len(rows)
  else:
    rows, captions = list(map(np.asarray, images.values())), list(map(str, images))
  if wrong := [row for row in rows if row.ndim != 4 or row.dtype != np.uint8]:
    raise ValueError(
      f"images are {wrong[0].dtype} {wrong[0].shape}; needed are uint8 [N, H, W, C], as of "
      "Model.sample."
    )
  sizes = sorted({row.shape[1:3] for row in rows})
  if len(sizes) != 1:
    raise ValueError(f"images of one size are needed; given are {sizes}.")
  font = ImageFont.load_default(LETTERS)
  margin = max(round(font.getlength(caption)) for caption in captions)
  margin += LETTERS if margin else 0
  gap = max(2, enlarge // 2) if gap is None else gap
  height, width = (n * enlarge + gap for n in rows[0].shape[1:3])
  size = margin + width * max(map(len, rows)) - gap, height * len(rows) - gap
  paper = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(paper)
  for i, (caption, row) in enumerate(zip(captions, rows, strict=True)):
    draw.text((0, i * height + (height - gap) // 2), caption, "black", font, anchor="lm")
    for j, image in enumerate(row):
      tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
      tile = tile.resize((width - gap, height - gap), Image.Resampling.NEAREST)
      paper.paste(tile, (margin + j * width, i * height))
  return paper


def grid_png(images, enlarge: int) -> bytes:
  """The first images [N, H, W, C] in full rows of ten, each pixel enlarged, as PNG."""
  columns = min(GRID[1], len(images))
  images = np.asarray(images)[: min(GRID[0], len(images) // columns) * columns, ..., :3]
  lined = np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=128)  # thin lines
  grid = picture(lined, enlarge=enlarge, columns=columns, gap=0)
  return as_png(grid.convert("L" if images.shape[-1] == 1 else "RGB"))


def as_png(image: Image.Image) -> bytes:
  """An image as a PNG file."""
  image.save(png := io.BytesIO(), "PNG")
  return png.getvalue()

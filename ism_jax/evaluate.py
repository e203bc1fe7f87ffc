"""From a checkpoint to samples, and from samples to numbers with what gives them meaning.

Samples come from the inference EMA. Sample i depends on the seed and on i alone, whatever the batch
size or the number of devices; it has class i modulo the number of classes, or the one asked for.

Axes: N images, H/W size, C channels.
"""

import functools
import io
import json
import os

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ism_jax import checkpoints, data, logs, metrics, paths, sampling, sharding, train
from ism_jax import experiment as experiment_lib
from ism_jax import judge as judge_lib
from ism_jax import model as model_lib
from ism_jax.experiment import Experiment

GRID = (8, 10)  # rows and columns of a sample grid
FLOOR_REPEATS = 20


def to_uint8(x):
  """[-1, 1] -> 0..255, rounded: the inverse of the input pipeline's u / 127.5 - 1."""
  return jnp.clip(jnp.round(127.5 * (x + 1)), 0, 255).astype(jnp.uint8)


def restore_ema(config, workdir: str, devices=None):
  """The newest checkpoint's inference EMA, without reading the rest of the state.

  Returns:
    (experiment, mesh of the devices, step, parameters)
  """
  exp, mesh = experiment_lib.parse(config), sharding.data_mesh(devices)
  with checkpoints.open_manager(workdir, keep=exp.checkpoint.keep, read_only=True) as manager:
    experiment_lib.check_continues(checkpoints.read_config(manager), logs.as_dict(config))
    like = train.abstract_state(exp, mesh).ema
    return exp, mesh, manager.latest_step(), checkpoints.restore_tree(manager, "ema", like)


@functools.lru_cache
def sample_function(exp: Experiment, mesh, steps):
  """draw(params, key, indices [B], c [B], w [B]) -> (uint8 [B, H, W, C], whether all is finite).

  Compiled for one schedule; the rows are split over the mesh, whose arguments are whole everywhere.
  """
  schedule, network = paths.parse_schedule(steps), exp.network()
  sample = sampling.sample
  if not exp.objective.intrinsic:
    sample = functools.partial(
      sampling.sample_fixed, t_interval=exp.objective.t_interval, null_class=exp.null_class
    )

  def draw(params, key, *per_sample):
    indices, c, w = jax.lax.with_sharding_constraint(per_sample, sharding.rows(mesh))
    x0 = sampling.draw_noise(key, indices, exp.image_shape)
    x1 = sample(model_lib.velocity_function(network, params), x0, c, w, schedule)
    return to_uint8(x1), jnp.isfinite(x1).all()

  everywhere = sharding.replicated(mesh)
  return jax.jit(draw, in_shardings=everywhere, out_shardings=everywhere)


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
  draw, key = sample_function(exp, mesh, steps), jax.random.key(seed)
  w = np.broadcast_to(np.asarray(w, np.float32), (num_images,))
  labels = (
    np.arange(num_images) % exp.data.num_classes if label == -1 else np.full(num_images, label)
  )
  batch_size = -(-min(batch_size, num_images) // mesh.size) * mesh.size
  images = []
  for start in range(0, num_images, batch_size):
    # The last batch wraps around to keep its size: one compilation for all.
    indices = np.arange(start, start + batch_size)
    given = (np.int32(labels[indices % num_images]), w[indices % num_images])
    batch, finite = draw(params, key, np.int32(indices), *given)
    if not finite:
      raise FloatingPointError(
        f"samples {start} to {start + batch_size - 1} of {steps} steps at w={np.unique(w)} are not "
        "finite: the parameters are, so the network has diverged; use an earlier checkpoint."
      )
    images.append(np.asarray(batch)[: num_images - start])
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


class Reference:
  """Real images, the judge trained on them, and the yardsticks beside which numbers are read."""

  def __init__(self, exp: Experiment):
    source = data.load_source(exp.data)
    self.images, self.labels = data.all_images(source)
    self.judge = judge_lib.load_judge(
      self.images,
      self.labels,
      num_classes=exp.data.num_classes,
      cache_dir=os.path.join(data.directory(exp.data), "judges"),
    )
    features, _ = judge_lib.judge_features(self.judge, self.images)
    self.statistics = metrics.feature_statistics(features)
    self.floor, self.floor_sd = metrics.bootstrap_floor(features, seed=0, repeats=FLOOR_REPEATS)
    self.flat = self.images.reshape(len(self.images), -1) / 127.5

  def score(self, images, labels) -> dict[str, float]:
    """The numbers of a set of images meant to show `labels`."""
    features, probabilities = judge_lib.judge_features(self.judge, images)
    distance = metrics.frechet_distance(metrics.feature_statistics(features), self.statistics)
    flat = images.reshape(len(images), -1) / 127.5
    return {
      "frechet_distance": distance,
      "times_floor": distance / self.floor,
      "accuracy": float(np.mean(probabilities.argmax(1) == labels)),
      "nearest_neighbour": metrics.nearest_neighbour_distance(flat, self.flat),
    }

  def yardsticks(self) -> dict[str, dict[str, float]]:
    """Scores of real images and of bad ones."""
    rng = np.random.default_rng(0)
    class_means = np.stack([
        self.images[self.labels == c].mean(0) for c in range(self.judge.num_classes)
    ])  # fmt: skip
    noise = np.asarray(to_uint8(rng.standard_normal(self.images.shape)))
    real = self.score(self.images, self.labels)
    # Against themselves, real images are their own neighbours.
    real["nearest_neighbour"] = metrics.nearest_neighbour_distance(
      self.flat, self.flat, exclude_self=True
    )
    return {
      "real images": real,
      "class means": self.score(np.uint8(class_means.round())[self.labels], self.labels),
      "noise": self.score(noise, self.labels),
    }


def evaluate(config, workdir: str, devices=None) -> dict:
  """Judges the newest checkpoint and writes evaluation.json, evaluation.md and the sample grids.

  Returns:
    The contents of evaluation.json.
  """
  exp, mesh, step, params = restore_ema(config, workdir, devices)
  checkpoints.check_writable(workdir)
  reference, ev = Reference(exp), exp.evaluation
  logging.info("The judge is right on %.3f of held-out images.", reference.judge.held_out_accuracy)
  results = []
  for seed in ev.seeds:
    for steps, w in ev.settings():
      images, labels = generate(
          exp, mesh, params,
          num_images=ev.num_images, steps=steps, w=w, seed=seed, batch_size=ev.batch_size,
      )  # fmt: skip
      results.append({"steps": steps, "w": w, "seed": seed} | reference.score(images, labels))
      if seed == ev.seeds[0]:
        path = os.path.join(workdir, f"samples_steps{steps}_w{w:g}.png")
        logs.write_whole(path, grid_png(images, ev.enlarge))
      logging.info(
          "%d steps, w=%g, seed %d: Fréchet distance %.3f (%.2f x floor), accuracy %.3f", steps, w,
          seed, *(results[-1][k] for k in ("frechet_distance", "times_floor", "accuracy"))
      )  # fmt: skip
  report = {
    "variant": exp.variant,
    "step": step,
    "parameters": "inference EMA",
    "num_images": ev.num_images,
    "labels": "all classes in turn",
    "rounding": "round(127.5 (x + 1)), clipped to 0..255",
    "features": "64 features of the judge, a classifier trained on 80 % of the real images",
    "judge_held_out_accuracy": reference.judge.held_out_accuracy,
    "reference_images": len(reference.images),
    "floor": reference.floor,
    "floor_sd": reference.floor_sd,
    "yardsticks": reference.yardsticks(),
    "results": results,
    "config": logs.as_dict(config),
  }
  logs.write_whole(os.path.join(workdir, "evaluation.json"), json.dumps(report, indent=2))
  logs.write_whole(os.path.join(workdir, "evaluation.md"), as_markdown(report))
  return report


def as_markdown(report: dict) -> str:
  """The report as tables that a person reads."""
  lines = [
    f"# {report['variant']}, step {report['step']}",
    "",
    f"{report['num_images']} samples of the inference EMA against {report['reference_images']} real"
    f" images. Features of a classifier that is right on {report['judge_held_out_accuracy']:.3f} of"
    " held-out images. Floor: Fréchet distance of a bootstrap resample of the real images, "
    f"{report['floor']:.3f} ± {report['floor_sd']:.3f} (mean and standard deviation of "
    f"{FLOOR_REPEATS}). Nearest neighbour: mean distance to the nearest real image, of real images"
    " to the nearest other one; far below theirs means copying (a little below, samples that are "
    "more typical than real ones, as class means are). Accuracy alone says little: over-guided "
    "samples reach 1.",
    "",
    "| steps | w | seed | Fréchet distance | × floor | accuracy | nearest neighbour |",
    "|---|---|---|---|---|---|---|",
  ]
  row = lambda name, r: (
    f"| {name} | {r['frechet_distance']:.3f} | {r['times_floor']:.2f} | {r['accuracy']:.3f} | "
    f"{r['nearest_neighbour']:.3f} |"
  )
  lines += [row(f"{r['steps']} | {r['w']:g} | {r['seed']}", r) for r in report["results"]]
  lines += [row(f"{name} | – | –", r) for name, r in report["yardsticks"].items()]
  return "\n".join(lines) + "\n"


def sample(config, workdir: str, out: str, devices=None) -> None:
  """Draws `config.sample` into an npz for ADM's evaluator: images arr_0, labels arr_1."""
  checkpoints.check_writable(os.path.dirname(os.path.abspath(out)))
  exp, mesh, step, params = restore_ema(config, workdir, devices)
  s = exp.sample
  images, labels = generate(
      exp, mesh, params,
      num_images=s.num_images, steps=s.steps, w=s.w, seed=s.seed, label=s.label,
      batch_size=s.batch_size,
  )  # fmt: skip
  archive = io.BytesIO()
  np.savez(archive, arr_0=images, arr_1=labels)
  logs.write_whole(out, archive.getvalue())
  logging.info("Wrote %d images of step %d to %s.", len(images), step, out)

"""From a checkpoint to samples, and from samples to numbers with what gives them meaning.

Samples come from the inference EMA.
"""

import functools
import io
import json
import os

from absl import logging
import jax
import numpy as np

from ism_jax import checkpoints, diagnosis, guidance, logs, sampling, sharding, spectra, train
from ism_jax import experiment as experiment_lib
from ism_jax import model as model_lib
from ism_jax import reference as reference_lib
from ism_jax.experiment import Experiment
from ism_jax.generate import class_labels, generate, grid_png

PATHS = 256  # paths whose straightness is measured


def restore_ema(config, workdir: str, devices=None):
  """The newest checkpoint's inference EMA, without reading the rest of the state.

  Returns:
    (experiment, mesh of the devices, step, parameters)
  """
  exp, mesh = experiment_lib.parse(config), sharding.data_mesh(devices)
  with checkpoints.open_manager(workdir, keep=exp.checkpoint.keep, read_only=True) as manager:

    def read(step):
      saved = checkpoints.read_config(manager, step)
      experiment_lib.check_continues(saved, logs.as_dict(config))
      everywhere = sharding.replicated(mesh)
      like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        train.abstract_state(exp, mesh).ema,
      )
      return checkpoints.restore_tree(manager, "ema", like, step)

    step, params = checkpoints.restore_newest(manager, read)
    return exp, mesh, step, params


def straightness(exp: Experiment, params, w: float, seed: int) -> float:
  """`diagnosis.deviation_from_chord` of `PATHS` paths, as 128 steps sample them."""
  velocity = model_lib.velocity_function(exp.network(), params)
  if not exp.objective.intrinsic:
    velocity = guidance.fixed(
      velocity, null_class=exp.null_class, t_interval=exp.objective.t_interval, every_level=False
    )
  x0 = sampling.draw_noise(jax.random.key(seed), np.arange(PATHS), exp.image_shape)
  c, strength = np.int32(class_labels(exp, PATHS)), np.full(PATHS, w, np.float32)
  return float(
    jax.jit(functools.partial(diagnosis.deviation_from_chord, velocity))(x0, c, strength)
  )


def evaluate(config, workdir: str, devices=None) -> dict:
  """Judges the newest checkpoint and writes evaluation.json, evaluation.md and the sample grids.

  Returns:
    The contents of evaluation.json.
  """
  if config.data.vae:
    raise ValueError(
      "--mode=evaluate compares pixels, and decoded latents have no reference here yet: use "
      "--mode=sample, and score its npz with ADM's evaluator."
    )
  exp, mesh, step, params = restore_ema(config, workdir, devices)
  checkpoints.check_writable(workdir)
  reference, ev = reference_lib.Reference(exp), exp.evaluation
  logging.info("The judge is right on %.3f of held-out images.", reference.judge.held_out_accuracy)
  results = []
  for seed in ev.seeds:
    for steps, w in ev.settings():
      images, labels = generate(
          exp, mesh, params,
          num_images=ev.num_images, steps=steps, w=w, seed=seed, batch_size=ev.batch_size,
      )  # fmt: skip
      scores = reference.score(images, labels) | reference.describe(images)
      results.append({"steps": steps, "w": w, "seed": seed} | scores)
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
    "features": reference.features_are,
    "judge_held_out_accuracy": reference.judge.held_out_accuracy,
    "reference_split": ev.reference_split,
    "reference_images": len(reference.images),
    "floor_is": reference.floor_is,
    "floor": reference.floor,
    "floor_sd": reference.floor_sd,
    "reference_spectrum": reference.spectrum.tolist(),
    "reference_bands": reference.bands.tolist(),
    "yardsticks": reference.yardsticks(),
    "results": results,
    "straightness": [
      {"w": w, "deviation_from_chord": straightness(exp, params, w, ev.seeds[0])} for w in ev.w
    ],
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
    f" images (split {report['reference_split']}), on {report['features']}. Accuracy: of a "
    f"classifier that is right on {report['judge_held_out_accuracy']:.3f} of held-out images. "
    f"Floor: the Fréchet distance of {report['floor_is']}, {report['floor']:.3f} ± "
    f"{report['floor_sd']:.3f} (mean and standard deviation of {reference_lib.FLOOR_REPEATS}). "
    f"Nearest neighbour: mean distance of the first {reference_lib.NEIGHBOURS} samples to the "
    "nearest training image; far below that of real images means copying (a little below, samples "
    "that are more typical than real ones, as class means are). High frequencies: power of the "
    "finest octave of frequencies over that of the real images. Accuracy alone says little: "
    "over-guided samples reach 1.",
    "",
    "| steps | w | seed | Fréchet distance | × floor | accuracy | nearest neighbour | "
    "high frequencies |",
    "|---|---|---|---|---|---|---|---|",
  ]
  real = spectra.finest_octave(report["reference_spectrum"])
  row = lambda name, r: (
    f"| {name} | {r['frechet_distance']:.3f} | {r['times_floor']:.2f} | {r['accuracy']:.3f} | "
    f"{r['nearest_neighbour']:.3f} | {spectra.finest_octave(r['spectrum']) / real:.2f} |"
  )
  lines += [row(f"{r['steps']} | {r['w']:g} | {r['seed']}", r) for r in report["results"]]
  lines += [row(f"{name} | – | –", r) for name, r in report["yardsticks"].items()]
  return "\n".join(lines) + "\n"


def sample(config, workdir: str, out: str, devices=None) -> None:
  """Draws `config.sample` into an npz for ADM's evaluator: images arr_0, labels arr_1."""
  checkpoints.check_writable(os.path.dirname(out))
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

"""From a checkpoint to samples, and from samples to numbers with the protocol that explains them.

Samples come from the inference EMA, or from a file or folder that anything made. They are drawn,
decoded, rounded and seen by the feature networks batch by batch, and not kept.

Axes: N images, B batch, H/W size, C channels.
"""

import collections
from concurrent import futures
import contextlib
import functools
import json
import os

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from ism_jax import (
  diagnosis,
  features,
  figures,
  files,
  generate,
  guidance,
  paths,
  restore,
  sampling,
  scores,
  sharding,
  spectra,
  summary,
)
from ism_jax import experiment as experiment_lib
from ism_jax import model as model_lib
from ism_jax import reference as reference_lib
from ism_jax import samples as samples_lib
from ism_jax.experiment import Experiment

PARTIAL = "evaluation_partial.json"
PATHS = 256  # paths whose straightness is measured
_SETTING = ("steps", "w", "seed")
# {(network, metric): (name in the field, format)}, in the order of the tables.
_COLUMNS = {
  ("inception", "frechet_distance"): ("FID", "{:.2f}"),
  ("inception", "spatial_frechet_distance"): ("sFID", "{:.2f}"),
  ("inception", "inception_score"): ("IS", "{:.1f}"),
  ("inception", "kid"): ("KID", "{:.5f}"),
  ("inception", "precision"): ("precision", "{:.3f}"),
  ("inception", "recall"): ("recall", "{:.3f}"),
  ("dinov2", "frechet_distance"): ("FD-DINOv2", "{:.1f}"),
  ("dinov2", "kid"): ("KD-DINOv2", "{:.4f}"),
  ("dinov2", "precision"): ("precision, DINOv2", "{:.3f}"),
  ("dinov2", "recall"): ("recall, DINOv2", "{:.3f}"),
  ("random", "frechet_distance"): ("FD, random network", "{:.3f}"),
  ("random", "times_floor"): ("FD, random network, in floors", "{:.2f}"),
  ("random", "precision"): ("precision, random network", "{:.3f}"),
  ("random", "recall"): ("recall, random network", "{:.3f}"),
  ("classifier", "frechet_distance"): ("FD, classifier", "{:.3f}"),
  ("classifier", "times_floor"): ("FD, classifier, in floors", "{:.2f}"),
  ("classifier", "accuracy"): ("accuracy", "{:.3f}"),
  ("classifier", "precision"): ("precision, classifier", "{:.3f}"),
  ("classifier", "recall"): ("recall, classifier", "{:.3f}"),
}


def straightness(exp: Experiment, params, w: float, seed: int) -> float:
  """`diagnosis.deviation_from_chord` of `PATHS` paths, as 128 steps sample them."""
  velocity = model_lib.velocity_function(exp.network(), params)
  if not exp.objective.intrinsic:
    velocity = guidance.fixed(
      velocity, null_class=exp.null_class, t_interval=exp.objective.t_interval, every_level=False
    )
  x0 = sampling.draw_noise(jax.random.key(seed), np.arange(PATHS), exp.image_shape)
  c, strength = np.int32(generate.class_labels(exp, PATHS)), np.full(PATHS, w, np.float32)
  return float(
    jax.jit(functools.partial(diagnosis.deviation_from_chord, velocity))(x0, c, strength)
  )


def load_reference(exp: Experiment, mesh) -> reference_lib.Reference:
  """The reference, on this process's devices of the mesh: what it scores needs no other process."""
  mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  return reference_lib.Reference(exp, mesh if len(mine) == mesh.size else sharding.data_mesh(mine))


def check(config) -> None:
  """Raises what would keep `evaluate` from judging this experiment once it is trained."""
  exp = experiment_lib.parse(config)
  generate.pixels_function(exp.data.vae, sharding.data_mesh(), exp.evaluation.rounding)
  load_reference(exp, sharding.data_mesh(jax.local_devices()))
  features.extractor.cache_clear()  # training needs the memory


def evaluate(config, workdir: str, devices=None) -> dict | None:
  """Judges the newest checkpoint by `config.evaluation`.

  Writes evaluation.json, evaluation.md, evaluation.png, and a grid of samples for each number of
  steps and w. Interrupted, it continues after the last of these settings that it finished.

  Returns:
    The contents of evaluation.json; None in processes but the first.
  """
  mesh = sharding.data_mesh(devices)
  trained = restore.read(workdir, config=config, mesh=mesh)
  exp, params = trained.exp, trained.params
  files.check_writable(workdir)
  generate.pixels_function(exp.data.vae, mesh, exp.evaluation.rounding)  # a VAE may be missing
  reference, ev = load_reference(exp, mesh), exp.evaluation
  header = {
    "variant": exp.variant,
    "step": trained.step,
    "parameters": restore.TREES[trained.tree],
    "vae": exp.data.vae,
    "labels": ev.labels,
    "rounding": ev.rounding,
    "computed_in": exp.model.dtype,
  } | protocol(mesh, reference, ev.num_images)
  path = functools.partial(os.path.join, workdir)
  settings = [(steps, w, seed) for seed in ev.seeds for steps, w in ev.settings()]
  fingerprint = header | {"evaluation": files.as_dict(config)["evaluation"]}
  found = _read_partial(path(PARTIAL), fingerprint)
  extract, compiled = features.extractor(reference.networks, mesh), set()
  for steps, w, seed in _unfinished(settings, found):
    labels = generate.class_labels(exp, ev.num_images, seed)
    name = f"samples_steps{steps}_w{w:g}"
    archive = path(f"{name}_seed{seed}.npz") if ev.save_samples else ""
    drawn = generate.batches(
      exp,
      mesh,
      params,
      labels,
      schedule=paths.parse_schedule(steps),
      w=w,
      seed=seed,
      batch_size=ev.batch_size,
    )
    result, grid, speed = _judge_drawn(exp, reference, extract, drawn, archive, steps in compiled)
    compiled.add(steps)
    if jax.process_index() == 0:
      if seed == ev.seeds[0]:
        files.write_whole(path(f"{name}.png"), generate.grid_png(grid, ev.enlarge))
      found[steps, w, seed] = result | {"images_per_second": speed}
      _write_partial(path(PARTIAL), fingerprint, found)
      logging.info("%d steps, w=%g, seed %d: %s.", steps, w, seed, _told(result["scores"]))
  # 128 steps of all paths on every device: affordable for small networks.
  straight = [
    {"w": w, "deviation_from_chord": straightness(exp, params, w, ev.seeds[0])}
    for w in (ev.w if reference.images else ())
  ]
  if jax.process_index() != 0:
    return None
  report = header | {
    "results": [dict(zip(_SETTING, key, strict=True)) | found[key] for key in settings],
    "yardsticks": reference.yardsticks() if reference.images else {},
    "straightness": straight,
    "config": files.as_dict(config),
  }
  _write_report(workdir, report)
  figures.sweep(summary.as_run(report), path("evaluation.png"))
  epath.Path(path(PARTIAL)).unlink(missing_ok=True)
  return report


def evaluate_samples(config, workdir: str, path: str) -> dict:
  """Judges images that anything made, by `config.evaluation`: evaluation.json and evaluation.md.

  Args:
    path: a file or folder of images, see `samples.open`.
  """
  exp, mesh = experiment_lib.parse(config), sharding.data_mesh(jax.local_devices())
  samples = samples_lib.open(path)
  files.check_writable(workdir)
  reference = load_reference(exp, mesh)
  reference.check_count(samples.count)
  reference.check_images(path, samples.image_shape, samples.labels)
  batches = samples.batches(exp.evaluation.batch_size)
  result = reference.judge(batches, samples.count, samples.labels)
  logging.info("%s: %s.", path, _told(result["scores"]))
  header = {"samples": path, "sha256": samples.protocol()["sha256"], "labels": "as given"}
  report = (
    header
    | protocol(mesh, reference, samples.count)
    | {
      "results": [result],
      "yardsticks": reference.yardsticks() if reference.images else {},
      "config": files.as_dict(config),
    }
  )
  _write_report(workdir, report)
  return report


def protocol(mesh, reference: reference_lib.Reference, num_images: int) -> dict:
  """What the numbers depend on beside the samples."""
  images = reference.images
  return {
    "num_images": num_images,
    "networks": [
      {
        "name": n.name,
        "features": n.what,
        "weights_sha256": n.sha256,
        "held_out_accuracy": n.held_out_accuracy,
        "reference": reference.sources[n.name],
        "reference_images": reference.statistics[n.name].features.count,
        "floor": reference.floors.get(n.name),
      }
      for n in reference.networks
    ],
    "metrics": {
      "frechet_distance": "float64, unbiased covariances",
      "inception_score": f"{scores.INCEPTION_SPLITS} parts, torch-fidelity's; no bias",
      "kid": f"{scores.KID_SUBSETS} subsets of {scores.KID_SUBSET_SIZE}, or of all there are",
      "precision_recall": f"{scores.NEIGHBOURHOOD} nearest neighbours",
    },
    "reference_spectrum": images and images.spectrum.tolist(),
    "reference_bands": images and images.bands.tolist(),
    "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    "jax": jax.__version__,
  }


def _judge_drawn(exp, reference, extract, drawn, archive, compiled):
  """Judges the batches drawn of one setting.

  Host work on a batch goes on in a thread while the next one is drawn.

  Returns:
    (`reference.Judging.result`, the first images, images per second); the result and images are
    None in processes but the first. Speeds are of all batches but the first, unless the sampler
    was `compiled` before, and None where there is no other.
  """
  total, first_process = exp.evaluation.num_images, jax.process_index() == 0
  judging, grid, seconds = reference_lib.Judging(reference, total), [], []
  with contextlib.ExitStack() as stack:
    save = None
    if archive:
      shape = generate.decoded_shape(exp)
      save = stack.enter_context(samples_lib.writer(archive, total, shape))
    behind = stack.enter_context(futures.ThreadPoolExecutor(1))
    waiting = collections.deque()
    for batch in drawn:
      seconds.append((len(batch.labels), batch.drawing, batch.drawing + batch.decoding))
      outputs = jax.block_until_ready(extract(batch.images))
      if first_process:
        if not grid:
          grid.append(np.asarray(batch.images)[: len(batch.labels)])
        waiting.append(behind.submit(judging.add, outputs, batch.images, batch.labels))
        if save:
          save(np.asarray(batch.images)[: len(batch.labels)], batch.labels)
      if len(waiting) > 1:
        waiting.popleft().result()
    for future in waiting:
      future.result()
  timed = np.array(seconds if compiled else seconds[1:])
  speed = None
  if len(timed):
    speed = dict(zip(("drawn", "decoded"), timed[:, 0].sum() / timed[:, 1:].sum(0), strict=True))
  return (judging.result(), grid[0], speed) if first_process else (None, None, None)


def _read_partial(path: str, fingerprint: dict) -> dict[tuple, dict]:
  """{(steps, w, seed): result} of an evaluation with this fingerprint that was interrupted."""
  path = epath.Path(path)
  if not path.exists():
    return {}
  saved = json.loads(path.read_text())
  if saved["fingerprint"] != json.loads(json.dumps(fingerprint)):
    logging.info("%s is of another evaluation: beginning anew.", path)
    return {}
  return {tuple(result.pop(k) for k in _SETTING): result for result in saved["results"]}


def _write_partial(path: str, fingerprint: dict, found: dict[tuple, dict]) -> None:
  results = [dict(zip(_SETTING, key, strict=True)) | result for key, result in found.items()]
  files.write_whole(path, json.dumps({"fingerprint": fingerprint, "results": results}))


def _unfinished(settings: list[tuple], found: dict) -> list[tuple]:
  """The settings that are not in `found` of the first process."""
  done = np.array([setting in found for setting in settings])
  if jax.process_count() > 1:
    done = multihost_utils.broadcast_one_to_all(done)
  if done.any():
    logging.info("%d of %d settings were evaluated before.", done.sum(), len(settings))
  return [setting for setting, is_done in zip(settings, done, strict=True) if not is_done]


def _told(found: dict[str, dict]) -> str:
  """All numbers, for the log."""
  return ", ".join(
    f"{column} {form.format(values[metric])}"
    for network, values in found.items()
    for (name, metric), (column, form) in _COLUMNS.items()
    if name == network and metric in values
  )


def _write_report(workdir: str, report: dict) -> None:
  files.write_whole(os.path.join(workdir, "evaluation.json"), json.dumps(report, indent=2))
  files.write_whole(os.path.join(workdir, "evaluation.md"), as_markdown(report))


def as_markdown(report: dict) -> str:
  """The report as a table that a person reads, with the protocol above it."""
  drawn = "step" in report
  title = f"{report['variant']}, step {report['step']}" if drawn else report["samples"]
  lines = [f"# {title}", "", f"{report['num_images']} samples, against:", ""]
  for network in report["networks"]:
    source, floor = network["reference"], network["floor"]
    where = source.get("file") or f"{source['images']} images of split {source['split']}"
    lines.append(f"- {network['name']}: {network['features']}. Reference: {where}.")
    if floor:
      lines[-1] += (
        f" Floor: the Fréchet distance of {floor['is']}, {floor['mean']:.3f} ± {floor['sd']:.3f} "
        f"(mean and standard deviation of {reference_lib.FLOOR_REPEATS})."
      )
  told = [f"{name}: {what}" for name, what in report["metrics"].items()]
  if drawn:
    told += [f"labels: {report['labels']}", f"rounding: {report['rounding']}"]
  lines += ["", "; ".join(told) + "."]
  if report["reference_spectrum"]:
    lines += [
      "",
      f"Nearest neighbour: mean distance of the first {reference_lib.NEIGHBOURS} samples to the "
      "nearest training image; far below that of real images means copying (a little below, "
      "samples that are more typical than real ones, as class means are). High frequencies: power "
      "of the finest octave of frequencies over that of the real images. Accuracy alone says "
      "little: over-guided samples reach 1.",
    ]
  rows = [_row(report, result) for result in report["results"]]
  rows += [_row(report, result, name) for name, result in report["yardsticks"].items()]
  found = dict.fromkeys(column for row in rows for column in row)
  columns = sorted(found, key=lambda column: column != "samples")  # names first, else as found
  lines += [
    "",
    *files.markdown_table(columns, [[row.get(c, "–") for c in columns] for row in rows]),
  ]
  if drawn:
    lines += ["The best w for each number of steps, by " + _headline(report) + ":", ""]
    run = summary.as_run(report)
    best = ((steps, summary.best_w([run], steps)) for steps in summary.step_counts([run]))
    lines += [f"- NFE {steps}: w = {w:g}" for steps, w in best]
    lines += [""]
  return "\n".join(lines)


def _headline(report: dict) -> str:
  return _COLUMNS[report["networks"][0]["name"], "frechet_distance"][0]


def _row(report: dict, result: dict, name: str = "") -> dict[str, str]:
  """{column: cell} of a result."""
  row = {"samples": name} if name or "steps" not in result else {}
  row |= {k: f"{result[k]:g}" for k in _SETTING if k in result}
  for (network, metric), (column, form) in _COLUMNS.items():
    values = result["scores"].get(network, {})
    if metric in values:
      row[column] = form.format(values[metric])
      if f"{metric}_sd" in values:
        row[column] += f" ± {form.format(values[f'{metric}_sd'])}"
  if "spectrum" in result:
    octave = [spectra.finest_octave(s) for s in (result["spectrum"], report["reference_spectrum"])]
    row["nearest neighbour"] = f"{result['nearest_neighbour']:.3f}"
    row["high frequencies"] = f"{octave[0] / octave[1]:.2f}"
  if speed := result.get("images_per_second"):
    row["images/s"] = f"{speed['drawn']:.4g}"
    if report["vae"]:
      row["images/s, decoded"] = f"{speed['decoded']:.4g}"
  return row

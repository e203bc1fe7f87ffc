"""From samples to numbers, with the protocol that explains them.

Samples come from a checkpoint's average, or from a file or folder that anything made. They
are drawn, decoded, rounded and seen by the feature networks batch by batch, and not stored.

Axes: N images, B batch, H/W size, C channels.
"""

import collections
from collections.abc import Sequence
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

from ism_jax import data, experiment, generate, paths, restore, sampling
from ism_jax.data import samples as samples_lib
from ism_jax.evaluation import figures, scores, statistics, summary
from ism_jax.evaluation import reference as reference_lib
from ism_jax.evaluation.report import SETTING, folder_of, format_scores, write_report
from ism_jax.experiment import Experiment
from ism_jax.metrics import diagnosis, features
from ism_jax.runtime import files, sharding

PARTIAL = "evaluation_partial.json"
PATHS = 256  # paths whose straightness is measured
PICTURED = 10  # samples that are shown with their nearest real images


def straightness(exp: Experiment, params, w: float, seed: int, labels) -> float:
  """`diagnosis.deviation_from_chord` of paths of these labels [N], as 128 steps sample them."""
  velocity = generate.guided_velocity(exp, None, params)
  x0 = sampling.draw_noise(jax.random.key(seed), np.arange(len(labels)), exp.image_shape)
  c, strength = np.int32(labels), np.full(len(labels), w, np.float32)
  deviation = functools.partial(diagnosis.deviation_from_chord, velocity)
  return float(jax.jit(deviation)(x0, c, strength))


def load_reference(exp: Experiment, mesh, num_images: int | None = None) -> reference_lib.Reference:
  """The reference, on this process's devices of the mesh: what it scores needs no other process.

  Args:
    exp, mesh, num_images: as of `reference.Reference`.
  """
  local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  mesh = mesh if len(local) == mesh.size else sharding.data_mesh(local)
  return reference_lib.Reference(statistics.for_latents(exp, mesh), mesh, num_images)


def check(config) -> None:
  """Raises what would keep `evaluate` from judging this experiment once it is trained."""
  exp = experiment.parse(config)
  generate.pixels_function(exp.data, sharding.data_mesh(), exp.evaluation.rounding)
  generate.class_labels(exp, 1, counts=data.load_source(exp.data).class_counts)
  reference = load_reference(exp, sharding.data_mesh(jax.local_devices()))
  _check_enough(exp, reference)
  features.extractor.cache_clear()  # training needs the memory


def check_writable(out: str) -> None:
  """Raises OSError where results cannot be written to a folder; says how to name another."""
  try:
    files.check_writable(out)
  except OSError as error:
    raise OSError(f"{str(error).rstrip('.')}, by --out=FOLDER.") from error


def _check_enough(exp: Experiment, reference: reference_lib.Reference) -> None:
  count = exp.evaluation.num_images
  reference.check_enough(f"evaluation.num_images={count}", count)


def evaluate(
  config,
  source: str,
  devices=None,
  out: str | None = None,
  *,
  tree: str = "ema",
  settings: Sequence[tuple[int, float]] | None = None,
) -> dict | None:
  """Judges the newest checkpoint, or an export, by `config.evaluation`.

  Writes evaluation.json, evaluation.md, evaluation.png, and a grid of samples for each number of
  steps and w, which samples.png has side by side; where the dataset's images are there, nearest.png
  has some samples of the best setting with those that are nearest to them. Interrupted, it
  continues after the last of these settings that it finished.

  Args:
    source: a workdir, or an export: see `restore.read`.
    devices: that sample; default all.
    out: the folder of what is written; default that of `report.folder_of`.
    tree: the parameters of a workdir, see `restore.trees_of`.
    settings: (steps, w) pairs instead of every number of steps with every w.
  Returns:
    The contents of evaluation.json; None in processes but the first.
  """
  mesh = sharding.data_mesh(devices)
  trained = restore.read(source, tree, config=config, mesh=mesh)
  out = out or folder_of(source, tree)
  exp, params, ev = trained.exp, trained.params, trained.exp.evaluation
  draw_labels = functools.partial(generate.class_labels, exp, counts=trained.class_counts)
  generate.check_decoder(trained)
  draw_labels(1)
  check_writable(out)
  generate.pixels_function(exp.data, mesh, ev.rounding)  # a VAE may be missing
  reference = load_reference(exp, mesh)
  _check_enough(exp, reference)
  header = _describe(trained) | protocol(mesh, reference, ev.num_images)
  path = functools.partial(os.path.join, out)
  samples_at = lambda steps, w: path(f"samples_steps{steps}_w{w:g}")  # files of samples
  pairs = list(ev.settings() if settings is None else settings)
  settings = [(steps, w, seed) for seed in ev.seeds for steps, w in pairs]
  fingerprint = header | {"evaluation": files.as_dict(config)["evaluation"]}
  results = _read_partial(path(PARTIAL), fingerprint)
  extract, compiled = features.extractor(reference.networks, mesh), set()
  for steps, w, seed in _unfinished(settings, results):
    labels = draw_labels(ev.num_images, seed)
    archive = f"{samples_at(steps, w)}_seed{seed}.npz" if ev.save_samples else ""
    drawing = {"schedule": paths.parse_schedule(steps), "w": w, "seed": seed}
    batches = generate.batches(exp, mesh, params, labels, batch_size=ev.batch_size, **drawing)
    result, grid = _judge_batches(exp, reference, extract, batches, archive, steps in compiled)
    compiled.add(steps)
    if jax.process_index() == 0:
      if seed == ev.seeds[0]:
        files.write_whole(f"{samples_at(steps, w)}.png", generate.grid_png(grid, ev.enlarge))
      results[steps, w, seed] = {"steps": steps, "w": w, "seed": seed} | result
      distance = lambda r: r["scores"][reference.networks[0].name]["frechet_distance"]
      if reference.images and distance(result) <= min(map(distance, results.values())):
        _write_neighbours(reference, grid, exp, out)  # of the best one until now
      partial = {"fingerprint": fingerprint, "results": list(results.values())}
      files.write_whole(path(PARTIAL), json.dumps(partial))
      logging.info("%d steps, w=%g, seed %d: %s.", steps, w, seed, format_scores(result["scores"]))
  strengths, straight = sorted({w for _, w in pairs}), []
  if reference.images:  # of a small dataset, so that 128 steps of many paths are affordable
    straight = _straightness_at(strengths, exp, params, draw_labels(PATHS))
  if jax.process_index() != 0:
    return None
  report = header | {
    "results": [results[setting] for setting in settings],
    "yardsticks": reference.yardsticks(ev.num_images),
    "straightness": straight,
    "config": files.as_dict(config),
  }
  write_report(out, report)
  figures.sweep(summary.as_run(report), path("evaluation.png"))
  grids = {f"w = {w:g}": {} for w in strengths}
  for n, w in pairs:
    grids[f"w = {w:g}"][n] = f"{samples_at(n, w)}.png"
  figures.grids(grids, path("samples.png"))
  epath.Path(path(PARTIAL)).unlink(missing_ok=True)
  return report


def _describe(trained: restore.Trained) -> dict:
  """What the samples of a network depend on beside the schedule, w and seed."""
  exp = trained.exp
  return {
    "variant": exp.variant,
    "step": trained.step,
    "parameters": restore.name_of(trained.tree),
    "parameters_checksum": trained.checksum,
    "vae": exp.data.vae,
    "vae_sha256": generate.load_vae(exp.data.vae).sha256 if exp.data.vae else "",
    "labels": exp.evaluation.labels,
    "rounding": exp.evaluation.rounding,
    "computed_in": exp.model.dtype,
    **({"t_interval": exp.objective.t_interval} if exp.objective.t_interval_max else {}),
  }


def _straightness_at(strengths, exp: Experiment, params, labels) -> list[dict]:
  """`straightness` at each w, of which paths that diverge are left out."""
  straight = []
  for w in strengths:
    deviation = straightness(exp, params, w, exp.evaluation.seeds[0], labels)
    if np.isfinite(deviation):
      straight.append({"w": w, "deviation_from_chord": deviation})
    else:
      logging.warning("Paths of 128 steps at w=%g diverge: their straightness is left out.", w)
  return straight


def evaluate_samples(config, out: str, path: str) -> dict:
  """Judges images that anything made, by `config.evaluation`.

  Writes evaluation.json and evaluation.md, and where the dataset's images are there, nearest.png.

  Args:
    out: the folder of these.
    path: a file or folder of images, see `samples.open`.
  """
  exp, mesh = experiment.parse(config), sharding.data_mesh(jax.local_devices())
  samples = samples_lib.open(path)
  check_writable(out)
  reference = load_reference(exp, mesh, samples.count)
  if reference.is_grey and samples.image_shape[2] == 3:
    samples = samples_lib.as_grey(samples)
  reference.check_enough(f"{path} with {samples.count} images", samples.count)
  reference.check_images(path, samples.image_shape, samples.labels)
  batches = samples.batches(exp.evaluation.batch_size)
  unreadable = samples.unreadable
  result = reference.judge(batches, samples.count, samples.labels, unreadable=unreadable)
  if unreadable:
    logging.warning(
      f"{len(unreadable)} of {samples.count} images could not be read and are left out, such as "
      f"{next(iter(unreadable))}; evaluation.json lists them."
    )
  logging.info("%s: %s.", path, format_scores(result["scores"]))
  report = {"samples": path, "sha256": samples.protocol()["sha256"], "labels": "as given"}
  count = samples.count - len(unreadable)
  report |= {"unreadable": unreadable} | protocol(mesh, reference, count)
  report |= {"results": [result], "yardsticks": reference.yardsticks(count)}
  report["config"] = files.as_dict(config)
  write_report(out, report)
  if reference.images:
    _write_neighbours(reference, next(samples.batches(PICTURED)), exp, out)
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
        "floor": reference.floor(n.name, num_images),
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


def _write_neighbours(reference: reference_lib.Reference, images, exp: Experiment, out) -> None:
  """Writes nearest.png of the first images [N, H, W, C]."""
  images = images[:PICTURED]
  path = os.path.join(out, "nearest.png")
  figures.neighbours(images, reference.neighbours(images), exp.evaluation.enlarge, path)


def _judge_batches(exp, reference, extract, batches, archive, compiled):
  """(`reference.Judging.result` with the speed, the first images) of one setting's samples."""
  total, first_process = exp.evaluation.num_images, jax.process_index() == 0
  judging, grid, seconds = reference_lib.Judging(reference, total), None, []
  waiting, writer = collections.deque(), contextlib.nullcontext()
  if archive:
    writer = samples_lib.writer(archive, total, generate.decoded_shape(exp))
  with writer as save, futures.ThreadPoolExecutor(1) as behind:
    for batch in batches:  # the host works on it while the next one is drawn
      seconds.append((len(batch.labels), batch.drawing, batch.drawing + batch.decoding))
      outputs = jax.block_until_ready(extract(batch.images))
      if first_process:
        waiting.append(behind.submit(judging.add, outputs, batch.images, batch.labels))
        if grid is None:
          grid = np.asarray(batch.images)[: len(batch.labels)]
        if save:
          save(np.asarray(batch.images)[: len(batch.labels)], batch.labels)
      if len(waiting) > 1:
        waiting.popleft().result()
    for future in waiting:
      future.result()
  if not first_process:
    return None, None
  speed = None
  if len(timed := np.array(seconds if compiled else seconds[1:])):  # the first batch compiles
    speed = dict(zip(("drawn", "decoded"), timed[:, 0].sum() / timed[:, 1:].sum(0), strict=True))
  return judging.result() | {"images_per_second": speed}, grid


def _read_partial(path: str, fingerprint: dict) -> dict[tuple, dict]:
  """{setting: result} of an evaluation with this fingerprint that was interrupted."""
  if not epath.Path(path).exists():
    return {}
  needed = {"fingerprint": {}, "results": [{"steps": int, "w": float, "seed": int, "scores": {}}]}
  try:
    saved = files.read_json(path, needed, "Beginning anew.")
  except (OSError, ValueError) as error:
    logging.warning("%s", error)
    return {}
  if saved["fingerprint"] != json.loads(json.dumps(fingerprint)):
    logging.info("%s is of another evaluation: beginning anew.", path)
    return {}
  return {tuple(result[k] for k in SETTING): result for result in saved["results"]}


def _unfinished(settings: list[tuple], results: dict) -> list[tuple]:
  """The settings that have no result in the first process."""
  done = np.array([setting in results for setting in settings])
  if jax.process_count() > 1:
    done = multihost_utils.broadcast_one_to_all(done)
  if done.any():
    logging.info("%d of %d settings were evaluated before.", done.sum(), len(settings))
  return [setting for setting, is_done in zip(settings, done, strict=True) if not is_done]

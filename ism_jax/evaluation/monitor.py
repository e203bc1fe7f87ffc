"""The small evaluation while training: samples of the same noise, labels and w each time.

Drawing is started and not waited for, and a thread makes the numbers, so that the devices go on
training.
"""

from concurrent import futures
import functools
import os

from absl import logging
import jax
import numpy as np

from ism_jax import generate, paths
from ism_jax.data import latents
from ism_jax.evaluation import statistics
from ism_jax.evaluation.reference import Reference
from ism_jax.experiment import Experiment
from ism_jax.runtime import files, logs, sharding


class Monitor:
  """Samples of `config.monitor`, looked at and perhaps scored against the reference; seed 0.

  Few samples are farther from the reference by chance: these distances compare with each other, not
  with those of an evaluation of more samples. In floors of their own number neither: where chance
  is larger, a difference is fewer floors.

  Attributes:
    distances: names of the entries that compare runs: the Fréchet distances.
  """

  def __init__(self, exp: Experiment, mesh, workdir: str, class_counts=None):
    self._exp, self._mesh, self._workdir = exp, mesh, workdir
    # A VAE that is missing is missed now.
    generate.pixels_function(exp.data, mesh, exp.evaluation.rounding)
    if exp.data.vae:
      latents.check_vae(exp.data.dir, generate.autoencoder(exp.data))
    # On one device: scores are made by the first process, without the others.
    one_device = sharding.data_mesh(jax.local_devices()[:1])
    count = exp.monitor.num_images
    self._reference = None
    if exp.monitor.score:
      self._reference = Reference(statistics.for_latents(exp, one_device), one_device, count)
    if self._reference:
      self._reference.check_enough(f"monitor.num_images={count}", count, brief=True)
    # One call draws them all; samples beyond num_images fill the mesh and are dropped.
    self._count = -(-exp.monitor.num_images // mesh.size) * mesh.size
    self._labels = generate.class_labels(exp, self._count, counts=class_counts)
    self._thread = futures.ThreadPoolExecutor(1)
    self._scored = []
    networks = self._reference.networks if self._reference else ()
    self.distances = [
      _entry(steps, network.name, "frechet_distance")
      for steps in exp.monitor.steps
      for network in networks
    ]

  def start(self, params) -> dict:
    """Starts drawing: {steps: (images, finite)} on the device."""
    params = jax.device_put(params, sharding.replicated(self._mesh))  # once for all steps
    draw = functools.partial(generate.draw, self._exp, self._mesh, params, labels=self._labels)
    each = {"numbers": np.arange(self._count), "w": np.full(self._count, self._exp.monitor.w)}
    return {
      steps: draw(schedule=paths.parse_schedule(steps), seed=0, **each)
      for steps in self._exp.monitor.steps
    }

  def finish(self, step: int, samples: dict, writer: logs.Writer) -> None:
    """Starts scoring the fetched samples of `step`, and writing numbers and grids."""
    if jax.process_index() == 0:
      self._scored.append(self._thread.submit(self._score, step, samples, writer))

  def wait(self) -> None:
    """Waits until all samples are scored and written; raises what went wrong."""
    while self._scored:
      self._scored.pop(0).result()

  def _score(self, step, samples, writer):
    values = {}
    for steps, (images, finite) in samples.items():
      if not finite:
        raise FloatingPointError(
          f"samples of {steps} steps at step {step} are not finite: lower optimizer.learning_rate."
        )
      images = images[: self._exp.monitor.num_images]
      if self._reference:
        for network, metrics in self._reference.score(images, self._labels[: len(images)]).items():
          values |= {_entry(steps, network, name): v for name, v in metrics.items()}
      png = generate.grid_png(images, self._exp.evaluation.enlarge)
      path = os.path.join(self._workdir, "grids", f"steps{steps}_{step:08d}.png")
      with writer.tolerance():
        files.write_whole(path, png)
      writer.image(step, f"samples/steps_{steps}", png)
    grids = os.path.join(self._workdir, "grids", f"steps*_{step:08d}.png")
    logging.info("Samples of step %d: %s", step, grids)
    if values:
      writer.write(step, values)


def _entry(steps, network: str, metric: str) -> str:
  return f"monitor/steps_{steps}/{network}_{metric}"

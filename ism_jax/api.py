"""What a script or a notebook needs: to train, to load, to sample and to look.

These are the names of `ism_jax` itself; what they hand out is NumPy's or PIL's, and what they log
is what the commands log.

Axes: N images, H/W size, C channels; h/w/c those of what the network sees, which are latents or the
pixels themselves.
"""

import dataclasses
import functools

from absl import flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax import data, generate, model, paths, ranges, restore, sampling, train
from ism_jax import experiment as experiment_lib
from ism_jax.data import labels as labels_lib
from ism_jax.experiment import Experiment
from ism_jax.export import stablehlo
from ism_jax.runtime import commands, files, sharding

picture = generate.picture


@functools.cache
def _log_as_commands_do() -> None:
  """Logs bare lines to stderr. A program of absl's has set this up itself."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(None)
    commands.quiet_libraries()


def load(source: str, *, tree: str = "ema", step: int | None = None, devices=None) -> "Model":
  """A trained network that samples.

  Args:
    source: the workdir of a run; a folder that `python -m ism_jax export` wrote, or its safetensors
      file; or the repository of such an export on the Hugging Face hub: OWNER/NAME, perhaps with
      @REVISION behind it, or the address of its page. "digits" is a small network of handwritten
      digits that comes with this package.
    tree: of a workdir, the parameters that sample: "ema", "target_ema", "params", or of the run's
      further averages one such as "ema:0.999", see `EmaConfig.others`.
    step: of a workdir, the checkpoint; default the newest whole one.
    devices: that sample; default all.
  Raises:
    FileNotFoundError: nothing of the kind is at `source`, or no such step.
    ValueError: it is damaged, or does not fit its config.
  """
  _log_as_commands_do()
  mesh = sharding.data_mesh(devices)
  trained = restore.read(files.local_path(source), tree, step=step, mesh=mesh)
  try:
    generate.check_decoder(trained)
  except FileNotFoundError as error:  # whoever wants no pixels needs no autoencoder
    logging.warning("Latents cannot be decoded: %s", error)
  return Model(trained.exp, trained.params, mesh, trained.about, trained.names)


def fit(config, workdir: str, devices=None) -> "Model":
  """Trains to the end of a config, as `python -m ism_jax.main` does, and returns what samples.

  Called again with the same workdir, it goes on where the run stopped. It never evaluates, nor does
  evaluation.at_end make it. For one process: those of a pod run the command.

  Args:
    config: such as `configs.digits.get_config("ism")`.
    workdir: folder of checkpoints, metrics.jsonl, TensorBoard events and grids.
    devices: that train and sample; default all.
  Raises:
    SystemExit: once SIGTERM, SIGINT (Ctrl-C, or a notebook's stop) or SIGHUP has come and a
      checkpoint is written, as of the command.
  """
  _log_as_commands_do()
  workdir, config = files.local_path(workdir), data.resolve(config)
  train.train(config, workdir, devices)
  return load(workdir, devices=devices)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network with its parameters.

  Attributes:
    experiment: the run's config, validated: `model.experiment.data.num_classes`, ...
    params: nested dict of arrays, on every device of the mesh.
    mesh: the devices that sample.
    about: what the parameters are.
    names: of the classes; None where they have numbers alone.
  """

  experiment: Experiment
  params: dict
  mesh: jax.sharding.Mesh
  about: str
  names: list[str] | None = None

  def __repr__(self):
    exp, count = self.experiment, sum(a.size for a in jax.tree.leaves(self.params))
    network = f"{exp.model.size} of {count:,} parameters"
    return f"Model({network} on {exp.data.name}, {exp.variant}; {self.about})"

  def sample(
    self,
    num_images: int | None = None,
    *,
    steps=None,
    w=None,
    labels=None,
    seed: int = 0,
    noise=None,
    batch_size: int | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Draws samples; those of latents are decoded.

    Args:
      num_images: default as many as `noise`, `labels` or `w` have, or as config.sample says.
      steps: a number of equal steps, 1, 2, 4, ..., 128, or step lengths such as "1/2,1/4,1/4".
      w: guidance, a number or one for each image (a CFG scale of 1 + w). Those of config.sample are
        the defaults of steps and w.
      labels: a class, by name or number, or one for each image; default all in turn. "none", or as
        many as there are classes, is no class.
      seed: of the noise: image i depends only on the seed and on i.
      noise: [N, h, w, c], instead of the seed's; see `noise`.
      batch_size: images at a time; default that of config.sample.
    Returns:
      (uint8 [N, H, W, C], labels int64 [N])
    Raises:
      ValueError: the network cannot sample this.
      FloatingPointError: samples are not finite.
    """
    exp = self.experiment
    n = _count(num_images, noise=noise, labels=labels, w=w) or exp.sample.num_images
    schedule = exp.sample.schedule if steps is None else paths.parse_schedule(steps)
    w = _one_each("w", exp.sample.w if w is None else w, n)
    if noise is not None:
      noise = np.asarray(noise, np.float32)
      if noise.shape != (needed := (n, *exp.image_shape)):
        raise ValueError(f"noise is {noise.shape}; needed is {needed}, as of model.noise({n}).")
    batch_size = exp.sample.batch_size if batch_size is None else batch_size
    ranges.check("batch_size", batch_size, experiment_lib.BatchSize)
    ranges.check("seed", seed, ranges.Seed)
    draw = functools.partial(generate.batches, exp, self.mesh, self.params, self._labels(labels, n))
    batches = draw(schedule=schedule, w=w, seed=seed, batch_size=batch_size, noise=noise)
    parts = [(np.asarray(batch.images)[: len(batch.labels)], batch.labels) for batch in batches]
    return tuple(map(np.concatenate, zip(*parts, strict=True)))

  def noise(self, num_images: int, seed: int = 0) -> np.ndarray:
    """The noise that `sample` starts from, float32 [N, h, w, c]."""
    ranges.check("seed", seed, ranges.Seed)
    shape = self.experiment.image_shape
    return np.asarray(sampling.draw_noise(jax.random.key(seed), np.arange(num_images), shape))

  def velocity(self, x_t, t, c, d=0.0, w=0.0):
    """s(x_t, t, c, d, w), the network itself: x_{t+d} = x_t + d s.

    Args:
      x_t: [N, h, w, c].
      t, c, d, w: time, class, step size and guidance, numbers or one for each image; see `paths`
        for d = 0.
    Returns:
      A JAX array [N, h, w, c].
    May be called inside of jit, where the parameters become constants of the program; those of a
    large network are better an argument, see `model.velocity_function`.
    """
    exp, n = self.experiment, x_t.shape[0]
    network = model.at_interval(exp.network(), self.params, exp.objective.t_interval)
    t, d, w = (jnp.broadcast_to(jnp.asarray(a, jnp.float32), (n,)) for a in (t, d, w))
    c = jnp.broadcast_to(jnp.asarray(c, jnp.int32), (n,))
    return model.velocity_function(*network)(jnp.asarray(x_t), t, c, d, w)

  def export_sampler(self, out: str, schedules=(1, 4)) -> None:
    """Writes the sampler as StableHLO, a folder that samples without this package: `stablehlo`.

    Args:
      out: a folder that is empty or not there.
      schedules: one or more, as `steps` of `sample`.
    """
    out = files.local_path(out)
    stablehlo.write(self.experiment, self.params, out, schedules, about=self.about)

  def _labels(self, labels, n) -> np.ndarray:
    classes = self.experiment.data.num_classes
    labels = _one_each("labels", np.arange(n) % classes if labels is None else labels, n)
    if labels.dtype.kind not in "iuU":
      raise ValueError(f"labels are {labels.dtype}; give whole numbers, or names.")
    number_of = lambda label: labels_lib.number_of(label, classes, self.names)
    return np.array(list(map(number_of, labels.tolist())), np.int64)


def _count(num_images, **arrays) -> int | None:
  """How many images are asked for; None where nothing says so."""
  lengths = {name: len(a) for name, a in arrays.items() if np.ndim(a) > 0}
  counts = {"num_images": num_images} | lengths if num_images is not None else lengths
  if len(set(counts.values())) > 1 or min(counts.values(), default=1) < 1:
    listing = ", ".join(f"{name}: {count}" for name, count in counts.items())
    raise ValueError(f"one number of images is needed, at least 1; given are {listing}.")
  return next(iter(counts.values()), None)


def _one_each(name, values, n) -> np.ndarray:
  values = np.asarray(values)
  if values.ndim > 1:
    raise ValueError(f"{name} has shape {values.shape}; needed is a number, or [{n}].")
  return np.broadcast_to(values, (n,))

"""An experiment: the validated form of a config.

`ConfigDict` values cross into frozen dataclasses here and nowhere else, and whatever about them can
be wrong together (batch and devices, image and patch, wavelets and image size, steps off the grid)
is an error here, before anything is compiled or written.
"""

import dataclasses
import math
import typing
from typing import Annotated

from absl import logging
from flax import traverse_util
import ml_collections

from ism_jax import couplings, objectives, paths, protocol, ranges, state, wavelets
from ism_jax import model as model_lib
from ism_jax.data import latents, pipeline
from ism_jax.pretrained import sit
from ism_jax.runtime import files, sharding

Count = Annotated[int, "[1, 1e9]"]
CountOrNone = Annotated[int, "[0, 1e9]"]
BatchSize = Annotated[int, "[1, 1e6]"]
MAX_PAIRS = 2**20  # whose costs are 4 TB
MAX_ENLARGED = 1024  # pixels of an image in a grid of 80


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is written down while training.

  Attributes:
    every: steps between entries of metrics.jsonl, TensorBoard and the progress line.
    gradients_every: steps between measurements of the gradient norm of each single loss, each of
      which costs about three steps; 0 for none.
    wandb: PROJECT or ENTITY/PROJECT of Weights & Biases that is written too; "" for none.
  """

  every: Count
  gradients_every: CountOrNone
  wandb: str = ""

  def __post_init__(self):
    ranges.check_fields(self, "log")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are written and which stay.

  Attributes:
    every: steps between checkpoints (there is one at the end too).
    keep: how many of the latest stay on disk.
    keep_every: those of steps that are a multiple of it stay as well; 0 for none.
  """

  every: Count
  keep: Count
  keep_every: CountOrNone

  def __post_init__(self):
    ranges.check_fields(self, "checkpoint")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """What `--mode=sample` draws.

  Attributes:
    steps: a count or a schedule, see `paths.parse_schedule`.
    w: guidance.
    label: a class, by name or number; "none" for no class, "all" for all in turn; see
      `data.labels`.
    seed: of noise; image i depends only on the seed and on i.
    batch_size: images at a time, over all devices.
  """

  num_images: Annotated[int, "[1, 1e8]"]
  steps: str
  w: ranges.Guidance
  label: str
  seed: ranges.Seed
  batch_size: BatchSize

  def __post_init__(self):
    ranges.check_fields(self, "sample")

  @property
  def schedule(self):
    """The parsed `steps`."""
    return paths.parse_schedule(self.steps)


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
  """The small evaluation while training: the same noise, labels and w each time.

  Attributes:
    every: steps between them (there is one at the end too); 0 for none.
    num_images: samples per number of steps. The first 80 are a grid in TensorBoard and `grids/`.
    steps: numbers of steps.
    w: guidance.
    score: whether the samples are scored as an evaluation's are, or only shown.
  """

  every: CountOrNone
  num_images: Annotated[int, "[1, 100000]"]
  steps: protocol.StepCounts
  w: ranges.Guidance
  score: bool

  def __post_init__(self):
    ranges.check_fields(self, "monitor")


@dataclasses.dataclass(frozen=True)
class Marks:
  """What a key of the config means to a run beside its value.

  A field has them as its metadata, or else as that of its section.

  Attributes:
    learnt: whether it changes what is learnt, so that runs that differ in it do not compare as
      seeds of one; the others say how a run is computed, watched and judged.
    fixed: whether a checkpoint depends on it: with another value it is another run's.
    path: whether it names files of the machine that trained.
    default: what configs mean that are older than the key; dataclasses.MISSING where none are.
    kind: its type, with the range of its values, see `ranges`.
  """

  kind: object
  default: object
  learnt: bool
  fixed: bool = False
  path: bool = False


_LEARNT, _UNLEARNT = {"learnt": True}, {"learnt": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """A whole config.

  A key that came later has a default here, which older checkpoints' configs take.

  Attributes:
    variant: the row of the ablation this is; a name, nothing reads it to decide anything.
    seed: of initialisation, noise and all draws.
    steps: length of the run; rounded up to whole pools.
    batch_size: M, images per step over all devices.
    micro_batches: pieces of each device's rows, one after the other, to save memory.
    scan_steps: steps per compiled call; divides the pool size.
    init_from: the network with which a run begins: a state dict of SiT's or an export, by its path
      or its name on the Hugging Face hub, or the workdir of a run; see `restore.read_start`. "" is
      a new network. A run that continues does not read it.
    init_time: how time runs in that state dict: "noise_to_data", as here and in SiT's own code, or
      "data_to_noise", as in REPA's and DMF's, which is converted; see `sit.reverse_time`.
    placement: of the train state: "replicated" (all of it on every device), "sharded" (split over
      the devices of a slice; a step gathers the parameters) or "auto" (sharded where several
      accelerators share the work, but for `steps.placement`'s exceptions).
    gradient_dtype: in which gradients are summed over devices, "float32" or "bfloat16", which
      halves what the links carry.
    profile_steps: how many steps are profiled, from the second pool of a run on; 0 for none.
  """

  variant: str = dataclasses.field(metadata=_LEARNT | {"fixed": True})
  seed: ranges.Seed = dataclasses.field(metadata=_UNLEARNT | {"fixed": True})
  steps: Count = dataclasses.field(metadata=_LEARNT)
  batch_size: BatchSize = dataclasses.field(metadata=_LEARNT | {"fixed": True})
  micro_batches: BatchSize = dataclasses.field(metadata=_UNLEARNT)
  scan_steps: Count = dataclasses.field(metadata=_UNLEARNT)
  init_from: str = dataclasses.field(metadata=_LEARNT | {"path": True})
  init_time: Annotated[str, sit.TIMES] = dataclasses.field(
    default="noise_to_data", metadata=_LEARNT
  )
  placement: Annotated[str, sharding.PLACEMENTS] = dataclasses.field(metadata=_UNLEARNT)
  gradient_dtype: Annotated[str, state.DTYPES] = dataclasses.field(
    default="float32", metadata=_LEARNT
  )
  profile_steps: CountOrNone = dataclasses.field(default=0, metadata=_UNLEARNT)
  data: pipeline.DataConfig = dataclasses.field(metadata=_LEARNT)
  model: model_lib.ModelConfig = dataclasses.field(metadata=_LEARNT)
  objective: objectives.ObjectiveConfig = dataclasses.field(metadata=_LEARNT)
  wavelet: wavelets.WaveletConfig = dataclasses.field(metadata=_LEARNT)
  coupling: couplings.CouplingConfig = dataclasses.field(metadata=_LEARNT)
  optimizer: state.OptimizerConfig = dataclasses.field(metadata=_LEARNT)
  ema: state.EmaConfig = dataclasses.field(metadata=_LEARNT)
  log: LogConfig = dataclasses.field(metadata=_UNLEARNT)
  checkpoint: CheckpointConfig = dataclasses.field(metadata=_UNLEARNT)
  sample: SampleConfig = dataclasses.field(metadata=_UNLEARNT)
  monitor: MonitorConfig = dataclasses.field(metadata=_UNLEARNT)
  evaluation: protocol.EvaluationConfig = dataclasses.field(metadata=_UNLEARNT)

  def __post_init__(self):
    ranges.check_fields(self)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """[H, W, C] of what the network sees."""
    return self.data.image_shape

  @property
  def null_class(self) -> int:
    """The label of "no class": the last row of the label table."""
    return self.data.num_classes

  @property
  def total_steps(self) -> int:
    """`steps`, rounded up to whole pools."""
    return -(-self.steps // self.coupling.pool_size) * self.coupling.pool_size

  def network(self, device_kind: str | None = None) -> model_lib.SiT:
    """The model, for devices of this kind; it has a w input where guidance is intrinsic."""
    objective = self.objective
    inputs = {"w_scaled": objective.w_scaled, "interval": objective.t_interval_max > 0}
    cfg, classes = self.model, self.data.num_classes
    return model_lib.SiT(cfg, classes, objective.intrinsic, device_kind, **inputs)


def _marks(config_class, section=None, prefix: str = "") -> dict[str, Marks]:
  """{"section.key": marks} of a dataclass of the config, within a section with this metadata."""
  marks = {}
  for field in dataclasses.fields(config_class):
    key, metadata = prefix + field.name, (section or {}) | field.metadata
    if dataclasses.is_dataclass(field.type):
      marks |= _marks(field.type, metadata, f"{key}.")
    else:
      marks[key] = Marks(field.type, field.default, **metadata)
  return marks


MARKS = _marks(Experiment)


def _as_tuples(value):
  """Lists (of JSON, of ConfigDict) as tuples, so that dataclasses hash and compare."""
  return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _build(config_class, values, prefix: str = ""):
  """config_class(**values), section by section, naming whatever key is unknown or missing."""
  if not hasattr(values, "keys"):
    raise ValueError(f"config.{prefix.rstrip('.')}={values!r}: give a dict of its keys.")
  fields = dataclasses.fields(config_class)
  names = {field.name for field in fields}
  if unknown := sorted(set(values.keys()) - names):
    raise ValueError(
      f"config has unknown key {', '.join(prefix + k for k in unknown)}; "
      f"{prefix.rstrip('.') or 'it'} has {', '.join(sorted(names))}. Use one of them."
    )
  required = {field.name for field in fields if field.default is dataclasses.MISSING}
  if missing := sorted(required - set(values.keys())):
    raise ValueError(f"config lacks {', '.join(prefix + k for k in missing)}; add it.")
  arguments = {}
  for name, value in values.items():
    kind = config_class.__annotations__[name]
    is_section = dataclasses.is_dataclass(kind)
    arguments[name] = _build(kind, value, f"{prefix}{name}.") if is_section else _as_tuples(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
      arguments[name] = str(value)  # as older configs have labels
    if isinstance(value, str):  # nothing but paths begins as those that this changes
      arguments[name] = files.local_path(value)
  return config_class(**arguments)


def parse(config) -> Experiment:
  """The validated experiment of a ConfigDict, or of the nested dict in a checkpoint.

  Raises:
    ValueError: naming the value and the remedy.
  """
  exp = _build(Experiment, config)
  if exp.coupling.pool_size % exp.scan_steps:
    raise ValueError(
      f"scan_steps={exp.scan_steps} does not divide coupling.pool_size="
      f"{exp.coupling.pool_size}: a compiled call runs part of a pool. Set scan_steps="
      f"{math.gcd(exp.scan_steps, exp.coupling.pool_size)}."
    )
  check_pairs(exp.coupling.pool_size, exp.batch_size)
  model_lib.check_image_size(exp.model, exp.image_shape[:2])
  pixels = max(exp.image_shape[:2]) * (latents.DOWNSAMPLING if exp.data.vae else 1)
  if exp.evaluation.enlarge * pixels > max(pixels, MAX_ENLARGED):
    raise ValueError(
      f"evaluation.enlarge={exp.evaluation.enlarge} makes {pixels} pixels of an image (data."
      f"image_size={exp.data.image_size}) {exp.evaluation.enlarge * pixels} in a grid, and "
      f"{MAX_ENLARGED} are the most: set it to {max(1, MAX_ENLARGED // pixels)} or less."
    )
  wavelets.depth(exp.wavelet, exp.image_shape[:2])
  objective = exp.objective
  if exp.wavelet.form == "adaptive" and objective.shares[2] and objective.target == "two_steps":
    raise ValueError(
      "wavelet.form='adaptive' with objective.target='two_steps', whose targets have no variance: "
      "as their error falls its weight rises, and nothing else is learnt. Set wavelet.form='norm', "
      "or objective.target='identity'."
    )
  if objective.target == "identity" and exp.model.attention != "xla":
    raise ValueError(
      f"objective.target='identity' is a derivative in forward mode, which fused attention has not:"
      f" set model.attention='xla' (it is {exp.model.attention!r})."
    )
  drawn = [("sample", exp.sample.steps, exp.sample.w)]
  drawn += [("monitor", steps, exp.monitor.w) for steps in exp.monitor.steps if exp.monitor.every]
  drawn += [("evaluation", steps, w) for steps, w in exp.evaluation.settings()]
  for section, steps, w in drawn:
    try:
      check_guidance(exp, paths.parse_schedule(steps), w)
    except ValueError as error:
      raise ValueError(f"config.{section}: {error}") from None
  return exp


def as_config(saved: dict) -> ml_collections.ConfigDict:
  """The ConfigDict of a checkpoint's nested dict, as configs/ make it.

  What may be a number or several numbers has any type there, so that a flag sets either.
  """
  flat = {k: _as_tuples(v) for k, v in traverse_util.flatten_dict(saved, sep=".").items()}
  for key in flat.keys() & MARKS.keys():
    if MARKS[key].kind is str:
      flat[key] = str(flat[key])  # labels were numbers
    if typing.get_origin(MARKS[key].kind) is typing.Union:
      flat[key] = ml_collections.FieldReference(flat[key], field_type=object)
  return ml_collections.ConfigDict(traverse_util.unflatten_dict(flat, sep="."))


def check_guidance(exp: Experiment, schedule, w: float) -> None:
  """Raises for a w that the network cannot sample in a schedule; warns of one beyond training."""
  ranges.check("w", w, ranges.Guidance)
  objective = exp.objective
  if objective.intrinsic and w > objective.w_max:
    logging.warning("w=%g is beyond the trained maximum, w_max=%g.", w, objective.w_max)
  if not objective.any_w and w != objective.fixed_w and any(d > 0 for _, d in schedule):
    raise ValueError(
      f"w={w} in {len(schedule)} steps: variant {exp.variant!r} has learnt the fixed guidance "
      f"w={objective.fixed_w} in its long steps. Use w={objective.fixed_w}, or 128 steps."
    )


def check_continues(saved: dict, config: dict) -> None:
  """Raises if a checkpoint made with `saved` is not of `config`'s run; logs what else differs."""
  before, now = flatten(saved), flatten(config)
  differ = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
  describe = lambda keys: ", ".join(f"{k}={before.get(k)!r}, now {now.get(k)!r}" for k in keys)
  if fixed := [k for k in differ if k in MARKS and MARKS[k].fixed]:
    raise ValueError(
      f"the checkpoint was made with {describe(fixed)}. Pass the --config and variant it was "
      "trained with, or another --workdir."
    )
  if differ:
    logging.info("Differs from the checkpoint's config: %s.", describe(differ))


def check_interval(saved: dict, exp: Experiment) -> None:
  """Raises if samples are to have another guidance interval than the network has learnt."""
  objective, trained = exp.objective, flatten(saved)["objective.t_interval"]
  is_free = objective.t_interval_max or objective.guidance == "two_pass"
  if objective.t_interval != trained and not is_free:
    raise ValueError(
      f"objective.t_interval={objective.t_interval} where {trained} was trained: without "
      "objective.t_interval_max the network has learnt one. Leave it out."
    )


def flatten(tree: dict) -> dict:
  """{"a": {"b": 1}} -> {"a.b": 1}; lists become tuples, and keys that came later have defaults."""
  defaults = {k: m.default for k, m in MARKS.items() if m.default is not dataclasses.MISSING}
  values = traverse_util.flatten_dict(tree, sep=".")
  was_number = lambda k, v: k in MARKS and MARKS[k].kind is str and isinstance(v, int)  # labels
  return defaults | {k: str(v) if was_number(k, v) else _as_tuples(v) for k, v in values.items()}


def check_pairs(pool_size: int, batch_size: int) -> None:
  """Raises ValueError for a pool that is larger than its costs can be."""
  if (pairs := pool_size * batch_size) > MAX_PAIRS:
    raise ValueError(
      f"a pool of {pool_size} batches of {batch_size} has {pairs} images to pair, and {MAX_PAIRS} "
      "is the most: set coupling.pool_size (of --pools) or batch_size lower."
    )


def check_devices(exp: Experiment, devices: int) -> None:
  """Raises ValueError where the batch does not split over devices and micro-batches, or losses."""
  pieces, shares = devices * exp.micro_batches, exp.objective.shares
  unit = math.lcm(pieces, sum(shares))
  if exp.batch_size % unit:
    nearest = max(unit, round(exp.batch_size / unit) * unit)
    raise ValueError(
      f"batch_size={exp.batch_size} does not split over {devices} devices x {exp.micro_batches} "
      f"micro-batches, or into shares {shares}: it must be a multiple of {pieces} and of "
      f"{sum(shares)}; the nearest is {nearest}."
    )
  together = sum(shares) * (1 + shares[2] % 2)
  if exp.objective.rollout and exp.batch_size // pieces % together:
    unit = pieces * together
    raise ValueError(
      f"batch_size={exp.batch_size} gives {exp.batch_size // pieces} rows to each of {pieces} "
      f"devices' micro-batches, and objective.rollout joins consistency rows in twos: shares "
      f"{shares} need a multiple of {unit}; the nearest is "
      f"{max(unit, round(exp.batch_size / unit) * unit)}."
    )

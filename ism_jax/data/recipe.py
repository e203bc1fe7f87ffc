"""What a config leaves to the data: its sizes are looked up, and the rest follows by a rule.

A value that is -1 or "auto" is left open. `resolve` makes it concrete before anything else reads
the config, so that checkpoints say what was trained. configs/README.md has the rule as a table.
"""

import dataclasses
import math
from typing import NamedTuple

from absl import logging
import ml_collections

from ism_jax.data import folders, latents, pipeline, published
from ism_jax.pretrained import weights
from ism_jax.runtime import files

_EPOCHS = 500
_STEPS = 2_000, 800_000  # the least, and the paper's
_TOKENS = {"XXS": 64, "XS": 64}  # of an image; of other networks 256


class Level(NamedTuple):
  """What sets of up to `images` images are trained with."""

  images: float
  size: str
  batch_size: int
  learning_rate: float
  schedule: str


LEVELS = (
  Level(3_000, "XXS", 64, 4e-3, "cosine"),
  Level(10_000, "XS", 128, 2e-3, "cosine"),
  Level(100_000, "S", 256, 4e-4, "cosine"),
  Level(1_000_000, "B", 256, 1e-4, "constant"),
  Level(math.inf, "XL", 256, 1e-4, "constant"),
)
# Of these, -1 and "auto" are no values: all that `rule` and `_of_data` make.
OPEN = (
  *("steps", "batch_size", "scan_steps", "model.size", "model.dtype", "model.remat"),
  *("coupling.pool_size", "optimizer.learning_rate", "optimizer.schedule"),
  *("optimizer.warmup_steps", "ema.inference_decay", "ema.target_decay"),
  *("checkpoint.every", "monitor.every", "evaluation.num_images"),
  "evaluation.networks",
  *("data.image_size", "data.channels", "data.num_classes", "data.vae", "data.vae_scale"),
)


class Facts(NamedTuple):
  """What the data itself says.

  Attributes:
    images: to train on.
    shape: [H, W, C] of what the network sees.
    values: of the section `data` of a config.
  """

  images: int
  shape: tuple[int, int, int]
  classes: int
  values: dict


def rule(images: int, shape: tuple[int, int, int], chosen: dict) -> dict:
  """{"section.key": value} of all that follows from a number of images [H, W, C].

  Args:
    chosen: {"section.key": value} of what somebody has chosen, which stays, and which the others
      follow. A network may be chosen without its patch: "SiT-B/auto".
  """
  level = next(level for level in LEVELS if images <= level.images)
  values = dict(chosen)
  add = values.setdefault
  batch_size = add("batch_size", level.batch_size)
  steps = add("steps", min(max(_one_digit(_EPOCHS * images / batch_size), _STEPS[0]), _STEPS[1]))
  pool_size = add("coupling.pool_size", max(4, min(32, _power_of_two(images / batch_size))))
  add("scan_steps", math.gcd(8, pool_size))
  size, _, patch = values.get("model.size", f"SiT-{level.size}/auto").partition("/")
  size = size.removeprefix("SiT-")
  patch = _patch(shape, _TOKENS.get(size, 256)) if patch == "auto" else patch
  values["model.size"] = f"SiT-{size}/{patch}"
  add("model.dtype", "float32" if size in _TOKENS else "bfloat16")
  add("model.remat", "none" if size in ("S", *_TOKENS) else "names")
  add("optimizer.learning_rate", level.learning_rate)
  schedule = add("optimizer.schedule", level.schedule)
  add("optimizer.warmup_steps", steps // 20 if schedule == "cosine" else 0)
  decay = add("ema.inference_decay", 0.999 if steps < 50_000 else 0.9999)
  add("ema.target_decay", decay)  # left open by the variants with one EMA
  add("checkpoint.every", min(max(steps // 10, 100), 10_000))
  add("monitor.every", min(max(steps // 10, 100), 25_000))
  add("evaluation.num_images", min(max(images, 500), 50_000))
  return values


def _patch(shape: tuple[int, int, int], tokens: int) -> int:
  """The patch with which an image has most nearly this many tokens, as a ratio."""
  fitting = [p for p in (1, 2, 4, 8) if shape[0] % p == shape[1] % p == 0]
  return min(fitting, key=lambda p: abs(math.log(shape[0] * shape[1] / p**2 / tokens)))


def _one_digit(number: float) -> int:
  """A number rounded to one digit: a few images more or less rarely change it."""
  unit = 10 ** int(math.log10(max(number, 1)))
  return round(number / unit) * unit


def _power_of_two(number: float) -> int:
  """The largest that is not greater, but at least 1."""
  return 2 ** int(math.log2(max(number, 1)))


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config with everything concrete that is left to the data, which is prepared for it.

  Logs what follows from the data. A config that leaves nothing open is returned as it is, and no
  data is touched.

  Raises:
    ValueError, OSError: the data is absent or cannot be prepared, see `folders.prepare`.
  """
  left = [key for key in OPEN if _is_open(_value(config, key))]
  if not left:
    return config
  facts = _of_data(config.data)
  config = fill(config, facts)
  lines = [f"  {key}={_value(config, key)}" for key in left]
  logging.info(
    "%d training images of %s, classes: %d. --config.KEY=VALUE overrides a value:\n%s",
    *(facts.images, "x".join(map(str, facts.shape)), facts.classes, "\n".join(lines)),
  )
  if facts.classes == 1:
    logging.info("There is one class: the network is unconditional, and guidance w does nothing.")
  return config


def fill(config: ml_collections.ConfigDict, facts: Facts) -> ml_collections.ConfigDict:
  """A copy of a config with everything concrete that it leaves to data with these facts."""
  values = {key: _value(config, key) for key in OPEN}
  left = [key for key, value in values.items() if _is_open(value)]
  chosen = {k: v for k, v in values.items() if k not in left or str(v).startswith("SiT-")}
  if "data.vae_scale" in left:  # of the same autoencoder; -1 is a value of a shift
    left.append("data.vae_shift")
  if "data.title" in facts.values:
    left.append("data.title")
  filled = rule(facts.images, facts.shape, chosen) | facts.values
  filled["evaluation.networks"] = _networks(facts.classes)
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.update_from_flattened_dict({key: filled[key] for key in left})
  return config


def _networks(classes: int) -> str:
  """Published feature networks whose weights are here; else those that are made of the dataset."""
  from ism_jax.pretrained import dinov2, inception  # whoever reads a config needs no networks

  modules = {"inception": inception, "dinov2": dinov2}
  here = [n for n, m in modules.items() if (weights.cache() / m.PUBLISHED.file).is_file()]
  return ",".join(here or ["random", "classifier"][: 1 if classes == 1 else 2])


def _value(config, key: str):
  """The value of "section.key"; None where there is none, of which `experiment.parse` tells."""
  for name in key.split("."):
    config = config.get(name) if hasattr(config, "keys") else None
  return config


def _is_open(value) -> bool:
  return (isinstance(value, str) and value.endswith("auto")) or (
    isinstance(value, int | float) and value == -1
  )


def _of_data(section) -> Facts:
  """What the data of a section of a config says; prepares a folder's images."""
  names = [f.name for f in dataclasses.fields(pipeline.DataConfig) if f.name in section]
  values = {name: section[name] for name in names} | {"dir": files.local_path(section.dir)}
  valid = {"image_size": 1, "channels": 1, "num_classes": 1, "vae_scale": 1.0}
  left = {name for name in valid if _is_open(values[name])}
  data = pipeline.DataConfig(**values | {name: valid[name] for name in left})  # which checks them
  values = {}
  if data.name == latents.NAME:
    content = latents.read_manifest(data.dir)
    height, width, channels = content["moments"]
    images, shape, classes = content["images"], (height, width, channels // 2), content["classes"]
    factors = content["scaling_factor"], content["shift_factor"]
    values = dict(zip(("vae", "vae_scale", "vae_shift"), (content["vae"], *factors), strict=True))
  elif data.name == folders.NAME:
    if "image_size" in left and not folders.is_prepared(data.dir):
      raise ValueError(
        "data.image_size=-1: the images of a folder have any size. Give that of the network, such "
        "as --config.data.image_size=32 or (48, 64), height and width."
      )
    content = folders.read_manifest(folders.prepare(data.dir, folders.settings_of(data)))
    images, shape = sum(content["counts"]["train"]), folders.image_shape(content)
    classes = content["classes"]
    values["title"] = section.title or content["title"]
  else:
    builder = published.tfds_builder(data.name, data.dir)
    image, label = published.image_and_label(data.name, builder.info.features, one_size=True)
    images, shape, classes = len(published.open_split(builder, "train")), image.shape, label.names
  values |= {
    "image_size": shape[0] if shape[0] == shape[1] else tuple(shape[:2]),
    "channels": shape[2],
    "num_classes": len(classes),
  }
  return Facts(images, tuple(shape), len(classes), {f"data.{k}": v for k, v in values.items()})

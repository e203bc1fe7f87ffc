"""The protocol of an evaluation: how many samples, drawn how, on which feature networks.

Networks are known by their names here; `features` has the networks themselves.
"""

import dataclasses
import itertools
import re
from typing import Annotated

from ism_jax import ranges
from ism_jax.runtime import files as files_lib

ROUNDINGS = ("nearest", "truncate")
LABELS = ("balanced", "uniform", "data")
# Of which `paths.parse_schedule` takes the powers of two.
StepCounts = Annotated[tuple[Annotated[int, "[1, 128]"], ...], ranges.DISTINCT]

OF_THE_DATASET = ("classifier", "random")  # made of the dataset's own images
PUBLISHED = ("inception", "dinov2")  # have files of weights
NAMES = (*OF_THE_DATASET, *PUBLISHED)


def parse_files(option: str, value: str, names) -> dict[str, str]:
  """{network: file} of the value "NETWORK=FILE,..." of an option, or of FILE for a single network.

  The networks in use have these names. A comma that no NETWORK= follows is part of a FILE.
  """
  files = {}
  for entry in filter(None, re.split(r",(?=\w+=)", value)):
    name, named, path = entry.partition("=")
    if len(names) == 1 and not (named and name in NAMES):
      name, path = names[0], entry
    if name not in names or not path or name in files:
      raise ValueError(
        f"{option}={value!r}: {entry!r} is no NETWORK=FILE of one of the networks "
        f"{', '.join(names)}, once each. Write {names[0]}=FILE."
      )
    files[name] = files_lib.local_path(path)
  return files


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What `evaluate` measures, by which protocol.

  Attributes:
    num_images: samples per setting.
    steps, w: every number of steps meets every w.
    seeds: of noise, one evaluation each.
    batch_size: images at a time, over all devices.
    enlarge: pixels of a grid's PNG per image pixel.
    labels: "balanced", all classes in turn; "uniform", drawn; or "data", drawn as often as each
      class is in the data that was trained on.
    rounding: from [-1, 1] to 0..255: "nearest", or "truncate" as ADM has it, see
      `generate.to_uint8`.
    networks: feature networks, comma-separated, see `features`; the first one's Fréchet distance is
      the headline.
    weights: of published networks, comma-separated NETWORK=FILE, or one FILE where there is one
      network; for others the published ones are found or downloaded; "random" for checks.
    reference: files of reference statistics, in the same form, one for each network; "" for the
      dataset's own images.
    reference_split: of the dataset, then.
    save_samples: whether the samples are written, as npz for other evaluators.
    at_end: whether training ends with an evaluation.
  """

  num_images: Annotated[int, "[1, 1e6]"]
  steps: StepCounts
  w: Annotated[tuple[ranges.Guidance, ...], ranges.DISTINCT]
  seeds: Annotated[tuple[ranges.Seed, ...], ranges.DISTINCT]
  batch_size: Annotated[int, "[1, 1e6]"]
  enlarge: Annotated[int, "[1, 64]"]
  labels: Annotated[str, LABELS]
  rounding: Annotated[str, ROUNDINGS]
  networks: str
  weights: str = dataclasses.field(metadata={"path": True})
  reference: str = dataclasses.field(metadata={"path": True})
  reference_split: str
  save_samples: bool
  at_end: bool

  def __post_init__(self):
    ranges.check_fields(self, "evaluation")
    names = self.network_names()
    networks = f"evaluation.networks={self.networks!r}"
    if wrong := [name for name in names if name not in NAMES]:
      raise ValueError(f"{networks}: {wrong[0]!r} is unknown; known are {', '.join(NAMES)}.")
    if len(set(names)) < len(names):
      raise ValueError(f"{networks} names a network twice: name each once.")
    files = self.reference_files()
    of_dataset = [name for name in names if name in OF_THE_DATASET]
    if of_dataset and (wrong := of_dataset if files else self.weight_files().keys() & of_dataset):
      raise ValueError(
        f"{networks}: {', '.join(wrong)} is made of the dataset and takes no file of weights or "
        "reference statistics: leave evaluation.weights and evaluation.reference empty."
      )
    if files and (missing := [name for name in names if name not in files]):
      raise ValueError(
        f"evaluation.reference={self.reference!r} has no file for {', '.join(missing)}; add "
        f"{missing[0]}=FILE."
      )

  def network_names(self) -> tuple[str, ...]:
    """Those of `networks`."""
    return tuple(self.networks.split(","))

  def weight_files(self) -> dict[str, str]:
    """{network: file} of `weights`."""
    return parse_files("evaluation.weights", self.weights, self.network_names())

  def reference_files(self) -> dict[str, str]:
    """{network: file} of `reference`."""
    return parse_files("evaluation.reference", self.reference, self.network_names())

  def settings(self) -> list[tuple[int, float]]:
    """The (steps, w) pairs to measure."""
    return list(itertools.product(self.steps, self.w))

"""TPUs that are not there: their names, their devices to compile for, and their links."""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies
import numpy as np

from ism_jax.performance import hlo
from ism_jax.runtime import chips

_CHIPS = {chip.name: chip for chip in chips.CHIPS.values()}
_HOP = 1e-6  # seconds, about, from a chip to its neighbour: what the smallest collectives cost


@dataclasses.dataclass(frozen=True)
class Topology:
  """TPUs that are not there.

  Attributes:
    name: such as 2xv5e:16x16.
    shape: of one slice.
    slices: how many.
    chip: its datasheet.
    devices: JAX's, to compile for and not to run on, in the order of the mesh.
  """

  name: str
  shape: tuple[int, ...]
  slices: int
  chip: chips.Chip
  devices: tuple

  def ring(self, group: tuple[int, ...]) -> tuple[int, int]:
    """(links of a chip that carry a ring of these devices, hops between those farthest apart).

    Each axis along which they lie has two links where it wraps around, and otherwise one.
    """
    coordinates = np.array([self.devices[place].coords for place in group])
    links = hops = 0
    for axis, length in enumerate(self.shape):
      n = len(np.unique(coordinates[:, axis]))
      wraps = n == length and n % self.chip.torus == 0
      links += 2 if wraps else n > 1
      hops += n // 2 if wraps else n - 1
    return links, hops

  def seconds(self, collective: hlo.Collective) -> float:
    """How long a collective takes, as often as it runs."""
    sent, (links, hops) = collective.sent, self.ring(collective.group)
    if collective.kind == "send" or not links:  # to other slices
      return collective.times * (_HOP + sent / self.chip.network)
    if collective.kind == "collective-permute":
      return collective.times * (_HOP + sent / self.chip.link)
    hops *= 2 if collective.kind == "all-reduce" else 1
    return collective.times * (_HOP * hops + sent / (links * self.chip.link))


def describe(name: str) -> Topology:
  """The topology of a name such as v5e:8x8, or 2xv5e:16x16 for two slices.

  Raises:
    ValueError: saying what is wrong with the name.
  """
  form = re.fullmatch(r"(?:(\d+)x)?(v\w+):(\d+(?:x\d+)*)", name)
  if not form or form[2] not in _CHIPS:
    raise ValueError(
      f"topology {name!r} is unknown; write one of {', '.join(_CHIPS)} and the shape of a slice, "
      "such as v5e:8x8 or v4:4x4x4, or 2xv5e:16x16 for two slices."
    )
  chip, slices, shape = _CHIPS[form[2]], int(form[1] or 1), tuple(map(int, form[3].split("x")))
  if len(shape) != chip.axes or min(*shape, slices) < 1 or math.prod(shape) > chip.pod:
    raise ValueError(
      f"topology {name!r} does not exist: a slice of {chip.name} has {chip.axes} axes and at most "
      f"{chip.pod} chips; several slices are written 2x{chip.name}:..."
    )
  # Without these libtpu asks the machine what it is, in vain. (No chip is opened: programs on a
  # machine's own TPU are not disturbed.)
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  options = {"chip_config_name": "megacore"} if form[2] == "v4" else {}
  if slices > 1:
    options["num_slices"] = slices
  try:
    devices = topologies.get_topology_desc(f"{form[2]}:{form[3]}", "tpu", **options).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
    raise ValueError(
      f"topology {name!r} does not exist; name another. libtpu says: {reason}"
    ) from None
  return Topology(name, shape, slices, chip, tuple(devices))

"""What an accelerator can do at best, by JAX's `device_kind`: for estimates and utilisation.

Datasheet values. TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. GPUs: nvidia.com's
datasheets, dense.
"""

from typing import NamedTuple

_GIB = 2**30


class Chip(NamedTuple):
  """A device as JAX counts them (v4 and v5p: a chip of two cores).

  Attributes:
    name: as it is sold.
    memory: bytes that a program may use of its main memory: what libtpu 0.0.52 calls available when
      it refuses a program that needs more (0.0.42: up to 0.01 GiB more).
    flops: peak of bfloat16 matrix products per second.
    bandwidth: of the main memory, bytes per second.
    link: bytes per second of one link to a neighbour, one way: the datasheet's interconnect
      bandwidth over the number of ports, two an axis.
    axes: of the grid that the chips of a slice form.
    torus: an axis has links from its end to its start where its length is a multiple of this.
    pod: the most chips of a slice.
    network: bytes per second that a chip sends out of its slice: a host's network cards over its
      chips. (For v4 and v5p no source was found: as v5e.)
    clock: cycles per second, as XLA's estimates count them. At these, large products reach 78 %
      (v6e) to 94 % of the peak, and streaming 72 % (v5p) to 81 % of the bandwidth. For v6e no
      datasheet says it: at twice this one, its estimates would exceed the peak and the bandwidth.
  """

  name: str
  memory: float
  flops: float
  bandwidth: float
  link: float
  axes: int
  torus: int
  pod: int
  network: float
  clock: float


V4 = Chip("v4", 30.75 * _GIB, 275e12, 1.2e12, 50e9, 3, 4, 4096, 25e9 / 8, 1.05e9)
V5E = Chip("v5e", 15.75 * _GIB, 197e12, 819e9, 50e9, 2, 16, 256, 25e9 / 8, 1.5e9)
V5P = Chip("v5p", 95.73 * _GIB, 459e12, 2.765e12, 100e9, 3, 4, 8960, 25e9 / 8, 1.75e9)
V6E = Chip("v6e", 31.24 * _GIB, 918e12, 1.638e12, 100e9, 2, 16, 256, 100e9 / 8, 1.75e9)

CHIPS = {
  "TPU v4": V4,
  "TPU v5 lite": V5E,
  "TPU v5e": V5E,
  "TPU v5": V5P,
  "TPU v5p": V5P,
  "TPU v6 lite": V6E,
  "TPU v6e": V6E,
}

# Peak of dense bfloat16 matrix products per second.
_GPUS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def peak(device_kind: str, dtype: str) -> float | None:
  """Peak of matrix products per second of a device; None where it is not known."""
  if dtype != "bfloat16":
    return None
  if device_kind in CHIPS:
    return CHIPS[device_kind].flops
  return next((flops for kind, flops in _GPUS.items() if device_kind.startswith(kind)), None)

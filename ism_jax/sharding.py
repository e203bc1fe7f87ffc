"""The device mesh, and where arrays live on it.

One axis, "data": batches are split over it by rows, the train state is on every device.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

AXIS = "data"


def data_mesh(devices=None) -> Mesh:
  """A mesh of all devices (or of `devices`) along "data"."""
  devices = jax.devices() if devices is None else devices
  # Auto axes: ott's Sinkhorn and the state update rely on XLA's own propagation.
  return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """On every device whole."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Axis number `axis` split over the devices."""
  return NamedSharding(mesh, P(*(None,) * axis, AXIS))


def global_arrays(sharding: NamedSharding, local):
  """Each process's share (a tree of NumPy arrays) -> global arrays."""
  put = lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a))
  return jax.tree.map(put, local)

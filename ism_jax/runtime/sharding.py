"""The device mesh, and where arrays live on it.

Two axes: "slice", the parts of a machine that only the data-centre network joins (one, but for
multi-slice TPUs), and "data" within each. Batches are split over both by rows. The train state is
on every device, or split over "data" and whole in every slice, so that it is gathered over the fast
links only.

Axes: N rows over all devices, D columns.
"""

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

AXIS = ("slice", "data")
PLACEMENTS = ("auto", "replicated", "sharded")


def data_mesh(devices=None) -> Mesh:
  """A mesh of all devices (or of `devices`)."""
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  # Auto axes: ott's Sinkhorn and the state update rely on XLA's own propagation.
  auto = (AxisType.Auto,) * len(AXIS)
  if slices == 1:
    return jax.make_mesh((1, len(devices)), AXIS, axis_types=auto, devices=devices)
  within = mesh_utils.create_hybrid_device_mesh((1, len(devices) // slices), (slices, 1), devices)
  return Mesh(within, AXIS, axis_types=auto)


def device_kind(mesh: Mesh) -> str | None:
  """JAX's name of the mesh's devices; None of GPUs that are too old for fused attention."""
  device = mesh.devices.flat[0]
  is_nvidia = device.device_kind.startswith("NVIDIA")
  return None if is_nvidia and float(device.compute_capability) < 8 else device.device_kind


def replicated(mesh: Mesh) -> NamedSharding:
  """On every device whole."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Axis number `axis` split over the devices."""
  return NamedSharding(mesh, P(*(None,) * axis, AXIS))


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
  """The numbers of those of `count` rows that lie on this process's devices, in order.

  On a pod they are no contiguous range: JAX orders devices by the links between them.
  """
  places = rows(mesh).addressable_devices_indices_map((count,)).values()
  return np.unique(np.concatenate([np.arange(count)[place] for place in places]))


def split(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
  """One axis that "data" divides, split over it; replicated where there is none.

  The second-last where each part holds whole rows of a TPU's tiles, of 8, since XLA reduces and
  scatters gradients in one only there; else the longest.
  """
  parts = mesh.shape["data"]
  divisible = [i for i, n in enumerate(shape) if n and n % parts == 0]
  if parts == 1 or not divisible:
    return replicated(mesh)
  axis = max(
    divisible, key=lambda i: (i == len(shape) - 2 and shape[i] % (8 * parts) == 0, shape[i])
  )
  return NamedSharding(mesh, P(*(None,) * axis, "data"))


def global_arrays(sharding: NamedSharding, local):
  """Each process's share (a tree of NumPy arrays) -> global arrays."""
  put = lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a))
  return jax.tree.map(put, local)


def dot_rows(mesh: Mesh, x, y):
  """x @ y.T for x, y [N, D] split by rows -> [N, N] split by rows; neither is ever gathered.

  The rows of y travel round the ring of devices, one product per place.
  """

  def on_device(x, y):
    n = y.shape[0]
    product = jax.lax.pcast(jnp.zeros((n, n * mesh.size), x.dtype), AXIS, to="varying")

    def multiply(product, owner, y):
      block = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
      return jax.lax.dynamic_update_slice(product, block, (jnp.int32(0), owner * n))

    return _round_the_ring(mesh, multiply, product, y)

  return _by_rows(mesh, on_device)(x, y)


def take_rows(mesh: Mesh, x, indices):
  """x[indices] for x [N, ...] and indices [N] split by rows; x is never gathered."""

  def on_device(x, indices):
    n = x.shape[0]

    def take(taken, owner, x):
      place = indices - owner * n
      is_here = ((place >= 0) & (place < n)).reshape(-1, *(1,) * (x.ndim - 1))
      return jnp.where(is_here, x[jnp.clip(place, 0, n - 1)], taken)

    return _round_the_ring(mesh, take, jnp.zeros_like(x), x)

  return _by_rows(mesh, on_device)(x, indices)


def _by_rows(mesh, on_device):
  return jax.shard_map(on_device, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))


def _round_the_ring(mesh, visit, result, block):
  """visit(result, owner, block) with the block of every device, first that of the device itself."""
  size, me = mesh.size, jax.lax.axis_index(AXIS)
  onwards = [(i, (i + 1) % size) for i in range(size)]

  def hop(i, carry):
    result, block = carry
    block = jax.lax.ppermute(block, AXIS, onwards)
    return visit(result, (me - i) % size, block), block

  return jax.lax.fori_loop(1, size, hop, (visit(result, me, block), block))[0]

"""The compiled functions of a run: a new state, pairing, the gradient over the mesh, and the steps.

The unit of work is a pool of K batches: `couple` pairs its noises with its images in one call, then
`train_steps` runs S steps per call on it, the state donated. All randomness is drawn on the global
batch from (seed, step), so a step's result does not depend on how many devices ran it.

Axes: K batches of a pool, M rows of a global batch.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ism_jax import couplings, model, objectives, paths
from ism_jax import state as state_lib
from ism_jax.experiment import Experiment
from ism_jax.pretrained import sit, vae
from ism_jax.runtime import chips, sharding
from ism_jax.runtime.sharding import AXIS, P


class Keys(NamedTuple):
  """Base keys, one per purpose; steps and pools fold their number in."""

  init: jax.Array
  noise: jax.Array
  pairing: jax.Array
  conditions: jax.Array
  latents: jax.Array


def base_keys(seed: int) -> Keys:
  """The keys of a run."""
  return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def gradient_function(exp: Experiment, mesh) -> Callable:
  """gradient(params, target_params, x0, x1, conditions, weights=None, progress=1.0) of a batch.

  Returns:
    A function to ((loss, parts), gradient), placed as the parameters of the train state are. Rows
    [M, ...] of the global batch may live anywhere; they are split over the devices. The weights and
    the progress are those of `objectives.losses`.
  """
  network = exp.network(sharding.device_kind(mesh))
  rows_at_once = exp.batch_size // (mesh.size * exp.micro_batches)
  has_all_losses = rows_at_once % sum(exp.objective.shares) == 0

  def share_of_loss(params, target_params, scalars, *rows):
    s_online, s_ema = (model.velocity_function(network, p) for p in (params, target_params))
    settings = (exp.objective, exp.wavelet, exp.null_class, exp.batch_size)
    return objectives.losses(s_online, s_ema, *rows, *settings, *scalars)

  def share_of_regression(params, _, scalars, *rows):
    settings = (exp.objective, exp.wavelet, exp.batch_size)
    s_online = model.velocity_function(network, params)
    return objectives.regression_losses(s_online, *rows, *settings, *scalars)

  share_and_gradient = jax.value_and_grad(
    share_of_loss if has_all_losses else share_of_regression, has_aux=True
  )
  specs = jax.tree.map(lambda placed: placed.spec, _placed(exp, mesh).params)

  def reduce(share, gradient):
    """Sums over the devices; of the gradient each keeps what it updates."""

    def reduce_array(a, spec):
      dtype, a = a.dtype, a.astype(exp.gradient_dtype)
      if "data" in spec:
        a = jax.lax.psum_scatter(a, "data", scatter_dimension=len(spec) - 1, tiled=True)
        return jax.lax.psum(a, "slice").astype(dtype)
      return jax.lax.psum(a, AXIS).astype(dtype)

    return jax.lax.psum(share, AXIS), jax.tree.map(reduce_array, gradient, specs)

  def on_device(params, target_params, scalars, rows):
    # Each device differentiates its share of the loss with respect to its copy of the
    # parameters; one sum at the end adds the shares. (Left replicated, `params` would make
    # jax.grad sum over the devices in every micro-batch.)
    params = jax.tree.map(lambda p: jax.lax.pcast(p, AXIS, to="varying"), params)
    if exp.micro_batches == 1:
      return reduce(*share_and_gradient(params, target_params, scalars, *rows))
    micro_batches = jax.tree.map(lambda a: a.reshape(exp.micro_batches, -1, *a.shape[1:]), rows)
    first = jax.tree.map(lambda a: a[0], micro_batches)
    others = jax.tree.map(lambda a: a[1:], micro_batches)

    def add(total, micro):
      share = share_and_gradient(params, target_params, scalars, *micro)
      return jax.tree.map(jnp.add, total, share), None

    total, _ = jax.lax.scan(add, share_and_gradient(params, target_params, scalars, *first), others)
    return reduce(*total)

  whole, rows = P(), P(AXIS)
  in_specs, out_specs = (whole, whole, whole, rows), (whole, specs)
  sharded = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

  def gradient(params, target_params, x0, x1, conditions, weights=None, progress=1.0):
    scalars = (weights, progress)
    if has_all_losses:
      return sharded(params, target_params, scalars, (x0, x1, conditions))
    # Each device would wait for the one with the dearest targets, so the rows that have any to
    # compute are dealt anew to all devices.
    s_online, s_ema = (velocity_over_mesh(network, p, mesh) for p in (params, target_params))
    x_t = paths.interpolate(x0, x1, conditions.t)
    settings = (exp.objective, exp.null_class)
    y = objectives.regression_targets(s_online, s_ema, x0, x1, x_t, conditions, *settings)
    loss_of_row = objectives.number_losses(len(x0), exp.objective.shares)
    return sharded(params, None, scalars, (x_t, y, conditions, loss_of_row))

  return gradient


def velocity_over_mesh(network, params, mesh):
  """velocity(x_t, t, c, d, w) of any number of rows, each device computing as many of them."""
  on_device = lambda params, *rows: model.velocity_function(network, params)(*rows)
  in_specs = (P(), *(P(AXIS) for _ in range(5)))
  sharded = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=P(AXIS))

  def velocity(*rows):
    n = len(rows[0])
    pad = lambda a: jnp.pad(a, ((0, -n % mesh.size), *((0, 0) for _ in a.shape[1:])))
    return sharded(params, *map(pad, rows))[:n]

  return velocity


def gradient_norms_function(exp: Experiment, mesh) -> Callable:
  """norms(state, pool, keys, index) -> {"gradient_norm/velocity": ..}: one for each loss.

  Of the weighted losses, on batch `index` of a pool, at the parameters of `state`.
  """
  gradient = gradient_function(exp, mesh)
  one_loss_each = np.diag(exp.objective.weights).astype(np.float32)

  def gradient_norms(state, pool, keys: Keys, index):
    batch = jax.tree.map(lambda a: a[index], pool)
    conditions = draw_conditions(exp, state, batch, keys)
    rows = (batch["x0"], batch["x1"], conditions)

    def norm(weights):
      _, grad = gradient(state.params, state.target_ema, *rows, weights, progress(exp, state))
      return optax.tree.norm(grad)

    norms = jax.lax.map(norm, one_loss_each)
    by_loss = zip(objectives.Rows._fields, exp.objective.shares, norms, strict=True)
    return {f"gradient_norm/{name}": value for name, share, value in by_loss if share}

  return jax.jit(gradient_norms, out_shardings=sharding.replicated(mesh))


@functools.lru_cache
def placement(exp: Experiment, mesh) -> str:
  """ "replicated" or "sharded": what `exp.placement` comes to on this mesh, logged.

  "auto" shards where several accelerators share the work: by ahead-of-time compilation a step then
  takes less memory and as much time or less (ism_jax/performance/README.md; GPUs were not tried).
  But in pods of TPUs whose links have three axes XLA gathers by all-reduces, which takes longer.
  """
  if exp.placement != "auto":
    return exp.placement
  device, chosen = mesh.devices.flat[0], "sharded"
  chip = chips.CHIPS.get(device.device_kind)
  if chip and chip.axes == 3 and mesh.size > 8:
    fits = replicated_bytes(exp, mesh.size) <= 0.9 * chip.memory
    chosen = "replicated" if fits else "sharded"
  if device.platform == "cpu" or mesh.shape["data"] == 1:
    chosen = "replicated"
  logging.info("Placement of the train state: %s.", chosen)
  return chosen


def replicated_bytes(exp: Experiment, devices: int) -> float:
  """About what a step takes of a device's memory where the state is on every device.

  Parameters, two moments, the averages and a gradient in float32, and the activations of a device's
  rows, in bytes per token, layer and unit of width, as ahead-of-time compilation for TPUs measures
  them.
  """
  parameters = sum(a.size for a in jax.tree.leaves(_shapes(exp).params))
  depth, width, _ = exp.model.dimensions
  tokens = math.prod(exp.image_shape[:2]) // exp.model.patch**2
  rows = exp.batch_size / devices / exp.micro_batches
  per_unit = {"none": 100, "names": 30, "dots": 30, "full": 4}[exp.model.remat]
  per_unit *= np.dtype(exp.model.dtype).itemsize / 2
  return 4.0 * (6 + len(exp.ema.others)) * parameters + per_unit * rows * depth * width * tokens


def _create(exp: Experiment) -> Callable:
  tx = state_lib.optimizer(exp.optimizer, exp.total_steps)

  def create(key, imported=None):
    params = model.init_params(key, exp.network(), exp.image_shape)
    if imported is not None:
      params = sit.complete(imported, params)
    return state_lib.create(params, tx, exp.ema.decays)

  return create


def _shapes(exp: Experiment):
  """The TrainState as shapes."""
  return jax.eval_shape(_create(exp), jax.random.key(0))


def _placed(exp: Experiment, mesh):
  """The sharding of each array of a TrainState."""
  if placement(exp, mesh) == "replicated":
    place = lambda a: sharding.replicated(mesh)
  else:
    place = lambda a: sharding.split(mesh, a.shape)
  return jax.tree.map(place, _shapes(exp))


def init_function(exp: Experiment, mesh) -> Callable:
  """init(key) -> TrainState, placed on the mesh.

  init(key, params) begins with these parameters; see `sit.complete`.
  """
  return jax.jit(_create(exp), out_shardings=_placed(exp, mesh))


def abstract_state(exp: Experiment, mesh):
  """The TrainState as shapes with shardings, made without a computation."""
  with_sharding = lambda a, placed: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed)
  return jax.tree.map(with_sharding, _shapes(exp), _placed(exp, mesh))


def abstract_pool(exp: Experiment, mesh):
  """What the input pipeline yields, as shapes with shardings."""
  in_pool = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.rows(mesh, axis=1))
  rows = (exp.coupling.pool_size, exp.batch_size)
  height, width, channels = exp.image_shape
  images = (
    {"moments": in_pool((*rows, height, width, 2 * channels), np.float16)}
    if exp.data.vae
    else {"x1": in_pool((*rows, height, width, channels), np.float32)}
  )
  if exp.coupling.coupling == "classwise":
    images |= {"seed": in_pool(rows, np.int32), "mirror": in_pool(rows, np.bool_)}
  return images | {"c": in_pool(rows, np.int32)}


def draw_images(exp: Experiment, arrays: dict, key):
  """Images [N, H, W, C] of the data: its "x1", or latents drawn from its "moments"."""
  if not exp.data.vae:
    return arrays["x1"]
  noise = jax.random.normal(key, (len(arrays["moments"]), *exp.image_shape))
  return vae.sample_latent(arrays["moments"], noise, exp.data.vae_scale, exp.data.vae_shift)


def couple_function(exp: Experiment, mesh) -> Callable:
  """couple(pool, keys, index) -> (pool {"x0", "x1": [K, M, ...], "c": [K, M]}, diagnostics).

  The pool that goes in has images "x1", or the "moments" [K, M, H, W, 2 C] of latents, which are
  drawn from them each time. With "classwise" it also has the "seed" [K, M] of each noise, and
  "mirror" [K, M], whether the image is mirrored, as the noise is then, too.
  """
  in_pool, is_classwise = sharding.rows(mesh, axis=1), exp.coupling.coupling == "classwise"
  over_devices = {}
  if mesh.size > 1:
    over_devices = {
      "dot_rows": functools.partial(sharding.dot_rows, mesh),
      "take_rows": functools.partial(sharding.take_rows, mesh),
    }

  # One list of K M examples, rows before batches, so that the split over devices stays in place.
  flatten = lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:])
  unflatten = lambda a: a.reshape(exp.batch_size, -1, *a.shape[1:]).swapaxes(0, 1)

  def couple(pool, keys: Keys, index):
    key_noise = jax.random.fold_in(keys.noise, index)
    key_pairing = jax.random.fold_in(keys.pairing, index)
    flat = jax.tree.map(flatten, pool)
    x1 = draw_images(exp, flat, jax.random.fold_in(keys.latents, index))
    if is_classwise:
      x0 = couplings.numbered_noise(keys.noise, flat["c"], flat["seed"], exp.image_shape)
      mirror = flat["mirror"][:, None, None, None]
      x0 = jnp.where(mirror, jnp.flip(x0, axis=2), x0)
    else:
      x0 = jax.random.normal(key_noise, x1.shape)
    x0, info = couplings.pair(
      x0, x1, flat["c"], key_pairing, exp.coupling, exp.data.num_classes, **over_devices
    )
    return {"x0": unflatten(x0), "x1": unflatten(x1), "c": pool["c"]}, info

  return jax.jit(
    couple,
    # Moments have another shape than what is made of them, and of seeds nothing is.
    donate_argnames=() if exp.data.vae or is_classwise else "pool",
    out_shardings=(in_pool, sharding.replicated(mesh)),
  )


def velocity_errors_function(exp: Experiment, mesh) -> Callable:
  """errors(params, images, key) -> [2], which tell how time runs in the network.

  The mean squared errors of s(x_t, t) and of -s(x_t, 1 - t), its reading with time reversed, as the
  velocity at d = 0 and w = 0, at times of the grid. The images are a batch as the data has it,
  split over the devices. Both errors are the same, about, of a network that knows nothing.
  """
  network = exp.network(sharding.device_kind(mesh))

  def errors(params, images, key):
    key_latents, key_noise, key_times = jax.random.split(key, 3)
    x1 = draw_images(exp, images, key_latents)
    x0 = jax.random.normal(key_noise, x1.shape)
    t = paths.draw_start(key_times, jnp.zeros(len(x1)))
    x_t, v, zero = paths.interpolate(x0, x1, t), paths.velocity(x0, x1), jnp.zeros_like(t)
    s = velocity_over_mesh(*model.at_interval(network, params, exp.objective.t_interval), mesh)
    readings = s(x_t, t, images["c"], zero, zero), -s(x_t, 1 - t, images["c"], zero, zero)
    return jnp.stack([jnp.mean(jnp.square(reading - v)) for reading in readings])

  return jax.jit(errors, out_shardings=sharding.replicated(mesh))


def draw_conditions(exp: Experiment, state, batch, keys: Keys) -> objectives.Conditions:
  """The conditions of the step that follows `state`."""
  key, done = jax.random.fold_in(keys.conditions, state.step), progress(exp, state)
  return objectives.draw_conditions(key, batch["c"], exp.objective, exp.null_class, done)


def progress(exp: Experiment, state):
  """The part of the run that is done, in [0, 1]."""
  return state.step / exp.total_steps


def update_function(exp: Experiment, mesh, update=state_lib.update) -> Callable:
  """apply(state, gradient) -> TrainState; both live where the placement says.

  Another `update` than `state.update` is only to measure what that costs.
  """
  tx = state_lib.optimizer(exp.optimizer, exp.total_steps)
  placed, place = _placed(exp, mesh), jax.lax.with_sharding_constraint

  def apply(state, gradient):
    # Sharded, each device updates its part of everything, and the next step gathers the parameters
    # in the dtype it computes in.
    state = update(place(state, placed), place(gradient, placed.params), tx, exp.ema)
    return place(state, placed)

  return apply


def steps_function(exp: Experiment, mesh, update=state_lib.update) -> Callable:
  """train_steps(state, pool, keys, first) -> (state, metrics [S]): S steps from batch `first`."""
  gradient, apply = gradient_function(exp, mesh), update_function(exp, mesh, update)

  def train_step(state, batch, keys: Keys):
    conditions = draw_conditions(exp, state, batch, keys)
    rows = (batch["x0"], batch["x1"], conditions)
    (loss, parts), grad = gradient(
      state.params, state.target_ema, *rows, progress=progress(exp, state)
    )
    state = apply(state, grad)
    norms = {
      "gradient_norm": optax.tree.norm(grad),
      "parameter_norm": optax.tree.norm(state.params),
    }
    return state, {"loss": loss, **parts, **norms}

  def train_steps(state, pool, keys: Keys, first):
    batches = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, exp.scan_steps), pool)
    return jax.lax.scan(lambda state, batch: train_step(state, batch, keys), state, batches)

  out = (_placed(exp, mesh), sharding.replicated(mesh))
  return jax.jit(train_steps, donate_argnames="state", out_shardings=out)

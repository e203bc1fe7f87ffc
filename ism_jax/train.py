"""Training: the gradient over the mesh, the compiled steps, and the loop around them.

The unit of work is a pool of K batches: `couple` pairs its noises with its images in one call, then
`train_steps` runs S steps per call on it, the state donated. All randomness is drawn on the global
batch from (seed, step), so a step's result does not depend on how many devices ran it.

Axes: K batches of a pool, M rows of a global batch.
"""

from collections.abc import Callable
import functools
import time
from typing import NamedTuple

from absl import logging
from clu import parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ism_jax import checkpoints, couplings, data, logs, objectives, sharding
from ism_jax import experiment as experiment_lib
from ism_jax import model as model_lib
from ism_jax import state as state_lib
from ism_jax.experiment import Experiment
from ism_jax.sharding import AXIS, P


class Keys(NamedTuple):
  """Base keys, one per purpose; steps and pools fold their number in."""

  init: jax.Array
  noise: jax.Array
  pairing: jax.Array
  conditions: jax.Array


def base_keys(seed: int) -> Keys:
  """The keys of a run."""
  return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def gradient_function(exp: Experiment, mesh) -> Callable:
  """gradient(params, target_params, x0, x1, c, conditions) of the global batch, sharded by rows.

  Returns:
    A function to ((loss, parts), gradient), all replicated. Rows [M, ...] may live anywhere.
  """
  network = exp.network()

  def share_of_loss(params, target_params, x0, x1, c, given):
    return objectives.losses(
        model_lib.velocity_function(network, params),
        model_lib.velocity_function(network, target_params),
        x0, x1, c, given,
        cfg=exp.objective,
        wavelet_cfg=exp.wavelet,
        null_class=exp.null_class,
        batch_size=exp.batch_size,
    )  # fmt: skip

  share_and_gradient = jax.value_and_grad(share_of_loss, has_aux=True)

  def on_device(params, target_params, *rows):
    # Each device differentiates its own share of the loss with respect to its own copy of the
    # parameters; one psum at the end adds the shares. (Left replicated, `params` would make
    # jax.grad sum over the devices in every micro-batch.)
    params = jax.tree.map(lambda p: jax.lax.pcast(p, AXIS, to="varying"), params)
    if exp.micro_batches == 1:
      return jax.lax.psum(share_and_gradient(params, target_params, *rows), AXIS)
    micro_batches = jax.tree.map(lambda a: a.reshape(exp.micro_batches, -1, *a.shape[1:]), rows)
    first = jax.tree.map(lambda a: a[0], micro_batches)
    others = jax.tree.map(lambda a: a[1:], micro_batches)

    def add(total, micro):
      return jax.tree.map(jnp.add, total, share_and_gradient(params, target_params, *micro)), None

    total, _ = jax.lax.scan(add, share_and_gradient(params, target_params, *first), others)
    return jax.lax.psum(total, AXIS)

  rows = P(AXIS)
  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(P(), P(), rows, rows, rows, rows),
    out_specs=P(),
  )


def init_function(exp: Experiment, mesh) -> Callable:
  """init(key) -> TrainState, on every device of the mesh."""
  tx = state_lib.optimizer(exp.optimizer, exp.total_steps)
  init = jax.jit(lambda key: model_lib.init_params(key, exp.network(), exp.image_shape))
  return lambda key: jax.device_put(state_lib.create(init(key), tx), sharding.replicated(mesh))


def abstract_state(exp: Experiment, mesh):
  """The TrainState as shapes with shardings, made without a computation."""
  shapes = jax.eval_shape(init_function(exp, mesh), jax.random.key(0))
  everywhere = sharding.replicated(mesh)
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes)


def couple_function(exp: Experiment, mesh) -> Callable:
  """couple(pool {"x1": [K, M, ...], "c": [K, M]}, keys, index) -> (pool with "x0", diagnostics)."""
  in_pool = sharding.rows(mesh, axis=1)

  # One list of K M examples, rows before batches, so that the split over devices stays in place.
  flatten = lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:])
  unflatten = lambda a: a.reshape(exp.batch_size, -1, *a.shape[1:]).swapaxes(0, 1)

  def couple(pool, keys: Keys, index):
    key_noise = jax.random.fold_in(keys.noise, index)
    key_pairing = jax.random.fold_in(keys.pairing, index)
    x1, c = flatten(pool["x1"]), flatten(pool["c"])
    x0 = jax.random.normal(key_noise, x1.shape)
    x0, info = couplings.pair(x0, x1, c, key_pairing, exp.coupling, exp.data.num_classes)
    return {"x0": unflatten(x0), "x1": pool["x1"], "c": pool["c"]}, info

  return jax.jit(couple, donate_argnames="pool", out_shardings=(in_pool, sharding.replicated(mesh)))


def steps_function(exp: Experiment, mesh) -> Callable:
  """train_steps(state, pool, keys, first) -> (state, metrics [S]): S steps from batch `first`."""
  gradient = gradient_function(exp, mesh)
  tx = state_lib.optimizer(exp.optimizer, exp.total_steps)

  def train_step(state, batch, keys: Keys):
    key = jax.random.fold_in(keys.conditions, state.step)
    given = objectives.draw_conditions(key, batch["c"], exp.objective, exp.null_class)
    (loss, parts), grad = gradient(
      state.params, state.target_ema, batch["x0"], batch["x1"], batch["c"], given
    )
    state = state_lib.update(state, grad, tx, exp.ema)
    norms = {
      "gradient_norm": optax.tree.norm(grad),
      "parameter_norm": optax.tree.norm(state.params),
    }
    return state, {"loss": loss, **parts, **norms}

  def train_steps(state, pool, keys: Keys, first):
    batches = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, exp.scan_steps), pool)
    return jax.lax.scan(lambda state, batch: train_step(state, batch, keys), state, batches)

  everywhere = sharding.replicated(mesh)
  return jax.jit(train_steps, donate_argnames="state", out_shardings=everywhere)


def check_finite(metrics: dict[str, np.ndarray], info: dict, last_step: int) -> None:
  """Raises FloatingPointError naming the first step with a metric that is not finite.

  Args:
    metrics: [S] of the S steps up to `last_step`. info: the coupling's, of their pool.
  """
  bad_info = [f"coupling/{name}" for name, value in info.items() if not np.isfinite(value)]
  for i in range(len(metrics["loss"])):
    if bad := bad_info + [name for name, values in metrics.items() if not np.isfinite(values[i])]:
      step = last_step - len(metrics["loss"]) + i + 1
      raise FloatingPointError(
        f"{', '.join(bad)} not finite at step {step}. The checkpoints of earlier steps are intact:"
        " lower optimizer.learning_rate or set optimizer.clip_norm, and train on from there."
      )


def train(config, workdir: str, devices=None) -> state_lib.TrainState:
  """Trains to the end of the config, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: a ConfigDict, saved with every checkpoint.
    devices: default all.
  Returns:
    The final state.
  """
  exp = experiment_lib.parse(config)
  mesh = sharding.data_mesh(devices)
  experiment_lib.check_devices(exp, mesh.size)
  checkpoints.check_writable(workdir)
  source = data.load_source(exp.data)
  if exp.total_steps != exp.steps:
    logging.info(
        "steps=%d rounds up to %d: whole pools of %d.",
        exp.steps, exp.total_steps, exp.coupling.pool_size,
    )  # fmt: skip

  # Leaving the manager waits for the checkpoint that is being written, whatever ends the run.
  with checkpoints.open_manager(workdir, keep=exp.checkpoint.keep) as manager:
    return _train(exp, config, workdir, mesh, source, manager)


def _train(exp: Experiment, config, workdir: str, mesh, source, manager) -> state_lib.TrainState:
  pool_size, total = exp.coupling.pool_size, exp.total_steps
  keys = base_keys(exp.seed)
  pools = data.pools(
    source,
    batch_size=exp.batch_size,
    pool_size=pool_size,
    seed=exp.data.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=exp.data.num_threads,
  )
  if manager.latest_step() is None:
    state = init_function(exp, mesh)(keys.init)
  else:
    experiment_lib.check_continues(checkpoints.read_config(manager), logs.as_dict(config))
    if manager.latest_step() % pool_size % exp.scan_steps:
      raise ValueError(
        f"scan_steps={exp.scan_steps} does not reach step {manager.latest_step()}, where the "
        f"checkpoint is, in a pool of {pool_size}: continue with the scan_steps it was made with."
      )
    state, pools_state = checkpoints.restore(manager, abstract_state(exp, mesh))
    pools.set_state(pools_state)
    logging.info("Continuing from step %d of %s.", manager.latest_step(), workdir)
  step = start = int(state.step)
  if step >= total:
    logging.info("%s has all %d steps already.", workdir, total)
    return state
  logging.info("\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False))

  couple, train_steps = couple_function(exp, mesh), steps_function(exp, mesh)
  save = functools.partial(checkpoints.save, manager, config=logs.as_dict(config))
  # Values are read one call late: the device is never waited for. Checkpoints wait, so that none
  # is written of a state that is not finite.
  pending = None

  def take(writer):
    nonlocal pending
    if pending is not None:
      last_step, metrics, info = pending
      pending = None
      metrics, info = jax.device_get((metrics, info))
      check_finite(metrics, info, last_step)
      writer.add(last_step, metrics, info)

  with logs.Writer(workdir, start=start, total=total, every=exp.log.every) as writer:
    while step < total:
      pools_before = pools.get_state()
      waited = time.perf_counter()
      pool = sharding.global_arrays(sharding.rows(mesh, axis=1), next(pools))
      writer.waited(time.perf_counter() - waited)
      pool, info = couple(pool, keys, step // pool_size)
      for first in range(step % pool_size, pool_size, exp.scan_steps):
        state, metrics = train_steps(state, pool, keys, first)
        step += exp.scan_steps
        take(writer)
        pending = step, metrics, info
        since_checkpoint = step % exp.checkpoint.every
        if step == total or since_checkpoint < exp.scan_steps:
          take(writer)
          # A pool that is not finished is read and paired again on resumption.
          save(step, state, pools.get_state() if step % pool_size == 0 else pools_before)
  return state

"""The training loop: it starts or continues a run, reports, saves, and stops when it is told to."""

import contextlib
import os
import signal
import time
from typing import NamedTuple

from absl import logging
from clu import parameter_overview
import jax
import numpy as np

from ism_jax import data, experiment, restore, steps
from ism_jax.evaluation.monitor import Monitor
from ism_jax.experiment import Experiment
from ism_jax.pretrained import sit
from ism_jax.runtime import checkpoints, commands, files, locks, logs, sharding
from ism_jax.state import TrainState


class Pending(NamedTuple):
  """What was computed after `step` steps, still on the devices, to be reported one call later.

  Attributes:
    metrics: [S] of the call's S steps, by name.
    info: diagnostics of the pool's coupling.
    norms: gradient norm of each loss; empty where none is due.
    samples: of the monitor, by number of steps; empty where none are due.
  """

  step: int
  metrics: dict
  info: dict
  norms: dict
  samples: dict


def check_finite(metrics: dict[str, np.ndarray], info: dict, last_step: int) -> None:
  """Raises FloatingPointError naming the first step with a metric that is not finite.

  Of the metrics [S] of the S steps up to `last_step`, and the coupling diagnostics of their pool.
  """
  bad_info = [f"coupling/{name}" for name, value in info.items() if not np.isfinite(value)]
  for i in range(len(metrics["loss"])):
    not_finite = lambda values: not np.isfinite(values[i]).all()
    if bad := bad_info + [name for name, values in metrics.items() if not_finite(values)]:
      step = last_step - len(metrics["loss"]) + i + 1
      # Pairing sees no parameters, only images and noise.
      remedy = (
        "look at the images that this pool was read from, in data.dir"
        if bad_info
        else "lower optimizer.learning_rate or set optimizer.clip_norm"
      )
      raise FloatingPointError(
        f"{', '.join(bad)} not finite at step {step}. The checkpoints of earlier steps are intact: "
        f"{remedy}, and train on from there."
      )


@contextlib.contextmanager
def watch_for_preemption(manager):
  """Yields preempted(first, last): the signal to stop for after steps `first` to `last`, or None.

  A single process stops for SIGTERM, Ctrl-C (SIGINT) and SIGHUP, while this context is open, in the
  main thread; a second one kills it. Of several processes, each answers the same at the same step
  once any of them has got one: jax.distributed, whose handler of SIGTERM must stay, tells them.
  """
  if jax.process_count() > 1:
    # JAX agrees on the one step after the furthest that any process has asked about.
    reached = lambda first, last: any(map(manager.reached_preemption, range(first, last + 1)))
    tell = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    with commands.stops_received_by(tell, (signal.SIGINT, signal.SIGHUP)):
      yield lambda first, last: signal.SIGTERM if reached(first, last) else None
    return
  received = []

  def receive(stop):
    received.append(stop)
    commands.say(f"{stop.name}: saving after the steps under way; another one kills.")

  with commands.stops_received_by(receive):
    yield lambda first, last: received[0] if received else None


def train(config, workdir: str, devices=None) -> TrainState:
  """Trains to the end of the config, from the newest whole checkpoint in `workdir` if there is one.

  Args:
    config: a ConfigDict, saved with every checkpoint.
    workdir: folder of the run.
    devices: default all.
  Returns:
    The final state.
  Raises:
    OSError: another run trains in `workdir`, or it cannot be written.
    SystemExit: once SIGTERM, Ctrl-C or SIGHUP has come and a checkpoint of the last step is
      written; with 128 and the signal, as of a process that it kills: 143 for SIGTERM.
  """
  exp = experiment.parse(config)
  mesh = sharding.data_mesh(devices)
  experiment.check_devices(exp, mesh.size)
  held = checkpoints.check_workdir(workdir)
  source = data.load_source(exp.data)
  with locks.hold(held):
    state, stop = _train(exp, config, workdir, mesh, source)
  if stop:
    stopped = "Stopped by %s after step %d of %d, which is saved; the same command continues."
    logging.warning(stopped, stop.name, int(state.step), exp.total_steps)
    raise SystemExit(128 + stop)
  return state


def _train(exp: Experiment, config, workdir: str, mesh, source):
  """Trains in a workdir that is held; as `_loop`."""
  total, pool_size = exp.total_steps, exp.coupling.pool_size
  if total != exp.steps:
    logging.info("steps=%d rounds up to %d: whole pools of %d.", exp.steps, total, pool_size)
  if (warmup := exp.optimizer.warmup_steps) > total:  # as in a short trial
    logging.warning(
      "The learning rate reaches %.2g %% of optimizer.learning_rate: steps=%d end within "
      "optimizer.warmup_steps=%d. Set that to %d, say.",
      *(100 * total / warmup, exp.steps, warmup, total // 20),
    )

  # Leaving the manager waits for the checkpoint that is being written, whatever ends the run.
  cfg = exp.checkpoint
  manager = checkpoints.open_manager(workdir, keep=cfg.keep, keep_every=cfg.keep_every)
  with watch_for_preemption(manager) as preempted, checkpoints.finishing(manager):
    about = {"dataset": source.identity, "classes": source.classes}
    about["class_counts"] = source.class_counts
    state, position = start_or_continue(exp, config, workdir, mesh, manager, about)
    if exp.init_from and int(state.step) == 0:
      check_time(exp, mesh, state.params, source)
    if int(state.step) >= total:
      logging.info("%s has all %d steps already.", workdir, total)
      return state, None
    seeds = None
    if exp.coupling.coupling == "classwise":  # which may take long
      seeds = data.noise_seeds(source, exp.data, exp.coupling, steps.base_keys(exp.seed))
    pools = data.pools(
      source,
      batch_size=exp.batch_size,
      pool_size=pool_size,
      flip=exp.data.flip,
      seed=exp.data.seed,
      rows=sharding.local_rows(mesh, exp.batch_size),
      num_threads=exp.data.num_threads,
      seeds=seeds,
    )
    log = None
    if position is not None:
      pools.set_state(position["pools"])
      log = position["log"]
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    logging.info("\n%s", overview)
    return _loop(exp, config, workdir, mesh, manager, pools, about, state, log, preempted)


def start_or_continue(exp: Experiment, config, workdir: str, mesh, manager, about: dict):
  """(TrainState, position of the data and the log) of the newest whole checkpoint.

  Of a new run: (a new state, None). `about` is what a checkpoint says of the data, by the names of
  a source's attributes, see `data.pipeline`; its "dataset" is the identity. A ValueError if the
  checkpoint was trained on other data.
  """
  if manager.latest_step() is None:
    path = exp.init_from
    imported = restore.read_start(path, exp, about["classes"]) if path else None
    return steps.init_function(exp, mesh)(steps.base_keys(exp.seed).init, imported), None
  like = steps.abstract_state(exp, mesh)

  def read(step):
    experiment.check_continues(checkpoints.read_config(manager, step), files.as_dict(config))
    if step % exp.coupling.pool_size % exp.scan_steps:
      raise ValueError(
        f"scan_steps={exp.scan_steps} does not reach step {step}, where the checkpoint is, in a "
        f"pool of {exp.coupling.pool_size}: continue with the scan_steps it was made with."
      )
    restored, position = checkpoints.restore(manager, like, step)
    if (saved := int(restored.step)) != step:  # of an older version: the others say it themselves
      raise checkpoints.DamagedError(
        f"{manager.directory}/{step} is damaged: it holds step {saved}"
      )
    data.check_same(position.get("dataset"), about["dataset"], exp.data.may_change)
    return restored, position

  step, (state, position) = checkpoints.restore_newest(manager, read, move_damaged=True)
  logging.info("Continuing from step %d of %s.", step, workdir)
  return state, position


def check_time(exp: Experiment, mesh, params, source) -> None:
  """Raises ValueError where time runs the other way in the parameters that a run begins with.

  Judged are 64 images, or one for each device. In the middle of the path the wrong reading of a
  trained network points away from the data, and its error is several times that of the right one;
  of a network that knows nothing of the data, both are the same. Half lies between.
  """
  count = mesh.size * -(-64 // mesh.size)
  rows, seed = sharding.local_rows(mesh, count), exp.data.seed
  images = data.pools(source, batch_size=count, pool_size=1, seed=seed, rows=rows, num_threads=0)
  first = {name: array[0] for name, array in next(images).items()}
  first = sharding.global_arrays(sharding.rows(mesh), first)
  key = jax.random.fold_in(steps.base_keys(exp.seed).noise, exp.total_steps)  # that of no pool
  error, reverse = map(float, steps.velocity_errors_function(exp, mesh)(params, first, key))
  errors = (
    f"{exp.init_from} with init_time={exp.init_time} has a mean squared velocity error of "
    f"{error:.3g} on this data, and of {reverse:.3g} with time and sign reversed"
  )
  if reverse < error / 2:
    (other,) = set(sit.TIMES) - {exp.init_time}
    raise ValueError(f"{errors}: set init_time={other}.")
  logging.info("%s.", errors)


def _loop(exp, config, workdir, mesh, manager, pools, about, state, log, preempted):
  """Trains from `state` to the end, or until preempted(..); see `watch_for_preemption`.

  Returns:
    (the last TrainState, what preempted(..) returned)
  """
  pool_size, scan_steps, total = exp.coupling.pool_size, exp.scan_steps, exp.total_steps
  keys, step, pending, writing = steps.base_keys(exp.seed), int(state.step), None, False
  couple, train_steps = steps.couple_function(exp, mesh), steps.steps_function(exp, mesh)
  gradient_norms = steps.gradient_norms_function(exp, mesh)
  monitor = Monitor(exp, mesh, workdir, about["class_counts"]) if exp.monitor.every else None
  second = (step // pool_size + 1) * pool_size  # from the second pool on everything is compiled
  if exp.profile_steps and second >= total:
    logging.warning("Nothing is profiled: that begins with the second pool, at step %d.", second)
  values = experiment.flatten(files.as_dict(config))
  with (
    logs.Writer(
      workdir,
      start=step,
      state=log,
      total=total,
      every=exp.log.every,
      config={key: values[key] for key in experiment.MARKS},
      hyperparameters=[key for key, marks in experiment.MARKS.items() if marks.learnt],
      compared=[*(monitor.distances if monitor else ()), "loss"],
      wandb=exp.log.wandb,
    ) as writer,
    logs.Profile(workdir, first=second, steps=exp.profile_steps) as profile,
  ):
    while step < total:
      profile.start(step)
      pools_before = pools.get_state()
      pool, info = couple(_read_pool(pools, mesh, writer), keys, step // pool_size)
      for first in range(step % pool_size, pool_size, scan_steps):
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
          state, metrics = train_steps(state, pool, keys, first)
        step += scan_steps
        profile.done(step, metrics)
        _report(pending, writer, monitor)
        norms, samples = {}, {}
        if _is_due(step, exp.log.gradients_every, scan_steps):
          norms = gradient_norms(state, pool, keys, first + scan_steps - 1)
        if monitor and (step == total or _is_due(step, exp.monitor.every, scan_steps)):
          samples = monitor.start(state.ema)
        pending = Pending(step, metrics, info, norms, samples)
        # A write that failed ends the run now, and not when the next one is due.
        writing = writing and checkpoints.is_writing(manager)
        stop = preempted(step - scan_steps + 1, step)
        if stop or step == total or _is_due(step, exp.checkpoint.every, scan_steps):
          _report(pending, writer, monitor, wait=True)  # raises before a bad state is saved
          pending = None
          # A pool that is not finished is read and paired again on resumption.
          pools_state = pools_before if step % pool_size else pools.get_state()
          position = {"pools": pools_state, "log": writer.state()} | about
          writing = checkpoints.save(manager, step, state, position, files.as_dict(config))
        if stop:
          return state, stop
  return state, None


def _is_due(step: int, every: int, scan_steps: int) -> bool:
  """Whether the last `scan_steps` steps passed a multiple of `every`; never for 0."""
  return every > 0 and step % every < scan_steps


def _read_pool(pools, mesh, writer: logs.Writer):
  """The next pool on the mesh; the time it took is counted."""
  start = time.perf_counter()
  pool = sharding.global_arrays(sharding.rows(mesh, axis=1), next(pools))
  writer.waited(time.perf_counter() - start)
  return pool


def _report(pending: Pending | None, writer: logs.Writer, monitor, wait: bool = False) -> None:
  """Checks and writes what is pending, one call old: it never waits for the devices."""
  if pending is not None:
    step, metrics, info, norms, samples = jax.device_get(pending)
    check_finite(metrics, info, step)
    writer.add(step, metrics, info)
    if norms:
      writer.write(step, norms)
    if samples:
      monitor.finish(step, samples, writer)
  if wait and monitor:
    monitor.wait()

"""Several processes as one run: how they find each other, and how they end together.

`jax.distributed` joins the workers of a Cloud TPU pod, the tasks of a SLURM step or of Open MPI, or
processes that --coordinator, --processes and --process place. One process joins nothing and waits
for nothing.

A process that fails would leave the others in a collective that never ends. Here it tells them why,
through the key-value store of the coordinator (which runs in process 0), and all leave. One that
dies without a word is missed after `HEARTBEAT_SECONDS`, and jax.distributed aborts the others.
"""

import contextlib
import functools
import os
import re
import socket
import sys
import threading
import time
import traceback

from absl import flags, logging
import jax

# For what jax.distributed.initialize would find, before it is called, and for the key-value store:
# JAX has no public name for either.
from jax._src import clusters, distributed

JOIN_SECONDS = 300  # that processes wait for each other: images are pulled, nodes boot
HEARTBEAT_SECONDS = 90  # of silence, after which a process is taken for dead
_POLL_SECONDS = 1.0
_FAREWELL_SECONDS = 10.0  # that process 0, and with it the key-value store, outlasts an error

_FAILED, _LEFT, _DONE = "ism_jax/failed/", "ism_jax/left/", "ism_jax/done/"
_leaving = threading.Event()  # this process has failed: it reports that, not the others' ends


def define_flags() -> None:
  """Defines --coordinator, --processes and --process; see `initialize_from_flags`."""
  together = "All three place a process where nothing in the environment does."
  flags.DEFINE_string("coordinator", None, f"HOST:PORT at which process 0 listens. {together}")
  number = functools.partial(flags.DEFINE_integer, upper_bound=2**20)
  number("processes", None, f"How many processes run together. {together}")
  number("process", None, f"Number of this process, from 0. {together}")


def initialize_from_flags(*, preemption=False) -> None:
  """`initialize`, with the place that the flags give."""
  args = flags.FLAGS
  initialize(args.coordinator, args.processes, args.process, preemption=preemption)


def initialize(coordinator=None, processes=None, process=None, *, preemption=False):
  """Joins the other processes, if there are any. Call it before anything touches a device.

  Process 0 goes on logging all, the others their warnings and errors.

  Args:
    coordinator: "host:port" of process 0. This and the two below all, or none: then they come from
      the environment, as jax.distributed reads it on Cloud TPU, under SLURM and under Open MPI.
    processes: their number.
    process: the number of this one.
    preemption: whether SIGTERM to any process is only noted, for `train.watch_for_preemption`; else
      it ends the process.
  Raises:
    ValueError: the arguments do not make a place.
    OSError: the coordinator's address is unknown, or its port is taken.
  """
  place = _place_of_flags(coordinator, processes, process) or _place_of_environment()
  if place is None or place[1] == 1:
    return
  coordinator, processes, process, local_devices = place
  if process == 0:
    _check_port(coordinator)
  jax.config.update("jax_enable_preemption_service", preemption)
  too_long = (
    f"process {process} has waited {JOIN_SECONDS} s for {processes} processes to meet at "
    f"{coordinator}: start all of them, with one --coordinator that each can reach, the same "
    f"--processes, and every --process from 0 to {processes - 1} once."
  )
  # Past its own limit, jax.distributed aborts with a trace.
  give_up = threading.Timer(JOIN_SECONDS, lambda: _leave([too_long]))
  give_up.daemon = True
  give_up.start()
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      local_device_ids=local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=JOIN_SECONDS + 60,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  finally:
    give_up.cancel()
  threading.Thread(target=_watch, daemon=True).start()
  local, devices = jax.local_device_count(), jax.device_count()
  logging.info("Process %d of %d, %d local devices of %d.", process, processes, local, devices)
  if process > 0:
    logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def shared_fate():
  """Around a run: an error in one process ends all, with its message and exit code 1.

  Exit codes of a SystemExit, such as of preemption, are no errors. A process that is done waits for
  the others. Without others this does nothing.
  """
  try:
    try:
      yield
    except SystemExit as leaving:
      if not isinstance(leaving.code, str):
        _wait_for_all()
      raise
    _wait_for_all()
  except BaseException as error:
    code = isinstance(error, SystemExit) and not isinstance(error.code, str)
    if not code and jax.distributed.is_initialized():
      _fail(error)
    raise


def _place_of_flags(coordinator, processes, process):
  """The place that the flags give, checked; None where they give none."""
  named = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [name for name, value in named.items() if value is None]
  if len(missing) == len(named):
    return None
  if missing:
    raise ValueError(
      f"{' and '.join(missing)} missing: --coordinator=HOST:PORT, --processes=N and --process=I go "
      "together."
    )
  if processes < 1:
    raise ValueError(f"--processes={processes} must be at least 1.")
  if not 0 <= process < processes:
    raise ValueError(
      f"--process={process} must lie in 0 .. {processes - 1}, as --processes={processes}."
    )
  port = re.fullmatch(r"(?:[^:]+|\[.+\]):(\d{1,5})", coordinator)
  if port is None or not 0 < int(port[1]) < 2**16:
    raise ValueError(
      f"--coordinator={coordinator} must be HOST:PORT of process 0, such as 10.0.0.2:8476."
    )
  return coordinator, processes, process, None


def _place_of_environment():
  """The place that the environment gives; None where it gives none, or a single process."""
  try:
    # In jax.distributed's order. It also knows plain Kubernetes, for which it asks an API server.
    known = (
      clusters.OmpiCluster,
      clusters.SlurmCluster,
      clusters.GkeTpuCluster,
      clusters.GceTpuCluster,
    )
    cluster = next((c for c in known if c.is_env_present()), None)
    if cluster is None or (processes := cluster.get_process_count()) == 1:
      return None
  except OSError as error:  # as in hosted notebooks: a TPU without Cloud TPU's metadata server
    logging.warning("No metadata server (%s): this is taken for the only process.", error)
    return None
  port = os.environ.get("JAX_COORDINATOR_PORT")
  try:
    coordinator = cluster.get_coordinator_address(JOIN_SECONDS, port)
  except RuntimeError as error:
    raise OSError(
      f"{error}: give --coordinator=HOST:PORT, --processes and --process, or start process 0."
    ) from error
  return coordinator, processes, cluster.get_process_id(), _local_devices(cluster, processes)


def _local_devices(cluster, processes):
  """[a GPU's number] where a node runs several processes; None for all devices of the node."""
  one_per_node = (
    os.environ.get("SLURM_STEP_NUM_NODES") == str(processes)
    or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
  )
  number = cluster.get_local_process_id()  # None on TPUs
  # jax.distributed itself would leave the only process of a node a single GPU.
  listed = "JAX_LOCAL_DEVICE_IDS" in os.environ
  return None if one_per_node or number is None or listed else [number]


def _check_port(coordinator):
  """Raises OSError where process 0 cannot listen, for which jax.distributed has but a crash."""
  port = int(coordinator.rpartition(":")[2])
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
  except OSError as error:
    raise OSError(
      f"process 0 cannot listen at port {port} of this machine ({error.strerror}): name another "
      "port in --coordinator, or in JAX_COORDINATOR_PORT where the environment places processes."
    ) from error


def _watch():
  """Ends this process once another has failed."""
  client = distributed.global_state.client
  while not _leaving.wait(_POLL_SECONDS):
    try:
      failures = _failures(client)
    except jax.errors.JaxRuntimeError:
      return  # the run is over, or process 0 died: then jax.distributed ends all
    if failures:
      _leave(failures, client)


def _fail(error):
  """Ends this process for `error`, and tells the others, unless it follows from another's error."""
  _leaving.set()
  client = distributed.global_state.client
  exits = isinstance(error, (SystemExit, KeyboardInterrupt))
  lines = error.args[:1] if exits else traceback.format_exception_only(error)
  message = "".join(map(str, lines)).strip() or type(error).__name__
  message = message.removeprefix("Error: ")
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 died: all know that
    if failures := _failures(client):
      _leave(failures, client)
    client.key_value_set(f"{_FAILED}{distributed.global_state.process_id}", message)
  if not exits:
    traceback.print_exception(error)
  _leave([message] if exits else [], client)


def _wait_for_all():
  """However long: jax.distributed, at exit, aborts after 5 minutes of waiting for the others."""
  if not jax.distributed.is_initialized():
    return
  place = distributed.global_state
  place.client.key_value_set(f"{_DONE}{place.process_id}", "")
  while len(place.client.key_value_dir_get(_DONE)) < place.num_processes:
    time.sleep(_POLL_SECONDS)


def _failures(client):
  """What the processes that failed have said: ["process i failed: ..."]."""
  messages = client.key_value_dir_get(_FAILED)
  return [f"process {key.rpartition('/')[2]} failed: {text}" for key, text in sorted(messages)]


def _leave(errors, client=None):
  """Prints the errors and ends this process; process 0 first lets the others read its store."""
  for error in errors:
    print(f"Error: {error}", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if client is not None:
    place = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.key_value_set(f"{_LEFT}{place.process_id}", "", allow_overwrite=True)
      deadline = time.monotonic() + _FAREWELL_SECONDS
      while place.process_id == 0 and time.monotonic() < deadline:
        if len(client.key_value_dir_get(_LEFT)) == place.num_processes:
          break
        time.sleep(0.1)
  os._exit(1)

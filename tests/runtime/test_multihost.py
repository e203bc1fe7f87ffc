"""Several processes as one run: two processes of four devices each, on this machine."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
from jax._src.clusters import cloud_tpu_cluster
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ism_jax.runtime import checkpoints, locks, multihost

ROOT = pathlib.Path(__file__).parent.parent.parent
CLUSTERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR_", "JAX_LOCAL_DEVICE_IDS")


class Joined(Exception):
  """Raised in the place of joining."""


@pytest.fixture
def joining(monkeypatch):
  """An environment without cluster, in which joining raises Joined(arguments)."""
  for name in os.environ:
    if name.startswith(CLUSTERS):
      monkeypatch.delenv(name)

  def join(*arguments, **options):
    raise Joined(*arguments, options["local_device_ids"])

  monkeypatch.setattr(jax.distributed, "initialize", join)
  before = jax.config.jax_enable_preemption_service
  yield monkeypatch
  jax.config.update("jax_enable_preemption_service", before)


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


@pytest.mark.parametrize(
  ("place", "message"),
  [
    (("10.0.0.2:8476", None, None), "--processes and --process missing"),
    ((None, 2, 0), "--coordinator missing"),
    (("10.0.0.2:8476", 2, 2), r"--process=2 must lie in 0 \.\. 1"),
    (("10.0.0.2:8476", 2, -1), r"--process=-1 must lie in 0 \.\. 1"),
    (("10.0.0.2:8476", 0, 0), "--processes=0 must be at least 1"),
    (("10.0.0.2", 2, 1), "must be HOST:PORT"),
    ((":8476", 2, 1), "must be HOST:PORT"),
    (("10.0.0.2:84760", 2, 1), "must be HOST:PORT"),
  ],
)
def test_flags_that_make_no_place_say_what_is_wrong(joining, place, message):
  with pytest.raises(ValueError, match=message):
    multihost.initialize(*place)


def test_flags_that_make_a_place_are_taken_before_the_environment(joining):
  joining.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
  with pytest.raises(Joined) as joined:
    multihost.initialize("[::1]:8476", 3, 2)
  assert joined.value.args == ("[::1]:8476", 3, 2, None)


SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "node[007-010]",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
}
OMPI = {
  "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_RANK": "1",
}


@pytest.mark.parametrize(
  ("environment", "place"),
  [
    # Four nodes of one task each: a task has all of its node's devices.
    (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, ("node007:61441", 4, 3, None)),
    (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "4"}, ("node007:61441", 8, 3, [1])),
    (
      OMPI
      | {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
      },
      ("10.96.0.1:61442", 2, 1, [1]),
    ),
    (
      OMPI
      | {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
      },
      ("10.96.0.1:61442", 2, 1, None),
    ),
  ],
)
def test_the_tasks_of_a_cluster_join(joining, environment, place):
  for name, value in environment.items():
    joining.setenv(name, value)
  with pytest.raises(Joined) as joined:
    multihost.initialize()
  assert joined.value.args == place


def test_the_workers_of_tpu_slices_join(joining):
  joining.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  joining.setenv("TPU_WORKER_HOSTNAMES", "localhost,worker-1")
  joining.setenv("TPU_WORKER_ID", "1")
  joining.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost:8080")
  joining.setenv("MEGASCALE_NUM_SLICES", "2")
  joining.setenv("MEGASCALE_SLICE_ID", "1")
  with pytest.raises(Joined) as joined:
    multihost.initialize()
  assert joined.value.args == ("localhost:8482", 4, 3, None)


@pytest.mark.parametrize(
  "environment",
  [
    {},
    SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"},
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # sbatch's script, not srun
    OMPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
  ],
)
def test_one_process_joins_nothing(joining, recwarn, environment):
  for name, value in environment.items():
    joining.setenv(name, value)
  multihost.initialize()
  assert not recwarn


def test_one_process_of_a_tpu_joins_nothing_with_or_without_a_metadata_server(joining):
  joining.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  with joining.context() as at_gke:
    at_gke.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    at_gke.setenv("MEGASCALE_NUM_SLICES", "1")
    multihost.initialize()
  joining.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")
  multihost.initialize()


def test_a_place_of_one_process_joins_nothing(joining):
  multihost.initialize("10.0.0.2:8476", 1, 0)


def test_a_coordinators_port_that_is_taken_is_said(joining):
  with (
    socket.create_server(("", 0)) as other,
    pytest.raises(OSError, match=r"cannot listen at port .* name another port"),
  ):
    multihost.initialize(f"127.0.0.1:{other.getsockname()[1]}", 2, 0)


def test_an_error_of_a_single_process_stays_what_it_is():
  with pytest.raises(ValueError, match="mine"), multihost.shared_fate():
    raise ValueError("mine")


SMALL = (
  "--config.batch_size=64",
  "--config.scan_steps=2",
  "--config.optimizer.warmup_steps=2",
  "--config.optimizer.schedule=constant",  # so that runs of any length compile once
  "--config.coupling.max_iterations=10",  # each is a collective over loopback
  "--config.log.every=4",
  "--config.log.gradients_every=0",
  "--config.monitor.every=0",
  "--config.checkpoint.keep_every=8",
  "--config.placement=sharded",
)
# A command that joins as main does; what process i of n then does is appended.
WORKER = """
import os, signal, sys, time
from absl import app
from jax.experimental import multihost_utils
from absl import flags
from ism_jax.runtime import commands, multihost
multihost.define_flags()

def main(_):
  commands.quiet_libraries()
  with multihost.shared_fate(), commands.one_line_errors():
    multihost.initialize_from_flags()
    n, i = flags.FLAGS.processes, flags.FLAGS.process
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """Four devices, and a data folder."""
  others = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTERS)}
  return others | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "TFDS_DATA_DIR": str(tmp_path_factory.mktemp("data")),
  }


class Processes:
  """Two processes that run a command together; `arguments` may differ between them."""

  def __init__(self, environment, folder, *arguments, command=("-m", "ism_jax.main")):
    coordinator = f"127.0.0.1:{free_port()}"
    self.logs = [folder / f"log{i}" for i in range(2)]
    self.processes = []
    for i, log in enumerate(self.logs):
      of_process = [a[i] if isinstance(a, tuple) else a for a in arguments]
      place = (f"--coordinator={coordinator}", "--processes=2", f"--process={i}")
      run = [sys.executable, *command, *of_process, *place]
      with open(log, "w") as file:
        self.processes.append(
          subprocess.Popen(run, cwd=ROOT, env=environment, stdout=file, stderr=file)
        )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self):
    return [log.read_text() for log in self.logs]

  def until(self, reached):
    while not reached():
      assert all(p.poll() is None for p in self.processes), self.said()
      time.sleep(0.01)

  def finish(self, seconds=600):
    """The exit codes, once both have ended by themselves."""
    return [process.wait(timeout=seconds) for process in self.processes]


def train(environment, folder, work, *arguments):
  return Processes(
    environment, folder, "--config=configs/digits.py", *SMALL, f"--workdir={work}", *arguments
  )


def saved_state(work, step):
  """The arrays of a checkpoint, by name."""
  with checkpoints.open_manager(work, keep=1, read_only=True) as manager:
    whole = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    args = jax.tree.map(whole, manager.item_metadata(step).state.tree)
    args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=args))
    state = manager.restore(step, args=args).state
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def entries(work):
  """metrics.jsonl without what depends on the clock."""
  clock = ("steps_per_second", "data_wait")
  lines = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def steps_of(work):
  return sorted(int(p.name) for p in work.glob("checkpoints/*") if p.name.isdigit())


@pytest.fixture(scope="module")
def killed(environment, tmp_path_factory):
  """A run whose processes were killed amid a save, and which then went on: (workdir, last step)."""
  folder = tmp_path_factory.mktemp("killed")
  work = folder / "work"
  every = "--config.checkpoint.every=4"
  with train(environment, folder, work, every, "--config.steps=1000000") as run:
    run.until(lambda: steps_of(work) and any("tmp" in p.name for p in work.glob("checkpoints/*")))
    for process in run.processes:
      process.send_signal(signal.SIGKILL)
    assert run.finish() == [-signal.SIGKILL] * 2
  total = steps_of(work)[-1] + 4
  with train(environment, folder, work, every, f"--config.steps={total}") as run:
    assert run.finish() == [0, 0], run.said()
    said = run.said()
  assert f"Continuing from step {total - 4}" in said[0] and f"step {total}/{total}" in said[0]
  assert "Process 0 of 2, 4 local devices of 8." in said[0]
  assert "Process 1 of 2, 4 local devices of 8." in said[1]
  assert "Continuing" not in said[1] and "step " not in said[1]
  return work, total


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory, killed):
  """The same run without interruption: its workdir."""
  folder = tmp_path_factory.mktemp("whole")
  work = folder / "work"
  with train(
    environment, folder, work, "--config.checkpoint.every=4", f"--config.steps={killed[1]}"
  ) as run:
    assert run.finish() == [0, 0], run.said()
  return work


@pytest.mark.slow
def test_two_processes_killed_and_continued_are_the_same_run(killed, whole):
  work, total = killed
  actual, expected = saved_state(work, total), saved_state(whole, total)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  assert entries(work) == entries(whole)
  assert len(entries(whole)) == total // 4


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(environment, tmp_path, whole):
  command = [
    sys.executable,
    "-m",
    "ism_jax.main",
    "--config=configs/digits.py",
    *SMALL,
    "--config.steps=8",
    "--config.placement=replicated",
    f"--workdir={tmp_path}",
  ]
  subprocess.run(command, cwd=ROOT, env=environment | {"JAX_NUM_CPU_DEVICES": "8"}, check=True)
  actual, expected = saved_state(whole, 8), saved_state(tmp_path, 8)
  names = [name for name in expected if "params" in name or "ema" in name]
  assert names
  for name in names:
    np.testing.assert_allclose(actual[name], expected[name], atol=2e-4, err_msg=name)
  np.testing.assert_allclose(
    [e["loss"] for e in entries(whole)[:2]], [e["loss"] for e in entries(tmp_path)], rtol=1e-4
  )


@pytest.mark.slow
def test_two_processes_evaluate_as_one(environment, tmp_path, whole):
  evaluate = (
    "--mode=evaluate",
    "--config.evaluation.num_images=100",
    "--config.evaluation.steps=(1,)",
    "--config.evaluation.w=(0.5,)",
  )
  two, one = tmp_path / "two", tmp_path / "one"
  for work in (two, one):
    shutil.copytree(whole, work)
  with Processes(environment, tmp_path, f"--workdir={two}", *evaluate) as run:
    assert run.finish() == [0, 0], run.said()
    assert "accuracy" in run.said()[0] and "accuracy" not in run.said()[1]
  command = [sys.executable, "-m", "ism_jax.main", f"--workdir={one}", *evaluate]
  subprocess.run(command, cwd=ROOT, env=environment, check=True)
  actual, expected = (json.loads((w / "evaluation.json").read_text()) for w in (two, one))
  for key, tolerance in (("results", 1e-2), ("straightness", 1e-3)):
    (a,), (b,) = actual.pop(key), expected.pop(key)
    assert a.keys() == b.keys()
    a, b = (r | r.pop("scores", {}).get("classifier", {}) for r in (a, b))
    for name in a.keys() - {"images_per_second"}:
      np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=1e-3, err_msg=name)
  assert [r.pop("devices") for r in (actual, expected)] == ["8 x cpu", "4 x cpu"]
  assert actual == expected  # of the reference: to the last bit


# The command, with less to compile and to repeat.
BENCHMARK = """
from ism_jax.performance import benchmark, timing
from ism_jax.runtime import commands
timing.SHORTEST, benchmark.STEPS, benchmark._SECONDS_READ = 0.01, (1,), 0.01
every, compared = benchmark.techniques, (benchmark.FLOW_MATCHING, benchmark.STEP)
benchmark.techniques = lambda exp: {name: every(exp)[name] for name in compared}
commands.run(benchmark)
"""


@pytest.mark.slow
def test_two_processes_are_one_benchmark_of_a_variant_that_does_not_pair(environment, tmp_path):
  out = tmp_path / "out"
  arguments = (
    "--config=configs/digits.py:sm",
    *SMALL,
    "--config.model.unroll=1",
    "--config.batch_size=16",
    "--config.sample.batch_size=8",
    "--repeats=1",
    "--config.coupling.pool_size=2",
    f"--out={out}",
  )
  two_devices = environment | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  with Processes(two_devices, tmp_path, *arguments, command=("-c", BENCHMARK)) as run:
    assert run.finish() == [0, 0], run.said()
  assert "## Sampling" in run.said()[0] and "## Sampling" not in run.said()[1]
  report = json.loads((out / "benchmark.json").read_text())
  assert report["devices"]["count"] == 2
  assert report["pool"]["shares"]["pairing"]["median"] == 0 and not report["pool"]["pairs_at"]


@pytest.mark.slow
def test_sigterm_to_one_process_makes_both_save_the_same_step_and_leave(environment, tmp_path):
  work = tmp_path / "work"
  endless = ("--config.steps=1000000", "--config.checkpoint.every=100000")
  with train(environment, tmp_path, work, *endless) as run:
    run.until(lambda: re.search(r"step \d+/", run.said()[0]))
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.finish() == [143, 143], run.said()
    stopped = [re.search(r"Stopped by SIGTERM after step (\d+)", said)[1] for said in run.said()]
  assert stopped[0] == stopped[1]
  assert steps_of(work) == [int(stopped[0])]
  assert saved_state(work, int(stopped[0]))["['step']"] == int(stopped[0])


@pytest.mark.slow
def test_an_error_of_training_in_one_process_ends_both(environment, tmp_path):
  with Processes(
    environment,
    tmp_path,
    "--config=configs/digits.py",
    *SMALL,
    (f"--workdir={tmp_path / 'work'}", "--workdir=/proc/nowhere"),
  ) as run:
    assert run.finish(60) == [1, 1]
    said = run.said()
  for text in said:
    assert "Error: " in text and "/proc/nowhere cannot be written" in text
    assert "Traceback" not in text
  assert "Error: process 1 failed: " in said[0]


@pytest.mark.slow
def test_two_processes_in_the_workdir_of_another_run_are_both_refused(environment, tmp_path):
  with locks.hold(str(tmp_path / "work")), train(environment, tmp_path, tmp_path / "work") as run:
    assert run.finish(60) == [1, 1]
    said = run.said()
  for text in said:
    assert f"work is being trained in by process {os.getpid()} on " in text
    assert "Traceback" not in text
  assert not (tmp_path / "work" / "checkpoints").exists()


@pytest.mark.slow
def test_an_error_of_process_0_reaches_one_that_waits_in_a_collective(environment, tmp_path):
  """Process 0 runs what carries its message, and outlasts it."""
  script = (
    f"{WORKER}    if i == 0: 1 / 0\n    multihost_utils.sync_global_devices('x')\napp.run(main)"
  )
  with Processes(environment, tmp_path, command=("-c", script)) as run:
    assert run.finish(60) == [1, 1], run.said()
    said = run.said()
  assert said[0].count("ZeroDivisionError: division by zero") == 1 and "Traceback" in said[0]
  assert "Error: process 0 failed: ZeroDivisionError: division by zero" in said[1]
  assert "Traceback" not in said[1]


@pytest.mark.slow
def test_a_process_that_is_done_waits_longer_than_jax_would(environment, tmp_path):
  """JAX's limit is five minutes, here eight seconds."""
  script = (
    "import functools\nfrom jax._src.lib import _jax\n"
    "client = _jax.get_distributed_runtime_client\n"
    "_jax.get_distributed_runtime_client = functools.partial(client, shutdown_timeout=8)\n"
    f"{WORKER}    time.sleep(16 * i)\napp.run(main)"
  )
  with Processes(environment, tmp_path, command=("-c", script)) as run:
    assert run.finish(120) == [0, 0], run.said()


@pytest.mark.slow
def test_a_process_that_dies_without_a_word_ends_the_other(environment, tmp_path):
  script = WORKER.replace("\ndef main", "multihost.HEARTBEAT_SECONDS = 5\n\ndef main", 1) + (
    "    if i == 1: os.kill(os.getpid(), signal.SIGKILL)\n    time.sleep(600)\napp.run(main)"
  )
  with Processes(environment, tmp_path, command=("-c", script)) as run:
    codes = run.finish(60)
    said = run.said()
  assert codes[1] == -signal.SIGKILL and codes[0] != 0
  assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in said[0]


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so(environment, tmp_path):
  """Nobody listens where process 1 looks."""
  script = (
    WORKER.replace("\ndef main", "multihost.JOIN_SECONDS = 4\n\ndef main", 1) + "app.run(main)"
  )
  elsewhere = f"--coordinator=127.0.0.1:{free_port()}"
  process = subprocess.Popen(
    [sys.executable, "-c", script, elsewhere, "--processes=2", "--process=1"],
    cwd=ROOT,
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  _, said = process.communicate(timeout=60)
  assert process.returncode == 1
  assert said.splitlines()[-1].startswith("Error: process 1 has waited 4 s for 2 processes to meet")


@pytest.mark.slow
def test_sigterm_ends_what_does_not_train(environment, tmp_path):
  script = f"{WORKER}    print('up', flush=True)\n    time.sleep(600)\napp.run(main)"
  with Processes(environment, tmp_path, command=("-c", script)) as run:
    run.until(lambda: all("up" in said for said in run.said()))
    for process in run.processes:
      process.terminate()
    assert run.finish(30) == [-signal.SIGTERM] * 2

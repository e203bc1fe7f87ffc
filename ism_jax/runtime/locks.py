"""One run in a workdir at a time: two would delete each other's checkpoints.

The first process of a run locks `<workdir>/training.lock`, and says there who it is, anew every
`BEAT_SECONDS`. The lock is the kernel's and ends with the process, however that ends: on one
machine, and on network file systems that pass locks on, it is exact. On others, and on gs://, what
the file says counts: another machine's run is believed to live until the file has not changed for
`SILENCE_SECONDS`, which a new run waits for. No clocks are compared.

Not guaranteed where no lock is passed on: that one of two runs is refused which start within
`SETTLE_SECONDS`, or of which one could write nothing for `SILENCE_SECONDS`, as on a machine that
slept. Commands that only read a workdir take no lock.
"""

import contextlib
import fcntl
import json
import os
import platform
import threading
import time

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from ism_jax.runtime import files, multihost

BEAT_SECONDS = 15.0
SILENCE_SECONDS = 60.0
SETTLE_SECONDS = 2.0
_HOLDER = {"host": str, "boot": str, "process": int, "since": str}
_LONGEST = 1024  # bytes, of what is read and of an error that processes share


@contextlib.contextmanager
def hold(workdir: str):
  """Around a run: no other trains in the workdir. All processes of the run ask together.

  Args:
    workdir: as `checkpoints.check_workdir` returns it.
  Raises:
    OSError: in every process, where another run holds the workdir or it cannot be written.
  """
  with contextlib.ExitStack() as held:
    error = None
    if jax.process_index() == 0:
      try:
        held.enter_context(_hold(workdir))
      except Exception as e:  # each storage has errors of its own, and other processes are waiting
        error = e
    # Not in the collective: some give up after half a minute.
    patience = 1000 * int(SILENCE_SECONDS + multihost.JOIN_SECONDS)
    ocp.multihost.get_barrier_sync_fn()(key="ism_jax:workdir_held", timeout_ms=patience)
    reason = _from_first_process("" if error is None else str(error) or repr(error))
    if error is not None:
      raise error
    if reason:
      raise OSError(reason)
    yield


@contextlib.contextmanager
def _hold(workdir):
  path = f"{workdir}/training.lock"
  me = dict(zip(_HOLDER, (platform.node(), _boot_id(), os.getpid(), _now()), strict=True))
  with _locked(workdir, path) as file:
    holder = _read(path)
    # Of this machine only a dead run's words can be there, as the lock was free.
    if holder and (file is None or any(holder[key] != me[key] for key in ("host", "boot"))):
      _wait_for_silence(workdir, path, holder)
    write = lambda: _write(path, file, json.dumps(me | {"alive": time.time_ns()}))
    write()
    if file is None:
      time.sleep(SETTLE_SECONDS)
      if _read(path) != me:
        raise _refusal(workdir, _read(path))
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, write, ended), daemon=True)
    beating.start()
    try:
      yield
    finally:
      ended.set()
      beating.join()
      with _only_warning(path):
        _write(path, file, "")


@contextlib.contextmanager
def _locked(workdir, path):
  """The locked file's descriptor; None where there are no locks."""
  if "://" in path:
    yield None
    return
  os.makedirs(workdir, exist_ok=True)
  try:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  except PermissionError as error:
    raise OSError(
      f"{path} cannot be written ({error.strerror}): have its owner allow it (chmod g+w), or "
      "remove it if no run is alive."
    ) from error
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      locked = file
    except BlockingIOError:
      raise _refusal(workdir, _read(path)) from None
    except OSError:  # a file system without locks
      locked = None
    yield locked
  finally:
    os.close(file)


def _refusal(workdir, holder):
  who = "another process"
  if holder:
    who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
  return OSError(
    f"{workdir} is being trained in by {who}: wait for its end, or train in another --workdir."
  )


def _wait_for_silence(workdir, path, holder):
  logging.warning(
    "Process %d on %s was training in %s: waiting %d s for a sign of life of it.",
    *(holder["process"], holder["host"], workdir, SILENCE_SECONDS),
  )
  end = time.monotonic() + SILENCE_SECONDS
  before = _content(path)
  while time.monotonic() < end:
    time.sleep(BEAT_SECONDS / 10)
    if _content(path) != before:
      if holder := _read(path):
        raise _refusal(workdir, holder)
      return  # it has ended


def _beat(path, write, ended):
  while not ended.wait(BEAT_SECONDS):
    with _only_warning(path):
      write()


@contextlib.contextmanager
def _only_warning(path):
  try:
    yield
  except Exception as error:  # each storage has errors of its own
    logging.log_every_n_seconds(logging.WARNING, "%s: %r", 600, path, error)


def _read(path):
  """Who says to be training, or None."""
  try:
    holder = json.loads(_content(path))
  except (FileNotFoundError, ValueError, RecursionError):
    return None
  known = isinstance(holder, dict) and all(isinstance(holder.get(k), t) for k, t in _HOLDER.items())
  return {key: holder[key] for key in _HOLDER} if known else None


def _content(path):
  with epath.Path(path).open("rb") as file:
    return file.read(_LONGEST)


def _write(path, file, text):
  if file is None:
    files.write_here(path, text)
    return
  try:
    os.pwrite(file, text.encode(), 0)  # in place: the lock is on this file
    os.ftruncate(file, len(text))
    os.fsync(file)  # other machines read it
  except OSError as e:
    raise OSError(f"{path} cannot be written ({e.strerror}); see to it that it can.") from e


def _now():
  return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _boot_id():
  """What tells this machine from others of its name; "" where the system does not say."""
  try:
    return epath.Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()
  except OSError:
    return ""


def _from_first_process(text):
  """The text of the first process, cut to `_LONGEST`, in all processes."""
  data = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
  return bytes(multihost_utils.broadcast_one_to_all(data)).rstrip(b"\0").decode(errors="ignore")

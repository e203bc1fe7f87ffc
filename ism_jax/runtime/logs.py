"""What a run says: a progress line, metrics.jsonl, TensorBoard events and perhaps Weights & Biases.

All of the same values.
"""

import collections
from collections.abc import Sequence
from concurrent import futures
import contextlib
import datetime
import fractions
import glob
import io
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time

from absl import logging
from etils import epath
import jax
import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
import tqdm

from ism_jax import paths
from ism_jax.runtime import files, wandb_run

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_EVENTS = 30.0
_LONGEST = datetime.timedelta(days=100_000)  # that an ETA tells


class _Copies:
  """Copies the files of a folder, as they grow, to a path with a scheme, such as gs://.

  An object store cannot append, so files are copied whole, those that have changed. A copy that
  fails is a warning, and the next one makes up for it: the storage may be away for a while.
  """

  def __init__(self, folder: str, target: str):
    self._folder, self._target = folder, epath.Path(target)
    self._sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)}
    self._thread, self._running = futures.ThreadPoolExecutor(1), None

  def start(self) -> None:
    """Starts copying, unless that is under way."""
    if self._running is None or self._running.done():
      self._running = self._thread.submit(self._copy)

  def finish(self) -> None:
    """Copies what has not been, and waits for it."""
    self._thread.submit(self._copy).result()

  def _copy(self):
    try:
      for name in sorted(os.listdir(self._folder)):
        with open(os.path.join(self._folder, name), "rb") as f:
          data = f.read()
        if len(data) != self._sizes.get(name):
          (self._target / name).write_bytes(data)
          self._sizes[name] = len(data)
    except Exception as error:  # each storage has errors of its own
      logging.warning("Logs were not copied to %s, and will be later: %r", self._target, error)


def read_entries(path) -> list[dict[str, float]]:
  """The entries of a metrics.jsonl. Damaged lines are left out, with one warning of them all."""
  entries, damaged = [], []
  for number, line in enumerate(epath.Path(path).read_bytes().splitlines(), 1):
    try:
      entry = json.loads(line)
      if all(type(value) in (int, float) for value in (entry["step"], *entry.values())):
        entries.append(entry)
        continue
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
      pass  # whatever bytes can be
    damaged.append(number)
  if damaged:
    logging.warning(
      "%s: %d lines are damaged and left out, such as line %d; the other %d are whole.",
      *(path, len(damaged), damaged[0], len(entries)),
    )
  return entries


class _Growing:
  """A file that grows by whole pieces: those that cannot be written wait for the next time."""

  def __init__(self, path: str):
    self._path, self._waiting, self._written = path, [], 0.0

  def add(self, piece: bytes, seconds: float = 0.0) -> None:
    """Adds a piece, and writes unless that was done less than so many seconds ago."""
    self._waiting.append(piece)
    if time.monotonic() - self._written >= seconds:
      self.write()

  def write(self) -> None:
    """Writes what waits, all or nothing; raises OSError."""
    if not self._waiting:
      return
    size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
    try:
      with open(self._path, "ab") as f:
        f.write(b"".join(self._waiting))
    except OSError:
      with contextlib.suppress(OSError):
        os.truncate(self._path, size)
      raise
    self._waiting.clear()
    self._written = time.monotonic()


def _record(**event) -> bytes:
  """An event as it stands in an event file of TensorBoard.

  By hand: tensorboardX's own writer hands events to a thread, and waits for good once that has met
  an error.
  """
  data = Event(wall_time=datetime.datetime.now().timestamp(), **event).SerializeToString()
  length = struct.pack("<Q", len(data))
  checksum = lambda part: struct.pack("<I", masked_crc32c(part))
  return length + checksum(length) + data + checksum(data)


class _Pace:
  """The rate of the last ten entries, counted in the plural `unit`, and the time left to `total`.

  What comes before `start`, such as compilation, does not count.
  """

  def __init__(self, total: int, unit: str):
    self._total, self._unit = total, unit
    self._entries = collections.deque(maxlen=10)

  def start(self, done: int) -> None:
    """Starts the clock, unless it runs."""
    if not self._entries:
      self.add(done)

  def add(self, done: int) -> None:
    """Adds an entry: `done` are done now."""
    self._entries.append((time.monotonic(), done))

  @property
  def is_due(self) -> bool:
    """Whether the last entry was long ago."""
    return time.monotonic() - self._entries[-1][0] >= _SECONDS_BETWEEN_LINES

  def __str__(self):
    (start, done_before), (now, done) = self._entries[0], self._entries[-1]
    if done == done_before or now == start:
      return "ETA unknown yet"
    rate = (done - done_before) / (now - start)
    seconds = min((self._total - done) / rate, _LONGEST.total_seconds())
    eta = datetime.timedelta(seconds=round(seconds))
    return f"{rate:.1f} {self._unit}/s, ETA {eta}"


class Writer:
  """Averages the metrics of steps and writes them every so often. Only the first process writes.

  An entry holds means since the entry before: the metrics, the diagnostics of the couplings as
  "coupling/..." (so "coupling/converged" is the share of solves that did), the consistency loss of
  each d as "consistency/d_1_64", ..., "steps_per_second", and "data_wait", the share of time spent
  waiting for the input pipeline. Entries fall on the same steps, with the same means, wherever a
  run is stopped and continued. For a workdir with a scheme, such as gs://, they are written to a
  temporary folder, which is copied there.

  Args:
    workdir: where the entries go.
    start: steps done.
    state: of the writer then, as `state` returns it; None at the beginning.
    total: steps of the whole run.
    every: steps between entries.
    config: {key: value} of the run, which TensorBoard shows as text.
    hyperparameters: its keys in which TensorBoard compares runs.
    compared: names of the entries that are compared.
    wandb: project of Weights & Biases that has everything too, "" for none; see `wandb_run`.
  Raises:
    ValueError: `wandb` cannot be used.
  """

  def __init__(
    self,
    workdir: str,
    *,
    start: int,
    state: dict | None,
    total: int,
    every: int,
    config: dict | None = None,
    hyperparameters: Sequence[str] = (),
    compared: Sequence[str] = (),
    wandb: str = "",
  ):
    self._step, self._total, self._every = start, total, every
    self._sums = dict(state or {})
    self._pace = _Pace(total, "steps")
    self._start_clock()
    self._bar = self._events = self._copies = self._wandb = None
    self._closing = contextlib.ExitStack()
    if jax.process_index() != 0:
      return
    folder = self._workdir = os.fspath(workdir)
    metrics_path = os.path.join(folder, "metrics.jsonl")
    if "://" in folder:
      temporary = tempfile.TemporaryDirectory(prefix="ism_jax_logs_")
      folder = self._closing.enter_context(temporary)
    if epath.Path(metrics_path).exists():
      # A run that continues from step `start` writes what came after it anew.
      entries = [entry for entry in read_entries(metrics_path) if entry["step"] <= start]
      for path in {metrics_path, os.path.join(folder, "metrics.jsonl")}:
        files.write_whole(path, "".join(map(_line, entries)))
    os.makedirs(folder, exist_ok=True)
    if folder != self._workdir:
      self._copies = _Copies(folder, self._workdir)
      self._closing.callback(self._copies.finish)
    self._lock, self._warned = threading.Lock(), False  # the monitor writes from a thread
    self._lines = _Growing(os.path.join(folder, "metrics.jsonl"))
    now = int(datetime.datetime.now().timestamp())
    name = f"events.out.tfevents.{now:010d}.{socket.gethostname()}"
    self._events = _Growing(os.path.join(folder, name))
    begun = SessionLog(status=SessionLog.START)  # TensorBoard forgets what came after
    self._log(self._events, _record(file_version="brain.Event:2"))
    self._log(self._events, _record(step=start + 1, session_log=begun))
    self._closing.callback(self._write_waiting)
    if config:
      self._write_config(start, config, hyperparameters, compared)
    if wandb:
      self._wandb = self._closing.enter_context(wandb_run.start(wandb, self._workdir, config))
    if sys.stderr.isatty():
      bar = tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
      self._bar = self._closing.enter_context(bar)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._closing.close()

  def _start_clock(self) -> None:
    self._since, self._since_step, self._waited = time.perf_counter(), self._step, 0.0

  def waited(self, seconds: float) -> None:
    """Counts time spent waiting for data."""
    self._waited += seconds

  def state(self) -> dict[str, list[float]]:
    """What has been summed up for the next entry: JSON, exact. Earlier entries are stored now."""
    self._write_waiting()
    if self._copies is not None:
      self._copies.finish()
    return dict(self._sums)

  def add(self, last_step: int, metrics: dict[str, np.ndarray], info: dict) -> None:
    """Takes the metrics [S] of the S steps up to `last_step`, and the coupling's diagnostics."""
    self._count(metrics | {f"coupling/{name}": np.array([value]) for name, value in info.items()})
    if self._bar is not None:
      self._bar.update(last_step - self._step)
    before, self._step = self._step, last_step
    self._pace.start(last_step)
    if last_step // self._every == before // self._every and last_step < self._total:
      return
    seconds = time.perf_counter() - self._since
    entry = {name: total / count for name, (total, count) in self._sums.items()}
    entry["steps_per_second"] = (last_step - self._since_step) / seconds
    entry["data_wait"] = self._waited / seconds
    self._sums = {}
    self._start_clock()
    self.write(last_step, entry)
    self._pace.add(last_step)
    names = ("loss", "velocity", "guidance", "consistency")
    losses = ", ".join(f"{name} {entry[name]:.4f}" for name in names if name in entry)
    if self._bar is not None:
      self._bar.set_postfix_str(losses)
    elif self._events is not None:
      logging.info("step %d/%d: %s, %s", last_step, self._total, losses, self._pace)

  def _count(self, metrics: dict[str, np.ndarray]) -> None:
    jumps = metrics.pop("jumps", None)
    sums = {name: (np.sum(a, dtype=np.float64), len(a)) for name, a in metrics.items()}
    if jumps is not None:
      for d, total, count in zip(paths.JUMPS, *jumps.sum(0, dtype=np.float64), strict=True):
        if count:
          sums["consistency/d_" + str(fractions.Fraction(d)).replace("/", "_")] = total, count
    for name, (total, count) in sums.items():
      total_before, count_before = self._sums.get(name, (0.0, 0))
      self._sums[name] = [float(total_before + total), int(count_before + count)]

  def write(self, step: int, entry: dict[str, float]) -> None:
    """Writes an entry of its own: numbers, by name."""
    if self._events is None:
      return
    entry = {name: float(value) for name, value in entry.items()}
    self._log(self._lines, _line({"step": step} | entry).encode())
    grouped = {in_group(name): value for name, value in entry.items()}
    for name, value in grouped.items():
      self._add_event(step, summary.scalar(name, value))
    self._mirror(step, grouped)
    if self._copies is not None:
      self._copies.start()

  def image(self, step: int, name: str, png: bytes) -> None:
    """Writes a picture to the event file, and W&B."""
    if self._events is not None:
      picture = Image.open(io.BytesIO(png)).convert("RGB")
      self._add_event(step, summary.image(name, np.asarray(picture), dataformats="HWC"))
      self._mirror(step, {name: picture})

  def _write_config(self, step: int, config: dict, hyperparameters, compared) -> None:
    cell = lambda value: f"`{value!r}`".replace("|", "\\|")
    table = ["| key | value |", "| --- | --- |"]
    table += [f"| {key} | {cell(value)} |" for key, value in config.items()]
    self._add_event(step, summary.text("config", "\n".join(table)))
    plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in config.items()}
    plain = {key: plain[key] for key in hyperparameters}
    for part in summary.hparams(plain, dict.fromkeys(map(in_group, compared)))[:2]:  # no end yet
      self._add_event(step, part)

  def _mirror(self, step: int, values: dict) -> None:
    if self._wandb is not None:
      with self.tolerance(), self._lock:
        self._wandb.add(step, values)

  @contextlib.contextmanager
  def tolerance(self):
    """Around what is logged: no error of writing stops the run, and only the first is told."""
    try:
      yield
    except Exception as error:  # each storage has errors of its own
      if not self._warned:
        self._warned = True
        logging.warning(
          "Logs cannot be written to %s (%s). The run goes on, and so will they once they can.",
          *(self._workdir, error),
        )

  def _log(self, file: _Growing, piece: bytes, seconds: float = 0.0) -> None:
    with self.tolerance(), self._lock:
      file.add(piece, seconds)

  def _add_event(self, step, value) -> None:
    self._log(self._events, _record(step=step, summary=value), _SECONDS_BETWEEN_EVENTS)

  def _write_waiting(self) -> None:
    for file in (self._lines, self._events) if self._events is not None else ():
      with self.tolerance(), self._lock:
        file.write()


def in_group(name: str) -> str:
  """The name of an entry in TensorBoard and W&B, which show those of one "GROUP/" together."""
  if "/" in name:
    return name
  if name.endswith("_norm"):
    return f"norms/{name}"
  return f"{'speed' if name in ('steps_per_second', 'data_wait') else 'losses'}/{name}"


def _line(entry: dict[str, float]) -> str:
  return json.dumps(entry) + "\n"


class Profile:
  """A profile of some steps of a run, for XProf, which is TensorBoard's profile page too.

  From step `first` on, until at least `steps` are done or the block is left. Each process writes
  its own, below plugins/profile in the workdir, once it is whole. Calls of Python functions are not
  in it: hooked into the interpreter, JAX's tracer crashed a process whose threads were starting.
  """

  def __init__(self, workdir: str, *, first: int, steps: int):
    self._workdir, self._first, self._steps = os.fspath(workdir), first, steps
    self._running, self._result = contextlib.ExitStack(), None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._running.close()

  def start(self, step: int) -> None:
    """Starts, if `step` is the first."""
    if self._steps and step == self._first:
      temporary = tempfile.TemporaryDirectory(prefix="ism_jax_profile_")
      folder = self._running.enter_context(temporary)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0
      jax.profiler.start_trace(folder, profiler_options=options)
      self._running.callback(self._write, folder)

  def done(self, step: int, result) -> None:
    """Ends after the last of its steps; `result` is what the step computes."""
    self._result = result
    if step >= self._first + self._steps:
      self._running.close()

  def _write(self, folder: str) -> None:
    jax.block_until_ready(self._result)
    jax.profiler.stop_trace()
    try:
      for path in glob.glob("plugins/profile/*/*.xplane.pb", root_dir=folder):
        with open(os.path.join(folder, path), "rb") as f:
          files.write_here(os.path.join(self._workdir, path), f.read())
    except Exception as error:  # a log never stops a run
      logging.warning("The profile cannot be written to %s (%s).", self._workdir, error)
      return
    logging.info("Profiled; `pip install xprof` and `xprof %s` show it.", self._workdir)


class Progress:
  """Logs how many of `total` images a command has done, every so often."""

  def __init__(self, total: int):
    self._total = total
    self._done = self._unreadable = 0
    self._pace = _Pace(total, "images")

  def add(self, done: int, unreadable: int = 0) -> None:
    """Counts images, among them unreadable ones."""
    self._done += done
    self._unreadable += unreadable
    self._pace.start(self._done)
    if self._pace.is_due or self._done >= self._total:
      self._pace.add(self._done)
      unreadable = f", {self._unreadable} unreadable" if self._unreadable else ""
      logging.info("%d/%d images%s, %s", self._done, self._total, unreadable, self._pace)

"""What a run says: a progress line, metrics.jsonl and TensorBoard events, of the same values."""

import contextlib
import datetime
import json
import os
import sys
import time
import traceback

from absl import logging
import jax
import numpy as np
import tensorboardX
import tqdm


def as_dict(config) -> dict:
  """A ConfigDict as a plain dict that JSON can hold."""
  return json.loads(config.to_json())


_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def only_ours() -> None:
  """Lets the project's own messages through, and of libraries their warnings: Orbax says a lot."""
  ours = lambda record: record.pathname.startswith(_PACKAGE)
  logging.set_verbosity(logging.INFO)
  # It also warns that a checkpoint opened for reading is opened for reading.
  expected = lambda record: any(s in str(record.msg) for s in ("read_only=True", "read only"))
  logging.get_absl_handler().addFilter(
    lambda record: ours(record) or (record.levelno >= 30 and not expected(record))
  )


@contextlib.contextmanager
def one_line_errors():
  """Ends the process in one line for our own errors; those of libraries keep their trace."""
  try:
    yield
  except (ValueError, OSError, FloatingPointError) as error:
    if traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE):
      raise SystemExit(f"Error: {error}") from None
    raise


def write_whole(path: str, data: str | bytes) -> None:
  """Writes a file that is either all there or not there, from the first process alone."""
  if jax.process_index() != 0:
    return
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  temporary = f"{path}.tmp"
  with open(temporary, "wb") as f:
    f.write(data.encode() if isinstance(data, str) else data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


class Writer:
  """Averages the metrics of steps and writes them every so often, from the first process alone.

  An entry holds means since the entry before: the metrics, the diagnostics of the couplings as
  "coupling/..." (so "coupling/converged" is the share of solves that did), "steps_per_second", and
  "data_wait", the share of time spent waiting for the input pipeline.
  """

  def __init__(self, workdir: str, *, start: int, total: int, every: int):
    self._step, self._total, self._every = start, total, every
    self._start_window(start)
    self._bar = self._events = None
    self._lines_path = os.path.join(workdir, "metrics.jsonl")
    if jax.process_index() != 0:
      return
    if os.path.exists(self._lines_path):
      # A run that continues from step `start` writes what came after it anew.
      with open(self._lines_path) as f:
        kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= start]
      write_whole(self._lines_path, "".join(kept))
    self._events = tensorboardX.SummaryWriter(workdir, purge_step=start + 1, flush_secs=30)
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for sink in (self._bar, self._events):
      if sink is not None:
        sink.close()

  def _start_window(self, step: int) -> None:
    self._window, self._window_start = [], step
    self._since, self._waited = time.perf_counter(), 0.0

  def waited(self, seconds: float) -> None:
    """Counts time spent waiting for data."""
    self._waited += seconds

  def add(self, last_step: int, metrics: dict[str, np.ndarray], info: dict) -> None:
    """Takes the metrics [S] of the S steps up to `last_step`, and the coupling's diagnostics."""
    self._window.append((metrics, info))
    if self._bar is not None:
      self._bar.update(last_step - self._step)
    self._step = last_step
    if last_step - self._window_start < self._every and last_step < self._total:
      return
    now = time.perf_counter()
    rate = (last_step - self._window_start) / (now - self._since)
    entry = {name: float(np.mean([m[name] for m, _ in self._window])) for name in metrics}
    entry |= {
      f"coupling/{name}": float(np.mean([i[name] for _, i in self._window])) for name in info
    }
    entry |= {"steps_per_second": rate, "data_wait": self._waited / (now - self._since)}
    self._start_window(last_step)
    if self._events is not None:
      self._write(last_step, entry)

  def _write(self, step: int, entry: dict[str, float]) -> None:
    with open(self._lines_path, "a") as f:
      f.write(json.dumps({"step": step} | entry) + "\n")
    for name, value in entry.items():
      self._events.add_scalar(name, value, step)
    names = [n for n in ("loss", "velocity", "guidance", "consistency") if n in entry]
    losses = ", ".join(f"{name} {entry[name]:.4f}" for name in names)
    if self._bar is not None:
      self._bar.set_postfix_str(losses)
      return
    rate = entry["steps_per_second"]
    eta = datetime.timedelta(seconds=round((self._total - step) / rate))
    logging.info("step %d/%d: %s, %.1f steps/s, ETA %s", step, self._total, losses, rate, eta)

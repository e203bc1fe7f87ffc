"""The writer of metrics: means over windows, wherever a run is stopped."""

import contextlib
import datetime
import io
import json
import os
import resource
import shutil
import struct
import types

from absl import logging
from etils import epath
from fsspec.implementations import memory
import numpy as np
from PIL import Image
import pytest
import tensorboardX
from tensorboardX.proto.event_pb2 import Event

from ism_jax.runtime import files, logs

WORKDIR = "gs://bucket/a run"


def steps(first, count, rng_seed=0):
  """(last step, metrics, info) of calls of two steps each."""
  rng = np.random.default_rng(rng_seed)
  calls = []
  for last in range(first + 1, first + count, 2):
    counts = rng.integers(0, 3, (2, 7))
    jumps = np.stack([counts * rng.random((2, 7)), counts], axis=1).astype(np.float32)
    metrics = {"loss": rng.random(2).astype(np.float32), "jumps": jumps}
    calls.append((last, metrics, {"converged": np.float32(last % 4 == 0)}))
  return calls


def entries(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [
    {k: v for k, v in line.items() if k not in ("steps_per_second", "data_wait")} for line in lines
  ]


def write(workdir, calls, *, start=0, state=None, total=12, every=4):
  with logs.Writer(workdir, start=start, state=state, total=total, every=every) as writer:
    for last, metrics, info in calls:
      writer.add(last, dict(metrics), info)
    return json.loads(json.dumps(writer.state()))


def test_an_entry_has_the_means_of_its_window(tmp_path):
  calls = steps(1, 12)
  write(tmp_path, calls)
  lines = entries(tmp_path)
  assert [e["step"] for e in lines] == [4, 8, 12]
  window = calls[2:4]
  loss = np.concatenate([m["loss"] for _, m, _ in window])
  np.testing.assert_allclose(lines[1]["loss"], loss.mean(), rtol=1e-6)
  np.testing.assert_allclose(lines[1]["coupling/converged"], 0.5)
  sums, counts = np.concatenate([m["jumps"] for _, m, _ in window]).sum(0)
  names = ["1_64", "1_32", "1_16", "1_8", "1_4", "1_2", "1"]
  assert {k for k in lines[1] if k.startswith("consistency/")} == {
    f"consistency/d_{n}" for n, count in zip(names, counts, strict=True) if count
  }
  for name, total, count in zip(names, sums, counts, strict=True):
    if count:
      np.testing.assert_allclose(lines[1][f"consistency/d_{name}"], total / count, rtol=1e-6)


@pytest.mark.parametrize("stop", [2, 4, 6, 10])
def test_a_run_stopped_anywhere_writes_the_same_entries(tmp_path, stop):
  """Also inside a window, and with entries that came after the checkpoint."""
  whole, parted = tmp_path / "whole", tmp_path / "parted"
  calls = steps(1, 12)
  write(whole, calls)
  state = write(parted, calls[: stop // 2])
  write(parted, calls[stop // 2 :][:1], start=stop, state=state)  # killed before a checkpoint
  write(parted, calls[stop // 2 :], start=stop, state=state)
  assert entries(parted) == entries(whole)


@pytest.fixture
def clock(monkeypatch):
  """The time that logs.py reads, in seconds, which stands still."""
  clock = types.SimpleNamespace(seconds=1_000.0)
  read = lambda: clock.seconds
  monkeypatch.setattr(logs, "time", types.SimpleNamespace(monotonic=read, perf_counter=read))
  return clock


@pytest.fixture
def said(monkeypatch):
  """The lines that were logged."""
  lines = []
  monkeypatch.setattr(logging, "info", lambda form, *values: lines.append(form % values))
  return lines


def test_the_eta_of_training_is_smooth_and_free_of_the_compilation(tmp_path, clock, said):
  """The first call takes 60 s; then a step takes a second, but for a pause of 10 s every 4th."""
  with logs.Writer(tmp_path, start=0, state=None, total=1_000, every=2) as writer:
    for step in range(1, 101):
      clock.seconds += 60 if step == 1 else 11 if step % 4 == 0 else 1
      writer.add(step, {"loss": np.ones(1)}, {})
  assert said[0].endswith("step 2/1000: loss 1.0000, 1.0 steps/s, ETA 0:16:38")
  # 18 steps with 4 pauses, or with 5: 58 s, or 68 s.
  assert said[-1].endswith("0.3 steps/s, ETA 0:56:40") and said[-2].endswith("ETA 0:48:26")


def test_the_eta_of_a_command_follows_its_last_minutes(clock, said):
  progress = logs.Progress(100_000)
  clock.seconds += 500  # compilation
  progress.add(100)
  for images in [30] * 20 + [300] * 9:  # it waits for a slow disk at first
    clock.seconds += 30
    progress.add(images, unreadable=1)
  assert len(said) == 29
  assert said[0] == "130/100000 images, 1 unreadable, 1.0 images/s, ETA 1 day, 3:44:30"
  assert said[-1] == "3400/100000 images, 29 unreadable, 10.0 images/s, ETA 2:41:00"


def events(workdir):
  """The events of all event files of a workdir in their order, without their times."""
  found = []
  for path in sorted(workdir.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = Event.FromString(data[12 : 12 + length])
      event.wall_time = 0
      found.append((event, data[:12], len(data[12 + length : 16 + length])))
      data = data[16 + length :]
  return found


def test_event_files_are_those_of_tensorboardx(tmp_path):
  """Checksums of lengths included; those of events have their times in them."""
  pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  png = io.BytesIO()
  Image.fromarray(pixels).save(png, "PNG")
  with logs.Writer(tmp_path / "a", start=4, state=None, total=12, every=4) as writer:
    writer.write(8, {"loss": 0.5, "coupling/gain": 2.0})
    writer.image(8, "samples/steps_1", png.getvalue())
  with tensorboardX.SummaryWriter(str(tmp_path / "b"), purge_step=5) as theirs:
    theirs.add_scalar("losses/loss", 0.5, 8)
    theirs.add_scalar("coupling/gain", 2.0, 8)
    theirs.add_image("samples/steps_1", pixels, 8, dataformats="HWC")
  (_, *ours), (_, _, *expected) = events(tmp_path / "a"), events(tmp_path / "b")
  assert ours == expected and len(ours) == 4


@contextlib.contextmanager
def full_disk(room=5):
  """No file grows beyond so many bytes: writing ends within a line, as on a disk that is full."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_for_a_while_costs_no_entry_and_one_warning(tmp_path, caplog):
  calls = steps(1, 24)
  write(tmp_path / "whole", calls, total=24)
  with logs.Writer(tmp_path / "full", start=0, state=None, total=24, every=4) as writer:
    for i, (last, metrics, info) in enumerate(calls):
      room = os.path.getsize(tmp_path / "full" / "metrics.jsonl") + 20 if i == 4 else 0
      with full_disk(room) if 4 <= i < 8 else contextlib.nullcontext():
        writer.add(last, dict(metrics), info)
        if 4 <= i < 8:
          writer.state()
  assert entries(tmp_path / "full") == entries(tmp_path / "whole")
  numbers = lambda workdir: [
    event
    for event, *_ in events(workdir)
    if "second" not in str(event) and "wait" not in str(event)
  ]
  assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")
  assert caplog.text.count("Logs cannot be written to") == 1 and "File too large" in caplog.text


def test_a_folder_that_is_gone_stops_no_run(tmp_path):
  calls = steps(1, 12)
  with logs.Writer(tmp_path / "run", start=0, state=None, total=12, every=4) as writer:
    shutil.rmtree(tmp_path / "run")
    for last, metrics, info in calls:
      writer.add(last, dict(metrics), info)
    writer.state()


def test_a_clock_that_is_set_back_stops_no_run(tmp_path, monkeypatch):
  years = iter([2090, *[1971] * 99])
  now = lambda: datetime.datetime(next(years), 1, 1)
  clock = types.SimpleNamespace(datetime=types.SimpleNamespace(now=now))
  monkeypatch.setattr(logs, "datetime", types.SimpleNamespace(**vars(datetime) | vars(clock)))
  calls = steps(1, 12)
  write(tmp_path, calls)
  assert [e["step"] for e in entries(tmp_path)] == [4, 8, 12]


def test_an_eta_of_ages_is_told(clock, said):
  progress = logs.Progress(10**18)
  progress.add(1)
  clock.seconds += 1e6
  progress.add(1)
  assert said[-1].endswith("ETA 100000 days, 0:00:00")


DAMAGE = (
  b'{"step": 8, "loss": 1.0, "cut',
  b'{"step": 8, "loss": "\xc3',
  b"\x00" * 64,
  b'["step"]',
  b'{"loss": 1.0}',
  b'{"step": 8, "loss": [1.0]}',
  b"",
  b"[" * 100_000,
)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_damaged_lines_are_left_out_and_told_once(tmp_path, caplog, place):
  whole = [json.dumps({"step": step, "loss": step / 3}).encode() for step in (4, 8)]
  lines = [*whole[:place], *DAMAGE, *whole[place:]]
  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))  # the last without an end
  write(tmp_path, steps(9, 4), start=8)
  assert [e["step"] for e in entries(tmp_path)] == [4, 8, 12]
  assert entries(tmp_path)[1]["loss"] == 8 / 3
  (told,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
  assert f"{len(DAMAGE)} lines are damaged and left out, such as line {place + 1};" in told


class ObjectStore(memory.MemoryFileSystem):
  """In memory, as gs:// for epath. Like a bucket it cannot append; `away` makes writing fail."""

  store, pseudo_dirs, away = {}, [""], False
  cachable = False

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + os.fspath(path).removeprefix("gs://").strip("/")

  def _open(self, path, mode="rb", **options):
    if "a" in mode or "+" in mode:
      raise NotImplementedError("objects cannot be appended to")
    if self.away and "w" in mode:
      raise ConnectionError("the storage is away")
    return super()._open(path, mode=mode, **options)


@pytest.fixture
def bucket(monkeypatch):
  """An empty object store behind gs://."""
  store = ObjectStore()
  store.store, store.pseudo_dirs = {}, [""]
  backend = type(epath.backend.fsspec_backend)
  local = backend.fs
  fs = lambda self, path: store if os.fspath(path).startswith("gs://") else local(self, path)
  monkeypatch.setattr(backend, "fs", fs)
  return store


def test_a_file_is_written_to_an_object_store_whole(bucket, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  files.write_whole(f"{WORKDIR}/grids/a.md", "text")
  files.write_whole(f"{WORKDIR}/grids/a.md", b"other")
  assert epath.Path(WORKDIR, "grids", "a.md").read_bytes() == b"other"
  assert not list(tmp_path.iterdir())  # no folder that is called gs:


@pytest.mark.parametrize("stop", [2, 4, 10])
def test_logs_in_an_object_store_are_those_on_disk(bucket, tmp_path, stop):
  """Stopped in between, with entries after the checkpoint; an event file for each of the parts."""
  calls = steps(1, 12)
  write(tmp_path, calls)
  state = write(epath.Path(WORKDIR), calls[: stop // 2])
  write(epath.Path(WORKDIR), calls[stop // 2 :][:1], start=stop, state=state)
  write(epath.Path(WORKDIR), calls[stop // 2 :], start=stop, state=state)
  assert entries(epath.Path(WORKDIR)) == entries(tmp_path)
  events = [p for p in epath.Path(WORKDIR).iterdir() if "tfevents" in p.name]
  assert events and all(len(p.read_bytes()) for p in events)


def test_a_checkpoint_finds_what_was_written_before_it_stored(bucket):
  """And a storage that was away for a while costs nothing."""
  calls = steps(1, 12)
  with logs.Writer(WORKDIR, start=0, state=None, total=12, every=4) as writer:
    bucket.away = True
    for last, metrics, info in calls[:4]:
      writer.add(last, dict(metrics), info)
    writer.state()
    assert not epath.Path(WORKDIR, "metrics.jsonl").exists()
    bucket.away = False
    writer.state()
    assert [e["step"] for e in entries(epath.Path(WORKDIR))] == [4, 8]

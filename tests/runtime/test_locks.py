"""One run in a workdir at a time, with the kernel's locks and without, as in an object store."""

import errno
import itertools
import json
import os
import platform

from etils import epath
import fsspec
import pytest

from ism_jax.runtime import locks

OTHER = {"host": "elsewhere", "boot": "b", "process": 7, "since": "2026-01-01 00:00:00 UTC"}
ME = rf"is being trained in by process {os.getpid()} on {platform.node()}, since 20.* UTC: wait for"


@pytest.fixture
def seconds(monkeypatch):
  """Sets the seconds between signs of life, and without one."""
  monkeypatch.setattr(locks, "SETTLE_SECONDS", 0)

  def set_seconds(beat, silence):
    monkeypatch.setattr(locks, "BEAT_SECONDS", beat)
    monkeypatch.setattr(locks, "SILENCE_SECONDS", silence)

  return set_seconds


@pytest.fixture
def impatient(monkeypatch):
  """Who waits for another run fails."""
  monkeypatch.setattr(locks, "_wait_for_silence", None)


@pytest.fixture(params=["bucket", "no locks"])
def unlocked(request, tmp_path, monkeypatch):
  """A workdir in an object store, and one on a file system that knows no locks."""
  if request.param == "bucket":
    store = fsspec.filesystem("memory", skip_instance_cache=True)
    monkeypatch.setattr(type(store), "store", {})
    monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", lambda *_: store)
    return "gs://bucket/run"

  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(locks.fcntl, "flock", flock)
  return str(tmp_path)


def hold(workdir):
  with locks.hold(str(workdir)):
    pass


def test_a_second_run_is_refused_and_learns_who_the_first_is(tmp_path, impatient):
  with locks.hold(f"{tmp_path}/run"):
    with pytest.raises(OSError, match=f"/run {ME}.*or train in another --workdir"):
      hold(tmp_path / "run")
    hold(tmp_path / "other")
  hold(tmp_path / "run")


def test_a_run_that_died_on_this_machine_does_not_block_the_next(tmp_path, impatient):
  """What SIGKILL leaves: what the run said, and no lock."""
  path = tmp_path / "training.lock"
  with locks.hold(str(tmp_path)):
    said = path.read_text()
  assert json.loads(said)["process"] == os.getpid() and not path.read_text()
  path.write_text(said)
  hold(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"\xff{", b"[" * 10**6, b'{"host": 1}', b"{}"])
def test_a_file_that_names_nobody_blocks_nobody(tmp_path, impatient, content):
  (tmp_path / "training.lock").write_bytes(content)
  with locks.hold(str(tmp_path)):
    assert json.loads((tmp_path / "training.lock").read_text())["process"] == os.getpid()


def test_another_machines_silent_run_is_waited_for_and_does_not_block(tmp_path, seconds, caplog):
  seconds(beat=0.1, silence=0.2)
  (tmp_path / "training.lock").write_text(json.dumps(OTHER))
  hold(tmp_path)
  assert "Process 7 on elsewhere was training in" in caplog.text


def test_another_machines_living_run_blocks_and_one_that_ends_does_not(
  tmp_path, seconds, monkeypatch
):
  """As on a file system that passes no locks on."""
  seconds(beat=0.1, silence=600)

  def while_file_says(*values):
    contents = itertools.chain(values, itertools.repeat(values[-1]))
    monkeypatch.setattr(locks, "_content", lambda path: next(contents))
    hold(tmp_path)

  silent, alive = json.dumps(OTHER), json.dumps(OTHER | {"alive": "later"})
  with pytest.raises(OSError, match="by process 7 on elsewhere, since 2026-01-01 00:00:00 UTC"):
    while_file_says(silent, silent, silent, alive)
  while_file_says(silent, silent, silent, "")


def test_without_locks_signs_of_life_refuse_the_second_run(unlocked, seconds, monkeypatch):
  seconds(beat=0.01, silence=60)
  with locks.hold(unlocked), pytest.raises(OSError, match=ME):
    hold(unlocked)
  monkeypatch.setattr(locks, "_wait_for_silence", None)
  hold(unlocked)


def test_without_locks_of_two_that_start_at_once_one_is_refused(unlocked, seconds, monkeypatch):
  seconds(beat=60, silence=60)
  write = locks._write

  def write_and_be_overwritten(path, file, text):
    write(path, file, text)
    write(path, file, json.dumps(OTHER))

  monkeypatch.setattr(locks, "_write", write_and_be_overwritten)
  with pytest.raises(OSError, match="by process 7 on elsewhere"):
    hold(unlocked)
  assert json.loads(locks._content(f"{unlocked}/training.lock")) == OTHER


def test_a_storage_that_is_away_for_a_while_ends_no_run(tmp_path, seconds, monkeypatch, caplog):
  seconds(beat=0.01, silence=60)
  with locks.hold(str(tmp_path)):
    monkeypatch.setattr(locks, "_write", None)
    while "training.lock: " not in caplog.text:
      pass

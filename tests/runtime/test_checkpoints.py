"""Checkpoints against NumPy copies of what was saved; killed, foreign and damaged ones."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ism_jax.runtime import checkpoints

DATA = {"next_index": 7}
CONFIG = {"model": {"depth": 2}, "variant": "ism"}


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  optimizer: Any
  ema: Any


def make_state(seed, width=16):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  weights = lambda: {"block": {"w": draw(width, 32), "b": draw(width)}, "heads": [draw(3), draw(5)]}
  params = weights()
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  _, moments = optimizer.update(weights(), optimizer.init(params), params)
  return State(step=jnp.int32(seed), params=params, optimizer=moments, ema=weights())


def numpy_of(tree):
  return jax.tree.map(np.array, tree)  # np.array copies, np.asarray may not


def abstract(tree, sharding=None):
  sharding = sharding or SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, tree, expected)


def save_steps(workdir, *steps, keep=3, keep_every=0):
  with checkpoints.open_manager(workdir, keep=keep, keep_every=keep_every) as manager:
    for step in steps:
      checkpoints.save(manager, step, make_state(step), {"next_index": step}, CONFIG)


def reader(workdir):
  return checkpoints.open_manager(workdir, keep=1, read_only=True)


def test_state_data_and_config_come_back_as_they_were(tmp_path):
  save_steps(tmp_path, 1, 2)
  with reader(tmp_path) as manager:
    for step, read in ((None, 2), (1, 1)):
      expected = numpy_of(make_state(read))
      state, data_state = checkpoints.restore(manager, abstract(expected), step)
      assert_same(state, expected)
      assert data_state == {"next_index": read}
      assert checkpoints.read_config(manager, step) == CONFIG


def test_values_are_those_at_the_save_although_the_state_is_donated_at_once(tmp_path):
  advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  # Ten MB, so that the write is still under way when the buffers are given back.
  state = make_state(1, width=1 << 14)
  expected = []
  with checkpoints.open_manager(tmp_path, keep=3) as manager:
    for step in (1, 2, 3):
      expected.append(numpy_of(state))
      checkpoints.save(manager, step, state, DATA, CONFIG)
      for _ in range(3):
        state = advance(state)
  with reader(tmp_path) as manager:
    for step, values in zip((1, 2, 3), expected, strict=True):
      assert_same(checkpoints.restore(manager, abstract(values), step)[0], values)


def test_a_restored_state_may_be_donated(tmp_path):
  save_steps(tmp_path, 1)
  advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  expected = numpy_of(make_state(1))
  with reader(tmp_path) as manager:
    state, _ = checkpoints.restore(manager, abstract(expected))
  for _ in range(4):
    state = advance(state)
    expected = jax.tree.map(lambda x: x + np.ones((), x.dtype), expected)
  assert_same(state, expected)


def test_a_sharded_state_restores_to_one_device_and_back(tmp_path):
  devices = jax.device_count()
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

  def place(x):
    splits = x.ndim and x.shape[0] % devices == 0
    return NamedSharding(mesh, PartitionSpec("data") if splits else PartitionSpec())

  values = numpy_of(make_state(1, width=8 * devices))
  sharded = jax.tree.map(lambda x: jax.device_put(x, place(x)), values)
  with checkpoints.open_manager(tmp_path, keep=2) as manager:
    checkpoints.save(manager, 1, sharded, DATA, CONFIG)
    manager.wait_until_finished()
    single, _ = checkpoints.restore(manager, abstract(values))
    checkpoints.save(manager, 2, single, DATA, CONFIG)
    manager.wait_until_finished()
    again, _ = checkpoints.restore(manager, sharded)  # arrays say where to, as well as shapes do
  assert_same(single, values)
  assert_same(again, values)
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(single))
  assert all(x.sharding == place(x) for x in jax.tree.leaves(again))


def make_noise(width=64):
  """A state whose bits do not compress, so that they lie on disk as they are in memory."""
  draw = lambda seed: jax.random.bits(jax.random.key(seed), (width, 32), jnp.uint32)
  return State(step=jnp.int32(1), params={"w": draw(0)}, optimizer=(), ema={"w": draw(1)})


def save_with_broken_params(workdir, state):
  """Saves step 1, and breaks the compressed frame that holds params["w"] on disk."""
  with checkpoints.open_manager(workdir, keep=1) as manager:
    checkpoints.save(manager, 1, state, DATA, CONFIG)
  start, files = np.array(state.params["w"]).tobytes()[:64], 0
  for path in (workdir / "checkpoints" / "1" / "state").rglob("*"):
    content = path.read_bytes() if path.is_file() else b""
    if start in content:
      frame = content.rindex(b"\x28\xb5\x2f\xfd", 0, content.index(start))  # zstd's magic number
      path.write_bytes(content[:frame] + bytes(4) + content[frame + 4 :])
      files += 1
  assert files == 1
  with reader(workdir) as manager, pytest.raises(Exception, match=r"Error reading .params\.w"):
    checkpoints.restore_tree(manager, "params", abstract(state.params))


def test_one_tree_restores_although_the_others_are_unreadable(tmp_path):
  state = make_noise()
  save_with_broken_params(tmp_path, state)
  with reader(tmp_path) as manager:
    ema = checkpoints.restore_tree(manager, "ema", abstract(state.ema))
  assert_same(ema, numpy_of(state.ema))


def replace_on_disk(folder, old, new):
  """Replaces bytes of the one file under `folder` that has them."""
  (path,) = (p for p in folder.rglob("*") if p.is_file() and old in p.read_bytes())
  path.write_bytes(path.read_bytes().replace(old, new, 1))


def checksum(array):
  """What the checksums are by their definition, with NumPy, on the flattened array."""
  array = np.array(array).ravel()
  bits = array.view(f"u{array.itemsize}").astype(np.uint32)
  h = bits + np.arange(bits.size, dtype=np.uint32) * np.uint32(0x9E3779B9)
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  return int((h ^ (h >> 16)).sum(dtype=np.uint64) % 2**32)


def test_checksums_are_those_of_numpy_wherever_the_arrays_are(tmp_path):
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  shapes = {"": (), "v": (24,), "m": (8, 6), "t": (8, 2, 5)}
  specs = {"v": ("a",), "m": ("b", None), "t": ("a", "b")}
  state = {
    f"{name}_{dtype}": jax.device_put(
      jax.random.bits(jax.random.key(1), shape, jnp.uint32).astype(dtype),
      NamedSharding(mesh, PartitionSpec(*specs.get(name, ()))),
    )
    for name, shape in shapes.items()
    for dtype in ("float32", "bfloat16", "int32", "uint32")
  }
  with checkpoints.open_manager(tmp_path, keep=1) as manager:
    checkpoints.save(manager, 1, state, DATA, CONFIG)
  saved = json.loads((tmp_path / "checkpoints/1/checksums/metadata").read_text())["state"]
  assert saved == {name: checksum(x) for name, x in state.items()}
  with reader(tmp_path) as manager:
    assert_same(checkpoints.restore(manager, abstract(state))[0], numpy_of(state))


def test_a_changed_bit_or_two_swapped_values_on_disk_are_noticed(tmp_path):
  state = make_noise()
  w = np.array(state.params["w"])
  w[5, 1] = w[5, 0] ^ np.uint32(1 << 31)  # these two differ only by their sign
  state = state.replace(params={"w": jnp.asarray(w)})
  swapped, flipped = w.copy(), w.copy()
  swapped[5, :2] = w[5, 1::-1]
  flipped[7, 3] ^= 1 << 20
  for name, wrong in (("swapped", swapped), ("flipped", flipped)):
    with checkpoints.open_manager(tmp_path / name, keep=1) as manager:
      checkpoints.save(manager, 1, state, DATA, CONFIG)
    row = int(np.argwhere((wrong != w).any(1)).item())
    replace_on_disk(tmp_path / name / "checkpoints" / "1", w[row].tobytes(), wrong[row].tobytes())
    with reader(tmp_path / name) as manager:
      read = manager.restore(1, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
      np.testing.assert_array_equal(read["params"]["w"], wrong)  # Orbax says nothing
      damaged = pytest.raises(checkpoints.DamagedError, match=r"checkpoints/1 .* params/w differ")
      with damaged:
        checkpoints.restore(manager, abstract(state))
      with damaged:
        checkpoints.restore_tree(manager, "params", abstract(state.params))
      assert_same(checkpoints.restore_tree(manager, "ema", abstract(state.ema)), state.ema)


def edit_checksums(at, edit):
  """Edits what a checkpoint says of its content."""
  path = at / "checksums" / "metadata"
  path.write_text(json.dumps(edit(json.loads(path.read_text()))))


DAMAGES = {
  "flipped array": lambda at, w: replace_on_disk(at, w.tobytes()[:8], bytes(8)),
  "other position": lambda at, w: replace_on_disk(at / "data", b": 7", b": 6"),
  "other config": lambda at, w: replace_on_disk(at / "config", b'"ism"', b'"isn"'),
  "other checksums": lambda at, w: replace_on_disk(at / "checksums", b'"state"', b'"stale"'),
  "no checksums": lambda at, w: shutil.rmtree(at / "checksums"),
  "checksums in a list": lambda at, w: edit_checksums(at, lambda sums: [sums]),
  "of another step": lambda at, w: edit_checksums(at, lambda sums: sums | {"step": 7}),
  "empty config": lambda at, w: (at / "config" / "metadata").write_bytes(b""),
  "no position": lambda at, w: (at / "data" / "metadata").unlink(),
  "no metadata": lambda at, w: (at / "state" / "_METADATA").unlink(),
  "other metadata": lambda at, w: replace_on_disk(at, b'"params"', b'"porams"'),
  "empty manifest": lambda at, w: (at / "state" / "manifest.ocdbt").write_bytes(b""),
  "no arrays": lambda at, w: shutil.rmtree(at / "state" / "ocdbt.process_0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_passed_over_for_the_checkpoint_before(tmp_path, caplog, damage):
  state = make_noise()
  with checkpoints.open_manager(tmp_path, keep=3) as manager:
    for step in (3, 6):
      checkpoints.save(manager, step, state.replace(step=jnp.int32(step)), DATA, CONFIG)
  folder = tmp_path / "checkpoints"
  DAMAGES[damage](folder / "6", np.array(state.params["w"]))

  def read(step):
    return checkpoints.read_config(manager, step), checkpoints.restore(
      manager, abstract(state), step
    )

  expected = numpy_of(state.replace(step=jnp.int32(3)))
  with reader(tmp_path) as manager:
    step, (config, (restored, position)) = checkpoints.restore_newest(manager, read)
  assert (step, config, position) == (3, CONFIG, DATA)
  assert_same(restored, expected)
  (message,) = (r.getMessage() for r in caplog.records if "damaged" in r.getMessage())
  assert f"{folder}/6 is damaged: " in message
  assert sorted(p.name for p in folder.iterdir()) == ["3", "6"]


def test_a_writer_moves_damaged_steps_away_and_saves_them_again(tmp_path):
  save_steps(tmp_path, 1, 2, 3)
  like = abstract(make_state(1))
  for times in (1, 2):
    for step in ("2", "3"):
      (tmp_path / "checkpoints" / step / "data" / "metadata").write_text("{}")
    with checkpoints.open_manager(tmp_path, keep=3) as manager:
      step, (state, _) = checkpoints.restore_newest(
        manager, lambda step: checkpoints.restore(manager, like, step), move_damaged=True
      )
      assert step == 1 and manager.all_steps() == [1]
      assert_same(state, numpy_of(make_state(1)))
      for step in (2, 3):
        assert checkpoints.save(manager, step, make_state(step), DATA, CONFIG)
    moved = list((tmp_path / "checkpoints_damaged").iterdir())
    assert len(moved) == 2 * times and all((p / "state" / "_METADATA").exists() for p in moved)
    with checkpoints.open_manager(tmp_path, keep=3) as manager:
      assert manager.all_steps() == [1, 2, 3]
      assert_same(checkpoints.restore(manager, like)[0], numpy_of(make_state(3)))


def test_swapped_folders_are_damaged_and_those_that_do_not_say_their_step_are_read(tmp_path):
  save_steps(tmp_path, 5, 6, 7)
  folder, like = tmp_path / "checkpoints", abstract(make_state(1))
  for old, new in (("6", "x"), ("7", "6"), ("x", "7")):
    (folder / old).rename(folder / new)
  with reader(tmp_path) as manager:
    for read in (
      lambda: checkpoints.restore(manager, like, 7),
      lambda: checkpoints.restore_tree(manager, "ema", like.ema, 7),
      lambda: checkpoints.read_config(manager, 7),
    ):
      with pytest.raises(checkpoints.DamagedError, match=r"/7 is damaged: it holds step 6; .* 6$"):
        read()
  with checkpoints.open_manager(tmp_path, keep=3) as manager:
    step, (state, _) = checkpoints.restore_newest(
      manager, lambda step: checkpoints.restore(manager, like, step), move_damaged=True
    )
  assert step == 5
  assert_same(state, numpy_of(make_state(5)))
  assert sorted(p.name for p in tmp_path.rglob("checkpoints*/?")) == ["5", "6", "7"]
  # As older versions saved: no step beside the checksums.
  edit_checksums(folder / "5", lambda sums: {k: v for k, v in sums.items() if k != "step"})
  (folder / "5").rename(folder / "8")
  with reader(tmp_path) as manager:
    assert_same(checkpoints.restore(manager, like)[0], numpy_of(make_state(5)))


def test_where_all_are_damaged_all_are_named_and_left_where_they_are(tmp_path):
  save_steps(tmp_path, 1, 2)
  for step in ("1", "2"):
    (tmp_path / "checkpoints" / step / "data" / "metadata").write_text("{}")
  like = abstract(make_state(1))
  expected = pytest.raises(ValueError, match=r"(?s)--workdir.*/2 is damaged: .*/1 is damaged: ")
  with checkpoints.open_manager(tmp_path, keep=3) as manager, expected:
    checkpoints.restore_newest(
      manager, lambda step: checkpoints.restore(manager, like, step), move_damaged=True
    )
  assert sorted(p.name for p in tmp_path.rglob("checkpoints*/?")) == ["1", "2"]
  nothing = pytest.raises(FileNotFoundError, match="ism_jax train")
  with reader(tmp_path / "none") as manager, nothing:
    checkpoints.restore_newest(manager, lambda step: None)


def test_another_models_checkpoint_is_an_error_and_not_passed_over(tmp_path):
  save_steps(tmp_path, 1)
  with checkpoints.open_manager(tmp_path, keep=2) as manager:
    checkpoints.save(manager, 2, make_state(2, width=24), DATA, CONFIG)
    manager.wait_until_finished()
    with pytest.raises(ValueError, match="checkpoints/2 is a checkpoint of another model"):
      checkpoints.restore_newest(
        manager, lambda step: checkpoints.restore(manager, abstract(make_state(1)), step)
      )


def test_another_models_checkpoint_is_refused_before_any_array_is_read(tmp_path):
  state = make_noise()
  save_with_broken_params(tmp_path, state)
  expected = pytest.raises(ValueError, match=r"params/w: \(64, 32\) uint32 saved, \(48, 32\)")
  with reader(tmp_path) as manager, expected:
    checkpoints.restore(manager, abstract(make_noise(48)))


def test_another_models_checkpoint_names_what_differs_and_what_to_do(tmp_path):
  save_steps(tmp_path, 1)
  same, other = abstract(make_state(1)), abstract(make_state(1, width=24))
  with reader(tmp_path) as manager:
    with pytest.raises(ValueError) as error:
      checkpoints.restore(manager, same.replace(ema=other.ema))
    text = str(error.value)
    assert "ema/block/b: (16,) float32 saved, (24,) float32 wanted" in text
    assert "ema/block/w: (16, 32) float32 saved, (24, 32) float32 wanted" in text
    assert "params" not in text and "heads" not in text, "names what agrees"
    assert f"{tmp_path}/checkpoints/1" in text and "--config" in text and "--workdir" in text
    with pytest.raises(ValueError, match=r"ema/block/b: \(16,\) .* saved, \(24,\) .* wanted"):
      checkpoints.restore_tree(manager, "ema", other.ema)
    with pytest.raises(ValueError, match=r"step: \(\) int32 saved, \(\) uint32 wanted"):
      checkpoints.restore(
        manager,
        same.replace(step=jax.ShapeDtypeStruct((), jnp.uint32, sharding=same.step.sharding)),
      )
    changed = same.replace(params={**same.params, "heads": [], "new": same.step})
    with pytest.raises(
      ValueError, match=r"(?s)heads/0: \(3,\) .* saved, absent .*new: absent saved"
    ):
      checkpoints.restore(manager, changed)
    with pytest.raises(ValueError, match="and 9 more"):
      checkpoints.restore(manager, same.replace(params={}, optimizer=(), ema={}))
    with pytest.raises(ValueError, match="no 'target'; it has: ema, optimizer, params, step"):
      checkpoints.restore_tree(manager, "target", same.ema)


def test_the_last_checkpoints_are_kept(tmp_path):
  save_steps(tmp_path, 1, 2, 3, 4, 5, keep=2)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
  with reader(tmp_path) as manager:
    assert sorted(manager.all_steps()) == [4, 5]
    with pytest.raises(FileNotFoundError, match=r"step 3 .* \[4, 5\]"):
      checkpoints.read_config(manager, 3)


def test_multiples_of_keep_every_are_kept_as_well(tmp_path):
  save_steps(tmp_path, *range(1, 12), keep=2, keep_every=4)
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10, 11]
  with pytest.raises(ValueError, match="keep_every=-1"):
    checkpoints.open_manager(tmp_path, keep=1, keep_every=-1)


def test_a_step_is_saved_once_and_none_before_the_latest(tmp_path):
  with checkpoints.open_manager(tmp_path, keep=3) as manager:
    assert checkpoints.save(manager, 5, make_state(5), DATA, CONFIG)
    assert not checkpoints.save(manager, 5, make_state(6), DATA, CONFIG)
    with pytest.raises(ValueError, match=r"step 4 cannot follow .* step 5"):
      checkpoints.save(manager, 4, make_state(4), DATA, CONFIG)
  with reader(tmp_path) as manager:
    with pytest.raises(ValueError, match="read_only"):
      checkpoints.save(manager, 6, make_state(6), DATA, CONFIG)
    expected = numpy_of(make_state(5))
    assert_same(checkpoints.restore(manager, abstract(expected))[0], expected)


def test_a_killed_save_leaves_no_checkpoint_that_counts(tmp_path):
  code = """
import os, signal, sys
import numpy as np
from ism_jax.runtime import checkpoints
class Deadly(dict):
  def items(self):
    if len(os.listdir(sys.argv[1] + "/checkpoints")) > 1:  # it is being written
      os.kill(os.getpid(), signal.SIGKILL)
    return super().items()
manager = checkpoints.open_manager(sys.argv[1], keep=3)
checkpoints.save(manager, 1, {"w": np.ones(4)}, {}, {})
manager.wait_until_finished()
checkpoints.save(manager, 2, {"w": np.zeros(4)}, {}, Deadly(a=1))
manager.wait_until_finished()
"""
  run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
  assert run.returncode == -signal.SIGKILL
  leftover = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name != "1"]
  assert leftover, "the second save had not begun"
  like = {"w": jax.ShapeDtypeStruct((4,), np.float64)}
  with reader(tmp_path) as manager:
    assert manager.all_steps() == [1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == sorted([*leftover, "1"])
  # The next writer may save the same step or a later one, and cleans up.
  shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy" / "checkpoints")
  for workdir, step in ((tmp_path, 2), (tmp_path / "copy", 3)):
    with checkpoints.open_manager(workdir, keep=3) as manager:
      assert checkpoints.save(manager, step, {"w": np.full(4, 2.0)}, DATA, CONFIG)
      manager.wait_until_finished()
      np.testing.assert_array_equal(checkpoints.restore(manager, like)[0]["w"], np.full(4, 2.0))
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["1", str(step)]


def test_a_failed_write_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
  """For want of room: no file may have more than a fifth of what the arrays take."""
  code = """
import logging, resource, sys, types
from absl import app
import numpy as np
from ism_jax.runtime import checkpoints, commands
def main(arguments):
  commands.quiet_libraries()
  # As TensorStore and asyncio do for arrays that have not been written yet.
  error = RuntimeError("Event loop is closed")
  sys.unraisablehook(types.SimpleNamespace(exc_value=error))
  logging.getLogger("asyncio").error("of .../orbax/... never retrieved", exc_info=error)
  state = {f"w{i}": np.random.default_rng(i).random((100, 100)) for i in range(30)}
  with commands.one_line_errors():
    manager = checkpoints.open_manager(arguments[1], keep=3)
    with checkpoints.finishing(manager):
      checkpoints.save(manager, 1, state, {}, {})
      resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
      checkpoints.save(manager, 2, state, {}, {})
      while checkpoints.is_writing(manager):
        pass
      raise AssertionError("nobody noticed")
app.run(main)
"""
  command = [sys.executable, "-c", code, str(tmp_path)]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}  # libtpu, where it is installed, says a lot
  run = subprocess.run(command, env=env, timeout=120, check=False, capture_output=True, text=True)
  assert run.returncode == 1
  assert run.stderr == (
    f"Error: a checkpoint could not be written to {tmp_path}/checkpoints: File too large. "
    "That of step 1 is whole: the same command continues from it.\n"
  )
  like = {f"w{i}": jax.ShapeDtypeStruct((100, 100), np.float64) for i in range(30)}
  with checkpoints.open_manager(tmp_path, keep=3) as manager:
    assert manager.all_steps() == [1]
    state, _ = checkpoints.restore(manager, like)
    assert checkpoints.save(manager, 2, state, DATA, CONFIG)
  with reader(tmp_path) as manager:
    np.testing.assert_array_equal(
      checkpoints.restore(manager, like)[0]["w3"], np.random.default_rng(3).random((100, 100))
    )


def test_a_full_disk_is_reported_with_the_room_that_is_missing(tmp_path, monkeypatch):
  """1 MB is free, and the remains of the failed write, 0.3 MB, will be."""

  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  state, expected = {"w": np.zeros(600_000, np.float32)}, pytest.raises(OSError)
  with checkpoints.open_manager(tmp_path, keep=3) as manager:
    remains = tmp_path / "checkpoints" / "9.unfinished" / "state"
    remains.mkdir(parents=True)
    (remains / "file").write_bytes(bytes(300_000))
    with expected as first:
      checkpoints.save(manager, 9, state, DATA, CONFIG)
    (tmp_path / "checkpoints" / "8").mkdir()
    (tmp_path / "checkpoints" / "8" / "file").write_bytes(bytes(5_000_000))
    with expected as later:
      checkpoints.save(manager, 9, state, DATA, CONFIG)
  start = f"a checkpoint could not be written to {tmp_path}/checkpoints: No space left on device "
  assert str(first.value) == start + (
    "(it takes 2.4 MB, for which 1.1 MB are missing). "
    "None was written before: the same command begins anew."
  )
  assert str(later.value) == start + (
    "(it takes 5.0 MB, for which 3.7 MB are missing). "
    "That of step 8 is whole: the same command continues from it."
  )


def test_an_empty_workdir_names_the_folder_and_the_command_that_fills_it(tmp_path):
  for manager in (reader(tmp_path), checkpoints.open_manager(tmp_path, keep=1)):
    for read in (
      lambda: checkpoints.restore(manager, abstract(make_state(1))),
      lambda: checkpoints.restore_tree(manager, "ema", {}),
      lambda: checkpoints.read_config(manager),
    ):
      with pytest.raises(FileNotFoundError, match=f"{tmp_path}/checkpoints.*ism_jax train"):
        read()
    manager.close()


def test_reading_writes_nothing(tmp_path):
  reader(tmp_path / "run").close()
  assert not list(tmp_path.iterdir())


def test_an_unwritable_workdir_is_refused_before_anything_is_written(tmp_path):
  (tmp_path / "file").write_text("not a folder")
  with pytest.raises(OSError, match=r"/file/run cannot be written \(Not a directory\); name"):
    checkpoints.open_manager(tmp_path / "file" / "run", keep=1)
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", r"a\b", os.fsdecode(b"a\xff")])
def test_a_path_that_cannot_hold_checkpoints_is_refused_before_anything_is_written(
  tmp_path, monkeypatch, name
):
  expected = pytest.raises(ValueError, match=r"cannot hold checkpoints.*; name or rename it")
  with expected as error:
    checkpoints.open_manager(tmp_path / name / "run", keep=1)
  str(error.value).encode()  # can be printed
  (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / name)
  with expected:
    checkpoints.open_manager("run", keep=1)
  assert not os.listdir()


@pytest.mark.parametrize(
  "name", ["a]", "a,b", " a b ", "a%41", "{a}", "$a", "a\nb", "a'b\"", "ü", "a~", "#&;|<>!"]
)
def test_other_odd_paths_hold_checkpoints(tmp_path, name):
  save_steps(tmp_path / name, 1)
  with reader(tmp_path / name) as manager:
    assert_same(checkpoints.restore(manager, abstract(make_state(1)))[0], numpy_of(make_state(1)))


def test_checkpoints_that_were_moved_to_an_odd_path_are_read_or_refused(tmp_path):
  for name in ("a[1]", "a*", "a?", r"a\b"):
    save_steps(tmp_path / "run", 1)
    (tmp_path / "run").rename(tmp_path / name)
    if "\\" in name:
      with pytest.raises(ValueError, match="name or rename it"):
        reader(tmp_path / name)
    else:
      with reader(tmp_path / name) as manager:
        state, _ = checkpoints.restore(manager, abstract(make_state(1)))
      assert_same(state, numpy_of(make_state(1)))


def test_the_first_checkpoint_of_a_run_is_read_back(tmp_path, monkeypatch):
  """Here the library itself loses the arrays, without a word."""
  monkeypatch.setattr(checkpoints, "check_workdir", lambda workdir, **_: os.fspath(workdir))
  expected = pytest.raises(
    checkpoints.DamagedError, match=r"first .*a\[1\]/checkpoints/1 .*--workdir"
  )
  with checkpoints.open_manager(tmp_path / "a[1]", keep=2) as manager, expected:
    checkpoints.save(manager, 1, make_state(1), DATA, CONFIG)


def test_the_position_of_a_data_iterator_fits_into_a_checkpoint(tmp_path):
  import grain

  make = lambda: iter(grain.MapDataset.range(100).to_iter_dataset().batch(3))
  iterator = make()
  for _ in range(4):
    next(iterator)
  with checkpoints.open_manager(tmp_path, keep=1) as manager:
    checkpoints.save(manager, 1, make_state(1), iterator.get_state(), CONFIG)
    manager.wait_until_finished()
    _, data_state = checkpoints.restore(manager, abstract(make_state(1)))
  resumed = make()
  resumed.set_state(data_state)
  np.testing.assert_array_equal(next(resumed), [12, 13, 14])
  assert os.path.isdir(tmp_path / "checkpoints" / "1") and json.dumps(data_state)

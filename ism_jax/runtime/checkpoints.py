"""Checkpoints: the train state, the position in the data and the config, one Orbax step for all.

A step counts once it is complete: a save that was killed leaves a temporary folder that no reader
sees and the next writer removes. Arrays are restored to the placement the caller asks for, on any
number of devices. Every array and both JSON items have checksums: TensorStore returns flipped bytes
without a word. The checksums name the step, so that a folder which was renamed is noticed.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import zlib

from absl import logging
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ism_jax.runtime import files

_MAX_NAMED = 8  # differences spelt out in one error


class DamagedError(ValueError):
  """A checkpoint that cannot be read, or whose content is not what was saved."""


def open_manager(workdir, *, keep, keep_every=0, read_only=False):
  """Opens `<workdir>/checkpoints`; close(), or leaving `with`, waits for what is being written.

  Args:
    workdir: folder of the run. A path with a scheme, such as gs://, is taken as it is.
    keep: number of latest steps that stay on disk.
    keep_every: steps that are a multiple of it stay as well; 0 for none.
    read_only: writes nothing, not even a folder; for a run that someone else may be training.
  Returns:
    An orbax CheckpointManager. For preemption: reached_preemption(step).
  Raises:
    OSError: the workdir cannot be written.
    ValueError: checkpoints under this path would be written or read elsewhere.
  """
  if keep < 1:
    raise ValueError(f"keep={keep} must be at least 1: training resumes from the latest.")
  if keep_every < 0:
    raise ValueError(f"keep_every={keep_every} must be a number of steps, or 0 for none.")
  workdir = check_workdir(workdir, read_only=read_only)
  state, plain = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
  handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
  handlers.add("state", ocp.args.StandardSave, state)
  handlers.add("state", ocp.args.StandardRestore, state)
  handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
  for item in ("data", "config", "checksums"):
    handlers.add(item, ocp.args.JsonSave, plain)
    handlers.add(item, ocp.args.JsonRestore, plain)
  retention = {} if read_only else {"max_to_keep": keep, "keep_period": keep_every or None}
  options = ocp.CheckpointManagerOptions(
    read_only=read_only, cleanup_tmp_directories=not read_only, **retention
  )
  return ocp.CheckpointManager(f"{workdir}/checkpoints", options=options, handler_registry=handlers)


def check_workdir(workdir, *, read_only=False) -> str:
  """The absolute path of a workdir that can hold checkpoints; raises as `open_manager` does."""
  workdir = os.fspath(workdir)
  if "://" not in workdir:
    workdir = os.path.abspath(files.local_path(workdir))
  # TensorStore takes a backslash for a slash, and paths of UTF-8 alone. Where Orbax saves, it takes
  # the path for a pattern: a[1] matches nothing, a* the arrays of another run as well.
  odd = [character for character in ("\\" if read_only else "\\*?[") if character in workdir]
  try:
    workdir.encode()
  except UnicodeEncodeError:
    odd.append("bytes that are no UTF-8")
  if odd:
    raise ValueError(
      f"the workdir {workdir!r} cannot hold checkpoints, for its path has {' and '.join(odd)}; "
      "name or rename it without."
    )
  if not read_only:
    files.check_writable(workdir)
  return workdir


def save(manager, step, state, data_state, config):
  """Starts writing a checkpoint, and returns once the state may be overwritten.

  Blocks for the copy to host memory, and for the previous save if that has not finished. An error
  of the background write is raised by `is_writing`, the next save or `finishing`. The first
  checkpoint of a run is waited for and read back, all but the arrays: a run must not go on where
  none could be read.

  Args:
    state: a pytree of arrays (a flax.struct dataclass, optax states).
    data_state: get_state() of the data iterator.
    config: a dict of JSON.
  Returns:
    False where this step is already there, as when the last step of a run is also a regular one.
  Raises:
    OSError: it cannot be written, or the one before could not.
  """
  latest = manager.latest_step()
  if latest == step:
    return False
  if latest is not None and step < latest:
    raise ValueError(
      f"step {step} cannot follow the checkpoint of step {latest} in {manager.directory}; "
      "remove the later ones, or train in another --workdir."
    )
  plain = {"data": data_state, "config": config}
  checksums = {item: _json_checksum(value) for item, value in plain.items()}
  plain["checksums"] = {"step": step, "state": _state_checksums(state)} | checksums
  items = {item: ocp.args.JsonSave(value) for item, value in plain.items()}
  # The state may be donated as soon as this returns. On accelerators its values are in host memory
  # by then. On CPU, Orbax goes on reading the arrays' own buffers in the background; XLA does not
  # reuse a buffer that NumPy still refers to, and allocates another for the donated step.
  args = ocp.args.Composite(state=ocp.args.StandardSave(state), **items)
  with _writing(manager, sum(x.nbytes for x in _leaves(state).values())):
    saved = manager.save(step, args=args)
    if latest is None:
      manager.wait_until_finished()
  if not saved:
    raise ValueError(f"step {step} was not saved: {manager.directory} was opened read_only.")
  if latest is None:
    _read_back(manager, step)
  return True


def is_writing(manager) -> bool:
  """Whether the last save is still under way; raises OSError if it has failed."""
  if manager.is_saving_in_progress():
    return True
  with _writing(manager):
    manager.wait_until_finished()  # does not wait any more, but raises
  return False


@contextlib.contextmanager
def finishing(manager):
  """Leaving waits for what is being written, and closes; raises OSError where writing failed."""
  try:
    yield
  finally:
    with _writing(manager):
      manager.close()


@contextlib.contextmanager
def _writing(manager, needed=None):
  """Errors of writing as an OSError of one line; `needed` are the bytes of the state, or None."""
  try:
    yield
  except (OSError, ValueError) as e:  # ValueErrors are TensorStore's
    reason = re.search(r"[^:]+(?= \[os_error_code=)", str(e))
    reason = reason[0].strip() if reason else getattr(e, "strerror", None) or str(e)
    with contextlib.suppress(Exception):  # the storage may be away altogether
      manager.reload()
      if reason == os.strerror(errno.ENOSPC):
        reason += _missing_room(manager, needed)
    step = manager.latest_step()
    safe = "None was written before: the same command begins anew"
    if step is not None:
      safe = f"That of step {step} is whole: the same command continues from it"
    raise OSError(
      f"a checkpoint could not be written to {manager.directory}: {reason}. {safe}."
    ) from e


def _missing_room(manager, needed):
  folder = pathlib.Path(manager.directory)
  sizes = {path.name: _size(path) for path in folder.iterdir()}
  # As it was written, compressed, the last time.
  needed = sizes.get(str(manager.latest_step()), needed)
  if needed is None:
    return ""
  # The remains of what was not finished go when the run begins again.
  remains = sum(size for name, size in sizes.items() if not name.isdigit())
  missing = max(0, needed - remains - shutil.disk_usage(folder).free)
  return f" (it takes {needed / 1e6:,.1f} MB, for which {missing / 1e6:,.1f} MB are missing)"


def _size(folder):
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_back(manager, step):
  try:
    _, checksums = _contents(manager, step)
    for item in ("data", "config"):
      _read_json(manager, step, item, checksums)
  except DamagedError as e:
    raise DamagedError(
      f"the first checkpoint of this run cannot be read back ({e}), nor could later ones: train in "
      "another --workdir."
    ) from e


def restore_newest(manager, read, *, move_damaged=False):
  """Reads the newest checkpoint that is whole; logs what is wrong with those passed over.

  Args:
    read: read(step) returns what is wanted of a step, by the functions below. It is called for one
      step after the other, from the newest on, until it raises no DamagedError.
    move_damaged: for a writer, once a whole one has been read: moves those passed over to
      `<workdir>/checkpoints_damaged/<step>`, where Orbax does not look, so that they are not taken
      for the latest and their steps can be saved again. All processes must ask for it alike.
  Returns:
    (step, what read(step) returned)
  Raises:
    FileNotFoundError: no checkpoint.
    DamagedError: none is whole; all are named, and none is moved.
    Whatever else `read` raises: another model's checkpoint is not passed over.
  """
  _existing_step(manager, None)
  damaged = {}
  for step in sorted(manager.all_steps(), reverse=True):
    try:
      result = read(step)
    except DamagedError as e:
      logging.error("%s", e)
      damaged[step] = str(e)
    else:
      if damaged:
        logging.warning("Using step %d of %s instead.", step, manager.directory)
        if move_damaged:
          _set_aside(manager, damaged)
      return step, result
  raise DamagedError(
    f"no checkpoint in {manager.directory} is whole. Put back a copy of one, or train in another "
    "--workdir.\n" + "\n".join(f"  {reason}" for reason in damaged.values())
  )


def restore(manager, like, step=None):
  """Reads the train state, and where in the data it was.

  Args:
    like: the pytree of the state, with jax.ShapeDtypeStruct leaves that carry shardings or with
      arrays.
    step: None for the latest.
  Returns:
    (state, data_state): arrays placed as `like` says, which may be donated; what set_state() takes.
  Raises:
    FileNotFoundError: no such checkpoint.
    DamagedError: it cannot be read, or a checksum is not that of the save.
    ValueError: the checkpoint is one of another model; raised before any array is read.
  """
  step = _existing_step(manager, step)
  saved, checksums = _contents(manager, step)
  state = _read_arrays(manager, step, saved, like, checksums)
  return state, _read_json(manager, step, "data", checksums)


def restore_tree(manager, name, like, step=None):
  """Reads and checks one field of the state, such as one EMA, that is `like`; else as `restore`.

  Of a field that is a dict, "FIELD/KEY" is one of its values.
  """
  step = _existing_step(manager, step)
  tree, checksums = _contents(manager, step)
  *fields, key = name.split("/")
  for field in fields:
    tree = tree.get(field, {})
  if key not in tree:
    raise ValueError(
      f"the state in {manager.directory}/{step} has no {name!r}; "
      f"it has: {', '.join(sorted('/'.join((*fields, k)) for k in tree))}. Name one of them."
    )
  within = lambda value: traverse_util.unflatten_dict({name: value}, sep="/")
  read = _read_arrays(manager, step, within(tree[key]), within(like), checksums)
  for part in (*fields, key):
    read = read[part]
  return read


def read_position(manager, step=None):
  """Where in the data the run was, `data_state` of `save`; raises as `restore` does."""
  step = _existing_step(manager, step)
  return _read_json(manager, step, "data", _read_checksums(manager, step))


def tree_checksum(manager, name, step) -> str:
  """A checksum of what `restore_tree` reads, as it was saved: 8 digits in hex."""
  sums = _read_checksums(manager, step)["state"]
  return f"{_json_checksum({k: v for k, v in sums.items() if k.startswith(f'{name}/')}):08x}"


def read_config(manager, step=None):
  """The config dict the checkpoint was saved with; raises as `restore` does."""
  step = _existing_step(manager, step)
  return _read_json(manager, step, "config", _read_checksums(manager, step))


def _existing_step(manager, step):
  steps = sorted(manager.all_steps())
  if not steps:
    raise FileNotFoundError(
      f"no checkpoint in {manager.directory}; `python -m ism_jax train` makes one there."
    )
  if step is None:
    return steps[-1]
  if step not in steps:
    raise FileNotFoundError(
      f"no checkpoint of step {step} in {manager.directory}; there are: {steps}. Name one of them."
    )
  return step


@contextlib.contextmanager
def _reading(manager, step):
  # For damaged files Orbax and TensorStore raise nearly everything, bare Exceptions among it, with
  # TensorStore's reason as their cause.
  try:
    yield
  except Exception as e:
    cause = e.__cause__ or e
    if isinstance(cause, (jax.errors.JaxRuntimeError, MemoryError, PermissionError)):
      raise  # says nothing of the files' content
    reason = cause if isinstance(cause, (ValueError, OSError)) else repr(cause)
    raise DamagedError(f"{manager.directory}/{step} is damaged: {reason}") from e


def _read_json(manager, step, item, checksums=None):
  with _reading(manager, step):
    args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
    value = manager.restore(step, args=args)[item]
    if value is None:
      raise FileNotFoundError(f"its {item} is missing")
    if checksums is not None:
      _check_sums({item: _json_checksum(value)}, checksums)
  return value


def _read_checksums(manager, step):
  checksums = _read_json(manager, step, "checksums")
  with _reading(manager, step):
    # Checkpoints of older versions do not say their step.
    if (saved := checksums.get("step", step)) != step:
      raise ValueError(f"it holds step {saved}; a folder that was renamed has to be named {saved}")
  return checksums


def _contents(manager, step):
  """(the shapes and dtypes of the saved state, the checksums)."""
  checksums = _read_checksums(manager, step)
  with _reading(manager, step):
    metadata = manager.item_metadata(step).state
    if metadata is None:
      raise FileNotFoundError("the metadata of its state is missing")
    if _leaves(metadata.tree).keys() != checksums["state"].keys():
      raise ValueError("its metadata and its checksums name different arrays")
  return metadata.tree, checksums


def _read_arrays(manager, step, saved, like, checksums):
  """The state, or fields of it: `saved` has their shapes, `like` their structure and placement."""
  _check_same_tree(manager, step, saved, like)
  placed = ocp.checkpoint_utils.construct_restore_args(like)
  args = ocp.args.PyTreeRestore(item=like, restore_args=placed, partial_restore=True)
  with _reading(manager, step):
    arrays = manager.restore(step, args=ocp.args.Composite(state=args)).state
    _check_sums(_state_checksums(arrays), checksums["state"])
  return arrays


def _check_sums(sums, saved):
  if differ := [name for name in sums if sums[name] != saved[name]]:
    more = f" and {len(differ) - _MAX_NAMED} more" if len(differ) > _MAX_NAMED else ""
    raise ValueError(f"the checksums of {', '.join(differ[:_MAX_NAMED])}{more} differ")


def _json_checksum(value):
  return zlib.crc32(json.dumps(value).encode())


def _state_checksums(state):
  """{path: checksum} of a pytree of arrays."""
  leaves = _leaves(state)
  return dict(zip(leaves, np.asarray(_checksums(list(leaves.values()))).tolist(), strict=True))


@jax.jit
def _checksums(arrays):
  """uint32 [len(arrays)]: of each array, sum_i mix(bits_i + i * odd) mod 2^32 over its elements.

  Exact integers, so independent of how arrays are split over devices. `mix` (MurmurHash3's last
  step) is a bijection: one changed element always changes the sum. It is not linear: of bits_i
  times a weight, the sum would miss two swapped values that differ only in their sign.
  """

  def checksum(x):
    bits = jax.lax.bitcast_convert_type(x, f"uint{min(32, 8 * x.dtype.itemsize)}")
    h = bits.astype(jnp.uint32)
    stride = 0x9E3779B9
    for axis in reversed(range(h.ndim)):  # indices by axis: flattening would gather shards
      h += jax.lax.broadcasted_iota(jnp.uint32, h.shape, axis) * jnp.uint32(stride)
      stride = stride * h.shape[axis] % 2**32
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)

  return jnp.stack([checksum(x) for x in arrays])


def _set_aside(manager, steps):
  ocp.multihost.sync_global_processes("ism_jax:damaged_checkpoints_read")
  if jax.process_index() == 0:
    folder = manager.directory.parent / "checkpoints_damaged"
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
      target = folder / str(step)
      while target.exists():  # damaged once before
        target = folder / f"{target.name}_"
      (manager.directory / str(step)).rename(target)
      logging.warning("Moved the damaged step %d to %s.", step, target)
  ocp.multihost.sync_global_processes("ism_jax:damaged_checkpoints_moved")
  manager.reload()


def _leaves(tree):
  # Orbax stores dataclasses and named tuples as dicts and lists: paths agree, structures do not.
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _check_same_tree(manager, step, saved, wanted):
  shape = lambda x: f"{tuple(x.shape)} {np.dtype(x.dtype)}"
  saved, wanted = ({k: shape(x) for k, x in _leaves(tree).items()} for tree in (saved, wanted))
  keys = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
  if not keys:
    return
  differences = "".join(
    f"  {k}: {saved.get(k, 'absent')} saved, {wanted.get(k, 'absent')} wanted\n"
    for k in keys[:_MAX_NAMED]
  )
  more = f"  and {len(keys) - _MAX_NAMED} more\n" if len(keys) > _MAX_NAMED else ""
  raise ValueError(
    f"{manager.directory}/{step} is a checkpoint of another model:\n{differences}{more}"
    "Pass the --config it was trained with, or another --workdir."
  )

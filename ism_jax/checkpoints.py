"""Checkpoints: the train state, the position in the data and the config, one Orbax step for all.

A step counts once it is complete: a save that was killed leaves a temporary folder that no reader
sees and the next writer removes. Arrays are restored to the placement the caller asks for, on any
number of devices.
"""

import os
import tempfile

import jax
import orbax.checkpoint as ocp

_MAX_NAMED = 8  # differences spelt out in one error


def open_manager(workdir, *, keep, read_only=False):
  """Opens `<workdir>/checkpoints`; close(), or leaving `with`, waits for what is being written.

  Args:
    workdir: folder of the run. A path with a scheme, such as gs://, is taken as it is.
    keep: number of latest steps that stay on disk.
    read_only: writes nothing, not even a folder; for a run that someone else may be training.
  Returns:
    An orbax CheckpointManager. For preemption: reached_preemption(step).
  Raises:
    OSError: the workdir cannot be written.
  """
  if keep < 1:
    raise ValueError(f"keep={keep} must be at least 1: training resumes from the latest.")
  workdir = os.fspath(workdir)
  if "://" not in workdir:
    workdir = os.path.abspath(os.path.expanduser(workdir))
    if not read_only:
      check_writable(workdir)
  state, json = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
  handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
  handlers.add("state", ocp.args.StandardSave, state)
  handlers.add("state", ocp.args.StandardRestore, state)
  handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
  for item in ("data", "config"):
    handlers.add(item, ocp.args.JsonSave, json)
    handlers.add(item, ocp.args.JsonRestore, json)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=None if read_only else keep,
    read_only=read_only,
    cleanup_tmp_directories=not read_only,
  )
  return ocp.CheckpointManager(f"{workdir}/checkpoints", options=options, handler_registry=handlers)


def save(manager, step, state, data_state, config):
  """Starts writing a checkpoint, and returns once the state may be overwritten.

  Blocks for the copy to host memory, and for the previous save if that has not finished. An error
  of the background write is raised by the next save or by close().

  Args:
    state: a pytree of arrays (a flax.struct dataclass, optax states).
    data_state: get_state() of the data iterator.
    config: a dict of JSON.
  Returns:
    False where this step is already there, as when the last step of a run is also a regular one.
  """
  latest = manager.latest_step()
  if latest == step:
    return False
  if latest is not None and step < latest:
    raise ValueError(
      f"step {step} cannot follow the checkpoint of step {latest} in {manager.directory}; "
      "remove the later ones, or train in another --workdir."
    )
  # The state may be donated as soon as this returns. On accelerators its values are in host memory
  # by then. On CPU, Orbax goes on reading the arrays' own buffers in the background; XLA does not
  # reuse a buffer that NumPy still refers to, and allocates another for the donated step.
  items = ocp.args.Composite(
    state=ocp.args.StandardSave(state),
    data=ocp.args.JsonSave(data_state),
    config=ocp.args.JsonSave(config),
  )
  if not manager.save(step, args=items):
    raise ValueError(f"step {step} was not saved: {manager.directory} was opened read_only.")
  return True


def restore(manager, like, step=None):
  """Reads the train state, and where in the data it was.

  Args:
    like: the pytree of the state, with jax.ShapeDtypeStruct leaves that carry shardings or with
      arrays. Values are cast to its dtypes.
    step: None for the latest.
  Returns:
    (state, data_state): arrays placed as `like` says, which may be donated; what set_state() takes.
  Raises:
    FileNotFoundError: no such checkpoint.
    ValueError: the checkpoint is one of another model; found before any array is read.
  """
  step = _existing_step(manager, step)
  _check_same_tree(manager, step, _saved_tree(manager, step), like)
  items = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
  restored = manager.restore(step, args=items)
  return restored.state, restored.data


def restore_tree(manager, name, like, step=None):
  """Reads one field of the state and no other, such as one EMA; otherwise as `restore`.

  Args:
    name: the field of the state.
    like: the pytree of that field.
  """
  step = _existing_step(manager, step)
  saved, item = _saved_tree(manager, step), {name: like}
  if name not in saved:
    raise ValueError(
      f"the state in {manager.directory}/{step} has no {name!r}; "
      f"it has: {', '.join(sorted(saved))}."
    )
  _check_same_tree(manager, step, {name: saved[name]}, item)
  args = ocp.args.PyTreeRestore(
    item=item,
    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
    partial_restore=True,
  )
  return manager.restore(step, args=ocp.args.Composite(state=args)).state[name]


def read_config(manager, step=None):
  """The config dict the checkpoint was saved with."""
  step = _existing_step(manager, step)
  return manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config


def check_writable(folder):
  """Raises OSError unless `folder` can be made and written; leaves nothing behind.

  A path with a scheme, such as gs://, is not checked.
  """
  folder = os.fspath(folder)
  if "://" in folder:
    return
  folder = existing = os.path.abspath(os.path.expanduser(folder))
  while not os.path.exists(existing):
    existing = os.path.dirname(existing)
  # Writing is the test: permission bits say nothing about read-only mounts, quotas or root.
  try:
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as e:
    raise OSError(f"{folder} cannot be written ({e.strerror}); name a folder that can.") from e


def _existing_step(manager, step):
  steps = sorted(manager.all_steps())
  if not steps:
    raise FileNotFoundError(
      f"no checkpoint in {manager.directory}; make one with --mode=train and this --workdir."
    )
  if step is None:
    return steps[-1]
  if step not in steps:
    raise FileNotFoundError(
      f"no checkpoint of step {step} in {manager.directory}; there are: {steps}."
    )
  return step


def _saved_tree(manager, step):
  return manager.item_metadata(step).state.tree


def _shapes(tree):
  # Orbax stores dataclasses and named tuples as dicts and lists: paths agree, structures do not.
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves
  }


def _check_same_tree(manager, step, saved, wanted):
  saved, wanted = _shapes(saved), _shapes(wanted)
  keys = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
  if not keys:
    return
  lines = [
    f"  {k}: {saved.get(k, 'absent')} saved, {wanted.get(k, 'absent')} wanted"
    for k in keys[:_MAX_NAMED]
  ]
  if len(keys) > _MAX_NAMED:
    lines.append(f"  and {len(keys) - _MAX_NAMED} more")
  raise ValueError(
    f"{manager.directory}/{step} is a checkpoint of another model:\n"
    + "\n".join(lines)
    + "\nPass the --config it was trained with, or another --workdir."
  )

"""A trained network, read from the workdir of a run.

Only the parameters are read: no optimizer is built, and nothing depends on where training had its
state.
"""

import dataclasses
import functools

import jax

from ism_jax import experiment, model
from ism_jax.experiment import Experiment
from ism_jax.runtime import checkpoints, files, sharding

TREES = {  # of the train state
  "ema": "inference EMA",
  "target_ema": "target EMA",
  "params": "online parameters",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
  """One parameter tree of a checkpoint.

  Attributes:
    config: the config in the checkpoint, a nested dict.
    tree: one of `TREES`.
    params: the tree, a nested dict of arrays.
  """

  exp: Experiment
  config: dict
  step: int
  tree: str
  params: dict

  @property
  def about(self) -> str:
    """`describe` of these parameters."""
    return describe(self.tree, self.step)


def describe(tree: str, step: int) -> str:
  """The name of a tree and its step, in words: "inference EMA, step 8"."""
  return f"{TREES[tree]}, step {step}"


def read(
  workdir: str, tree: str = "ema", *, step: int | None = None, config=None, mesh=None
) -> Trained:
  """Reads a parameter tree, and nothing else of the state.

  Args:
    workdir: folder of the run.
    tree: one of `TREES`.
    step: of the checkpoint; None for the newest that is whole.
    config: a ConfigDict that the run is continued with, such as the checkpoint's own with other
      settings of an evaluation; None for the checkpoint's own.
    mesh: the parameters are on each of its devices; None for the first device of this process.
  Raises:
    FileNotFoundError: no such checkpoint.
    ValueError: it is damaged, or is one of another run than that of `config`.
  """
  if tree not in TREES:
    raise ValueError(f"tree={tree!r} is unknown; known are {', '.join(TREES)}.")
  mesh = sharding.data_mesh(jax.local_devices()[:1]) if mesh is None else mesh
  continued = None if config is None else experiment.parse(config)
  with checkpoints.open_manager(workdir, keep=1, read_only=True) as manager:

    def read_step(step):
      saved = checkpoints.read_config(manager, step)
      if continued is not None:
        experiment.check_continues(saved, files.as_dict(config))
      exp = continued or experiment.parse(saved)
      create = lambda: model.init_params(jax.random.key(0), exp.network(), exp.image_shape)
      on_mesh = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.replicated(mesh))
      abstract = jax.tree.map(on_mesh, jax.eval_shape(create))
      params = checkpoints.restore_tree(manager, tree, abstract, step)
      return Trained(exp, saved, step, tree, params)

    return checkpoints.restore_newest(manager, read_step)[1] if step is None else read_step(step)


def read_config(workdir: str) -> dict:
  """The config of the newest checkpoint whose config is whole; raises as `read` does."""
  with checkpoints.open_manager(workdir, keep=1, read_only=True) as manager:
    read_step = functools.partial(checkpoints.read_config, manager)
    return checkpoints.restore_newest(manager, read_step)[1]

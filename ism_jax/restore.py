"""A trained network, read from the workdir of a run or from an export.

Only the parameters are read: no optimizer is built, and nothing depends on where training had its
state.
"""

import collections
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import itertools
import pathlib

from absl import logging
from etils import epath
import jax
from tensorflow_datasets.datasets.siscore import labels as imagenet_labels

from ism_jax import experiment, model
from ism_jax.data import labels
from ism_jax.experiment import Experiment
from ism_jax.pretrained import hub, sit, vae
from ism_jax.runtime import checkpoints, files, sharding

TREES = {  # of every train state
  "ema": "inference EMA",
  "target_ema": "target EMA",
  "params": "online parameters",
}
_VAE = f"vae/{vae.WEIGHTS}"  # of an export that has its autoencoder beside it
_NEEDED = (
  "Needed is the workdir of a run (python -m ism_jax train makes one), a folder that python -m "
  f"ism_jax export wrote ({sit.CONFIG}, {sit.WEIGHTS}), or its repository on the Hugging Face hub."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
  """One parameter tree of a checkpoint, or that of an export.

  Attributes:
    config: the config in the checkpoint or export, a nested dict.
    tree: one of `trees_of` the experiment.
    params: the tree, a nested dict of arrays.
    checksum: of the tree, see `checkpoints.tree_checksum`; two runs have other ones at one step.
    dataset: identity of the data that it was trained on, see `data.pipeline`; {} of older ones.
    names: of the classes; None of older runs, and where they have numbers alone.
    class_counts: images of each class that it was trained on; None where nothing says so.
  """

  exp: Experiment
  config: dict
  step: int
  tree: str
  params: dict
  checksum: str = ""
  dataset: dict = dataclasses.field(default_factory=dict)
  names: list[str] | None = None
  class_counts: list[int] | None = None

  @property
  def about(self) -> str:
    """`describe` of these parameters."""
    return describe(self.tree, self.step)


def trees_of(exp: Experiment) -> tuple[str, ...]:
  """The parameter trees that a run has: `TREES`, and `EmaConfig.others` such as "ema:0.999"."""
  return (*TREES, *exp.ema.decays)


def check_trees(exp: Experiment, trees: Sequence[str]) -> None:
  """Raises ValueError unless a run has these parameter trees."""
  known = trees_of(exp)
  if unknown := [tree for tree in trees if tree not in known]:
    raise ValueError(f"tree={unknown[0]!r} is unknown; known are {', '.join(known)}.")


def name_of(tree: str) -> str:
  """What a tree is, in words: "inference EMA", or "inference EMA of decay 0.999"."""
  if tree in TREES:
    return TREES[tree]
  kind, _, decay = tree.partition(":")
  return f"{TREES[kind]} of decay {float(decay)}"


def describe(tree: str, step: int) -> str:
  """The name of a tree and its step, in words: "inference EMA, step 8"."""
  return f"{name_of(tree)}, step {step}"


def is_run(source: str) -> bool:
  """Whether a source is the workdir of a run, with checkpoints."""
  if source.startswith(hub.SCHEMES):  # which epath would ask for files
    return False
  return (epath.Path(source).expanduser() / "checkpoints").is_dir()


def read(
  source: str, tree: str = "ema", *, step: int | None = None, config=None, mesh=None
) -> Trained:
  """Reads a parameter tree, and nothing else of the state.

  Args:
    source: the workdir of a run; an export, its folder or file of weights; or what `hub.parse`
      takes for the repository of an export.
    tree: of a workdir, one of `trees_of` its experiment.
    step: of a workdir, the checkpoint; None for the newest that is whole.
    config: a ConfigDict that the run is continued with, such as the checkpoint's own with other
      settings of an evaluation; None for the checkpoint's own.
    mesh: the parameters are on each of its devices; None for the first device of this process.
  Raises:
    FileNotFoundError: nothing of the kind is at `source`, or no such checkpoint.
    ValueError: it is damaged, or is one of another run than that of `config`.
  """
  mesh = sharding.data_mesh(jax.local_devices()[:1]) if mesh is None else mesh
  continued = None if config is None else experiment.parse(config)

  def experiment_of(saved):
    if continued is not None:
      experiment.check_continues(saved, files.as_dict(config))
      experiment.check_interval(saved, continued)
    return continued or experiment.parse(saved)

  if not is_run(source):
    if tree != "ema" or step is not None:
      raise ValueError(
        f"{source} is no workdir (it has no folder checkpoints), and an export holds one tree of "
        "one step: leave tree and step out."
      )
    folder, details = find_export(source)
    exp = experiment_of(details["config"])
    if exp.data.vae == details["config"]["data"]["vae"] and (folder / _VAE).is_file():
      beside = dataclasses.replace(exp.data, vae=str((folder / _VAE).parent))
      exp = dataclasses.replace(exp, data=beside)
    params = sit.load(folder, exp.network(), exp.image_shape)
    params = jax.device_put(params, sharding.replicated(mesh))
    checksum = details.get("checksum") or files.sha256(sit.weights_of(folder))
    return Trained(
      exp,
      details["config"],
      details["step"],
      details["tree"],
      params,
      checksum,
      names=_names(details),
    )
  with _open(source) as manager:

    def read_step(step):
      saved = checkpoints.read_config(manager, step)
      exp = experiment_of(saved)
      check_trees(exp, [tree])
      field = f"others/{tree}" if tree in exp.ema.decays else tree
      create = lambda: model.init_params(jax.random.key(0), exp.network(), exp.image_shape)
      on_mesh = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.replicated(mesh))
      abstract = jax.tree.map(on_mesh, jax.eval_shape(create))
      params = checkpoints.restore_tree(manager, field, abstract, step)
      checksum = checkpoints.tree_checksum(manager, field, step)
      position = checkpoints.read_position(manager, step)
      about = [position.get(key) for key in ("dataset", "classes", "class_counts")]
      return Trained(exp, saved, step, tree, params, checksum, about[0] or {}, *about[1:])

    return checkpoints.restore_newest(manager, read_step)[1] if step is None else read_step(step)


def read_start(source: str, exp: Experiment, names: Sequence[str] | None):
  """The parameters with which a training of `exp` begins, NumPy's in host memory.

  Those of another network may be of other classes: each class takes the row of the label table that
  has its name, and a new one that of "no class", whose own row always comes along. Where names are
  unknown, as many classes are the same by number, and 1,000 others are taken to be ImageNet's, as
  of SiT's. Positions are fixed, so that another size of images fits. Embedders that a network of
  SiT's lacks are left out, see `sit.complete`. Where its time is reversed (`exp.init_time`), it is
  converted by `sit.reverse_time`.

  Args:
    source: the workdir of a run, of which the inference EMA is taken; an export; or what `sit.read`
      takes.
    names: of the classes of the data, by label; None where it has numbers alone.
  Raises:
    FileNotFoundError: nothing of the kind is at `source`.
    ValueError: it is damaged, no network of this model and as many channels, or one of this project
      whose time is to be reversed.
  """
  if is_run(source):
    trained = read(source)
    began, params = trained.exp, jax.device_get(trained.params)
    network = model.at_interval(began.network(), params, began.objective.t_interval)
    state = sit.from_params(*network[::-1], began.image_shape)
    about, known = f"the {trained.about} of {source}", trained.names
    w_scaled = began.objective.w_scaled
  else:
    (state, about), known, w_scaled = sit.read(source), None, False
    with contextlib.suppress(FileNotFoundError, ValueError):  # a state dict alone
      details = find_export(source, beside=())[1]
      known, w_scaled = _names(details), details["config"]["objective"].get("w_scaled", False)
  if exp.init_time == "data_to_noise":
    state = sit.reverse_time(state, about)
  network = exp.network().clone(interval=False)  # a start has none: it is added, as what it lacks
  params = sit.to_own_params(state, network, exp.image_shape, about)
  if network.guided and "w_embedder" in params and w_scaled != exp.objective.w_scaled:
    raise ValueError(
      f"{about} was trained with objective.w_scaled={w_scaled}, and this run has "
      f"{exp.objective.w_scaled}: its output would be off by 1 + w. Set objective.w_scaled="
      f"{w_scaled}."
    )
  table, count = params["y_embedder"]["embedding"], exp.data.num_classes
  before, imagenet = len(table) - 1, imagenet_labels.IMAGENET_LABELS_LIST
  if names and known and len(known) == before:
    rows, how = match_names(names, known), "by name"
  elif count == before:
    rows, how = list(range(count)), "by number"
  elif names and before == len(imagenet):
    rows, how = match_names(names, imagenet), "by ImageNet's names"
  else:
    rows, how = [-1] * count, f"(of its {before} or of these the names are unknown)"
  params["y_embedder"]["embedding"] = table[[*rows, -1]]  # the last is that of no class
  new, embedders = rows.count(-1), sit.EMBEDDERS if network.guided else sit.EMBEDDERS[:1]
  absent = [name for name in embedders if name not in params]
  remark = f"; it has no {' and no '.join(absent)}: new ones add nothing at first"
  logging.info(
    f"Training begins with {about}: {count - new} of {count} classes {how}, {new} new, which begin "
    f"as no class{remark if absent else ''}."
  )
  return params


def match_names(names: Sequence[str], known: Sequence[str]) -> list[int]:
  """The place of each name in `known`, or -1; the same place if the name is there.

  Names may have several words for a class, such as "tabby, tabby cat": the whole or else any of
  them is a match, if it stands for one class alone.
  """
  places = collections.defaultdict(set)
  for i, name in enumerate(known):
    for word in labels.words(name):
      places[word].add(i)

  def place(i, name):
    if name in known[i : i + 1]:  # which another class may have, too
      return i
    return next((min(places[w]) for w in labels.words(name) if len(places.get(w, ())) == 1), -1)

  return list(itertools.starmap(place, enumerate(names)))


def read_config(source: str) -> dict:
  """The config of the newest checkpoint whose config is whole, or of an export; as `read`."""
  if not is_run(source):
    return find_export(source)[1]["config"]
  with _open(source) as manager:
    read_step = functools.partial(checkpoints.read_config, manager)
    return checkpoints.restore_newest(manager, read_step)[1]


def _open(workdir: str):
  return checkpoints.open_manager(epath.Path(workdir).expanduser(), keep=1, read_only=True)


def _names(details: dict) -> list[str] | None:
  """Those of the classes in an export's config.json, if it has them."""
  by_label = details.get("id2label")
  names = [by_label.get(str(i)) for i in range(len(by_label))] if isinstance(by_label, dict) else []
  return names if names and all(isinstance(name, str) for name in names) else None


def find_export(source: str, beside=(_VAE,)) -> tuple[pathlib.Path, dict]:
  """(the folder of an export, its config.json); source and errors as of `read`.

  Of a repository, the files `beside` are fetched too.
  """
  needed = {"what": "trained network", "remedy": _NEEDED}
  weights = (sit.WEIGHTS, sit.OLDER_WEIGHTS)
  path = hub.find(source, [sit.CONFIG, *weights, *beside], **needed)
  path = path.absolute()  # that of a file of weights names its folder
  above = [name.count("/") for name in weights if path.as_posix().endswith(f"/{name}")]
  folder = path.parents[above[0]] if above and path.is_file() else path
  files_needed = (folder / sit.CONFIG, sit.weights_of(folder))
  if missing := [str(f.relative_to(folder)) for f in files_needed if not f.is_file()]:
    reason = f"there are no checkpoints, and no {' and no '.join(missing)}"
    raise hub.absent(source, reason, **needed)
  try:
    details = files.read_json(folder / sit.CONFIG, {"config": {}, "tree": str, "step": int}, "")
    details["config"], describe(details["tree"], details["step"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{folder / sit.CONFIG} is none that python -m ism_jax export writes "
      f"({type(error).__name__}: {error}). Export it again."
    ) from error
  return folder, details

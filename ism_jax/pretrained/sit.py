"""Our parameters as the state dict of SiT's PyTorch code, and such a state dict as our parameters.

Keys and layouts are the official code's (SiT, arXiv:2401.08740), in which time runs from noise to
data and the network predicts x1 - x0, as here. The embedders of d and w, which it lacks, are named
after its t_embedder. PyTorch's matrices are [out, in] where Flax has [in, out], its patch embedding
is a convolution [D, C, ph, pw] where ours is a matrix [ph pw C, D], and its blocks are numbered
where ours are stacked. REPA's code (arXiv:2410.06940) has the same keys, but time from data to
noise: see `reverse_time`.

Axes: T tokens, D width, C channels.
"""

import pathlib
from typing import Any

from absl import logging
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.model import SiT, frequencies, init_params, position_embedding
from ism_jax.pretrained import hub, torch_files, weights

# Of a folder that `export` writes: where diffusers looks for them; where older exports have them.
WEIGHTS, OLDER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors", "model.safetensors"
CONFIG = "config.json"
EMBEDDERS = ("d_embedder", "w_embedder")  # which SiT's own code does not have
TIMES = ("noise_to_data", "data_to_noise")  # how time runs in a state dict: as here, or reversed

_TRAINING_ONLY = ("projectors", "logvar_linear")  # modules of REPA's and DMF's code
_FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")
_TIME = "t_embedder.mlp.0.weight"
_POSITIONS, _LABELS = "pos_embed", "y_embedder.embedding_table.weight"
_MODULES = {  # of ours: SiT's name, with the number of the block
  "x_embedder": "x_embedder.proj",
  "y_embedder": "y_embedder.embedding_table",
  **{f"{name}/mlp_{i}": f"{name}.mlp.{i}" for name in ("t_embedder", *EMBEDDERS) for i in (0, 2)},
  "blocks/adaLN_modulation": "blocks.{}.adaLN_modulation.1",
  "blocks/attn/qkv": "blocks.{}.attn.qkv",
  "blocks/attn/proj": "blocks.{}.attn.proj",
  "blocks/fc1": "blocks.{}.mlp.fc1",
  "blocks/fc2": "blocks.{}.mlp.fc2",
  "final_adaLN_modulation": "final_layer.adaLN_modulation.1",
  "final_linear": "final_layer.linear",
}
_LEAVES = {"kernel": "weight", "bias": "bias", "embedding": "weight"}


def from_params(params, model: SiT, shape: tuple[int, int, int]) -> dict[str, Any]:
  """The state dict of parameters of a network of [H, W, C] images, in their dtype.

  Fixed in SiT too, but part of its state dict, is `pos_embed` [1, T, D].
  """
  grid = tuple(n // model.cfg.patch for n in shape[:2])
  state = {_POSITIONS: position_embedding(model.cfg.dimensions[1], grid)[None]}
  for path, array in traverse_util.flatten_dict(params).items():
    key = _key(path)
    layers = enumerate(array) if "{}" in key else [(0, array)]
    state |= {key.format(i): _to_torch(path, layer, model.cfg.patch) for i, layer in layers}
  return state


def to_params(state: dict[str, Any], model: SiT, shape: tuple[int, int, int], source: str):
  """The parameters of a network that a state dict holds.

  Where it predicts variances as well (SiT's learn_sigma), only the velocity is taken.

  Args:
    state: arrays by key. The keys of an embedder of d or w may all be absent.
    shape: [H, W, C] of the network's images.
    source: where the arrays are from, for the error.
  Returns:
    A nested dict of float32 NumPy arrays, without the embedders that are absent: see `complete`.
  Raises:
    ValueError: keys are missing, unexpected, of another shape or not finite: all are listed.
  """
  state = _without_variances(state, model, shape[-1])
  abstract = jax.eval_shape(lambda: init_params(jax.random.key(0), model, shape))
  modules = {str(key).partition(".")[0] for key in state}
  abstract = {k: v for k, v in abstract.items() if k in modules or k not in EMBEDDERS}
  needed = jax.eval_shape(lambda params: from_params(params, model, shape), abstract)
  if wrong := _differences(state, {key: array.shape for key, array in needed.items()}):
    mismatch = (
      f"{source} does not hold the network of model.size={model.cfg.size!r} for {shape[0]}x"
      f"{shape[1]}x{shape[2]} images of {model.num_classes} classes"
      f"{'' if model.guided else ', without a w input'}:"
    )
    raise ValueError("\n  ".join([mismatch, *wrong]) + f"\n{_remedy(state)}")
  positions, computed = state[_POSITIONS], from_params({}, model, shape)[_POSITIONS]
  error = np.abs(np.asarray(positions, np.float32) - computed).max()
  if error > 4 * float(jnp.finfo(positions.dtype).eps):  # files of lower precision round them
    raise ValueError(
      f"{source} has another {_POSITIONS} than SiT's sinusoids, which are fixed here (they differ "
      f"by up to {error:.2g}): its other weights would mean nothing. Name another file."
    )
  shapes, depth = traverse_util.flatten_dict(abstract), model.cfg.dimensions[0]
  layers = lambda key: [[key.format(i)] for i in range(depth)] if "{}" in key else [[key]]
  return weights.stack_layers(state, {path: layers(_key(path)) for path in shapes}, shapes)


def to_own_params(state: dict[str, Any], model: SiT, shape: tuple[int, int, int], source: str):
  """`to_params` of a state dict of any classes and any size of images, with which others begin.

  Its label table comes with the rows that it has. Positions are fixed: they tell the size, and
  those of another are none of the parameters.

  Raises:
    ValueError: also for another number of channels.
  """
  patches, table = state.get("x_embedder.proj.weight"), state.get(_LABELS)
  if getattr(patches, "ndim", 0) == 4 and patches.shape[1] != shape[-1]:
    raise ValueError(
      f"{source} is a network of {patches.shape[1]} channels, and the data has {shape[-1]}: its "
      f"patches would mean nothing. Set init_from to weights of {shape[-1]} channels, or data.dir "
      f"to data of {patches.shape[1]}."
    )
  if getattr(table, "ndim", 0) == 2 and len(table) > 1:
    model = model.clone(num_classes=len(table) - 1)
  if grid := _grid(state.get(_POSITIONS)):
    shape = (*(n * model.cfg.patch for n in grid), shape[-1])
  return to_params(state, model, shape, source)


def reverse_time(state: dict[str, Any], source: str) -> dict[str, Any]:
  """The state dict of s(x, t) = -s'(x, 1 - t), of that of s'.

  s' is trained with t = 0 at the data, to predict noise less data, as by REPA's code. Of its first
  layer on [cos ft, sin ft], [A | B], that on the features of 1 - t is
  [A cos f + B sin f | A sin f - B cos f]; the last layer changes its sign. What REPA and DMF need
  in training only is left out.

  Args:
    state: arrays by key; `to_params` lists what is wrong with them.
    source: where they are from, for the error.
  Raises:
    ValueError: it has embedders of d or w: it is of this project, and of its time.
  """
  modules = {str(key).partition(".")[0] for key in state}
  if ours := [name for name in EMBEDDERS if name in modules]:
    raise ValueError(
      f"{source} has {' and '.join(ours)}: it is a network of this project, whose time runs from "
      "noise to data. Set init_time=noise_to_data."
    )
  state = {k: a for k, a in state.items() if str(k).partition(".")[0] not in _TRAINING_ONLY}
  floating = lambda a: isinstance(a, np.ndarray) and jnp.issubdtype(a.dtype, jnp.floating)
  reverse = {key: -state[key] for key in _FINAL if floating(state.get(key))}
  if floating(first := state.get(_TIME)) and first.ndim == 2 and first.shape[1] % 2 == 0:
    f = np.asarray(frequencies(first.shape[1] // 2), np.float64)
    a, b = np.split(first.astype(np.float64), 2, axis=1)
    first_reverse = np.hstack([a * np.cos(f) + b * np.sin(f), a * np.sin(f) - b * np.cos(f)])
    reverse[_TIME] = first_reverse.astype(np.promote_types(first.dtype, np.float32))
  return state | reverse


def _grid(positions) -> tuple[int, int] | None:
  """Rows and columns of `position_embedding` [1, T, D]; None where it is none."""
  if not isinstance(positions, np.ndarray) or positions.ndim != 3 or not positions.size:
    return None
  of_rows = positions[0, :, positions.shape[2] // 2 :]
  others = np.flatnonzero((of_rows != of_rows[0]).any(axis=1))  # tokens below the first row
  columns = int(others[0]) if others.size else len(of_rows)
  is_grid = columns and len(of_rows) % columns == 0  # NaN differs from itself
  return (len(of_rows) // columns, columns) if is_grid else None


def complete(imported, fresh):
  """`imported`, with the embedders that it lacks.

  Their first layers are the `fresh` ones, their last are zero: they add exactly nothing to the
  conditioning, whatever d and w are, and begin to learn with the first step.
  """
  added = {
    name: fresh[name] | {"mlp_2": jax.tree.map(jnp.zeros_like, fresh[name]["mlp_2"])}
    for name in fresh.keys() - imported.keys()
  }
  return imported | added


def weights_of(folder: pathlib.Path) -> pathlib.Path:
  """The file of weights of an export's folder, be it there or not."""
  older = folder / OLDER_WEIGHTS
  return older if older.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def read(path) -> tuple[dict[str, Any], str]:
  """Reads (arrays by key, what they are) from a file, or from a folder that `export` wrote.

  Args:
    path: what torch.save or safetensors wrote: a state dict, or a dict of several, as SiT's
      training saves: "ema", "model". The average is preferred. Also a repository, see `hub`.
  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or no file of tensors; see `torch_files.read_state_dict`.
  """
  remedy = (
    "Name a state dict of SiT (.pt or .safetensors), the folder of an export, the repository of "
    "either on the Hugging Face hub, or the workdir of a run."
  )
  needed = {"what": "weights", "remedy": remedy}
  source, path = str(path), hub.find(str(path), [WEIGHTS, OLDER_WEIGHTS], **needed)
  if path.is_dir():
    path = weights_of(path)
  if not path.is_file():
    raise hub.absent(source, f"that folder has no {WEIGHTS}", **needed)
  saved = torch_files.read_state_dict(path)
  for name, what in (("ema", "the EMA"), ("model", "the raw parameters (there is no EMA)")):
    if isinstance(saved.get(name), dict):
      return saved[name], f"{what} of {path}"
  return saved, str(path)


def load(path, model: SiT, shape: tuple[int, int, int]):
  """`to_params` of what `read` finds."""
  state, source = read(path)
  params = to_params(state, model, shape, source)
  logging.info("Parameters are %s.", source)
  return params


def _key(path):
  *modules, leaf = path
  return f"{_MODULES['/'.join(modules)]}.{_LEAVES[leaf]}"


def _to_torch(path, array, patch):
  if path == ("x_embedder", "kernel"):
    return array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1)
  return array.T if path[-1] == "kernel" else array


def _without_variances(state, model, channels):
  """`state`, with the first half of the channels of each pixel where there are twice as many."""
  pixels, velocity = model.cfg.patch**2, {}
  for key in _FINAL:
    array = state.get(key)
    if isinstance(array, np.ndarray) and array.shape[:1] == (2 * pixels * channels,):
      halves = array.reshape(pixels, 2, channels, *array.shape[1:])
      velocity[key] = halves[:, 0].reshape(-1, *array.shape[1:])
  return state | velocity


def _differences(state, shapes):
  """What is wrong with a state dict of which these shapes are needed, one line for each key."""
  lines = []
  for key in sorted(state.keys() | shapes.keys(), key=str):
    array = state.get(key)
    shape = getattr(array, "shape", type(array).__name__)
    if key not in state:
      lines.append(f"missing: {key} {shapes[key]}")
    elif key not in shapes:
      lines.append(f"unexpected: {key} {shape}")
    elif shape != shapes[key]:
      lines.append(f"of another shape: {key} {shape}, needed {shapes[key]}")
    elif not jnp.issubdtype(array.dtype, jnp.floating):
      lines.append(f"no floating-point numbers: {key} {array.dtype}")
    elif not np.isfinite(np.asarray(array, np.float32)).all():
      lines.append(f"not finite: {key}")
  return lines


def _remedy(state):
  """What to do about a state dict that does not fit."""
  embed = state.get("x_embedder.proj.weight")
  if getattr(embed, "ndim", 0) != 4:
    return "It is no state dict of SiT: name another file."
  if {str(key).partition(".")[0] for key in state} & set(_TRAINING_ONLY):
    return (
      "It is of REPA's code or DMF's, in which time runs from data to noise: begin a training with "
      "it by init_time=data_to_noise, which converts it."
    )
  depth = len({key.split(".")[1] for key in state if str(key).startswith("blocks.")})
  return (
    f"It has {depth} blocks of width {embed.shape[0]}, patches of {embed.shape[2]} pixels and "
    f"{embed.shape[1]} channels: pass the model.size and data of that network, or another file."
  )

"""Weights of published networks: from a named file, a cache or a download, or random.

The cache is the folder $ISM_JAX_CACHE, or ~/.cache/ism_jax. A file that was put there by hand, for
machines without network, is used as if it had been downloaded.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import os
import pathlib
import tempfile
from typing import Any
import urllib.request

from absl import logging
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.pretrained import torch_files
from ism_jax.runtime import files

CACHE = "ISM_JAX_CACHE"
# By default TPUs multiply float32 in one pass of bfloat16, and GPUs as TF32.
PRECISION = jax.lax.Precision.HIGHEST
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
_LISTED = 6  # keys of each kind in an error


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """A published network with weights.

  Attributes:
    params: nested dict of float32 NumPy arrays.
    sha256: of the file of weights; of random weights, of the parameters.
    name: as it was asked for.
    cfg: its architecture, where there are several.
  """

  params: Any = dataclasses.field(repr=False)
  sha256: str
  name: str
  cfg: Any = None


@dataclasses.dataclass(frozen=True)
class Published:
  """A file of weights that anyone can download.

  Attributes:
    what: what it holds, for messages: "FID Inception".
    file: its name in the cache.
    sha256: its checksum in hex.
    url: where it is.
  """

  what: str
  file: str
  sha256: str
  url: str


def cache() -> pathlib.Path:
  """The folder in which downloaded weights are kept."""
  try:
    return pathlib.Path(files.local_path(os.environ.get(CACHE) or "~/.cache/ism_jax"))
  except ValueError:  # a user without a home, as in a container
    return pathlib.Path(tempfile.gettempdir()) / f"ism_jax-{os.getuid()}"


def load(
  name: str, published: Published, shapes: dict, params_from_state_dict: Callable, gain: int = 1
) -> Pretrained:
  """Loads weights of a published architecture.

  Args:
    name: "random", for checks of a set-up without any weights, see `random`; else see `find`.
    shapes: of the parameters, see `shapes_of`.
    params_from_state_dict: (arrays by key, source=file) -> parameters.
  Raises:
    FileNotFoundError: no weights are there or to be had; says what to download and what to pass.
    ValueError: the file is damaged, or holds the weights of another network.
  """
  if name == "random":
    return random(name, shapes, gain)
  return read(name, find(name, published), params_from_state_dict, published.url)


def read(name: str, path, params_from_state_dict: Callable, page: str, cfg=None) -> Pretrained:
  """Reads a network of architecture `cfg` from a file; `page` has the published one, for errors."""
  try:
    arrays = torch_files.read_state_dict(path)
  except ValueError as error:
    raise ValueError(f"{error} The published file is at {page}.") from error
  params = params_from_state_dict(arrays, source=str(path))
  return Pretrained(params, files.sha256(path), name, cfg)


def random(name: str, shapes: dict, gain: int = 1, cfg=None) -> Pretrained:
  """A network with weights that mean nothing and are the same for everyone.

  Args:
    shapes: see `shapes_of`. Of the kernels, those with three axes are matrices, stacked.
    gain: variance of an output for inputs of variance 1; 2 keeps activations of one size through
      ReLUs (He et al. 2015).
  """
  # NumPy's float32 uniforms are exact, whatever machine and accelerator: so is the checksum.
  rng, flat = np.random.default_rng(0), {}
  for path, leaf in shapes.items():
    noise = 2 * rng.random(leaf.shape, np.float32) - 1  # of variance 1/3
    if path[-1] == "kernel":
      inputs = leaf.shape[1] if len(leaf.shape) == 3 else np.prod(leaf.shape[:-1])
      flat[path] = noise * np.sqrt(3 * gain / inputs, dtype=np.float32)
    else:  # around 1 where it is a factor
      flat[path] = np.float32(0.1) * noise + np.float32(path[-1] in ("scale", "ls1", "ls2"))
  params = traverse_util.unflatten_dict(flat)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(leaf.tobytes())
  return Pretrained(params, digest.hexdigest(), name, cfg)


@functools.lru_cache
def shapes_of(network, size: int) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  """{path: shape} of the parameters of a network of [B, size, size, 3], always in one order."""
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  params = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), image)["params"]
  return dict(sorted(traverse_util.flatten_dict(params).items()))


def check_images(images) -> None:
  """Raises ValueError unless images are uint8 [B, H, W, 3]."""
  if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
    raise ValueError(
      f"got images of {images.dtype} {images.shape}; needed are uint8 [B, H, W, 3], not scaled. "
      "Round floats by a stated protocol, and repeat the channel of grey images."
    )


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in PyTorch of a kernel [in, out] or [H, W, in, out]: [out, in] or [out, in, H, W]."""
  return (shape[-1], shape[-2], *shape[:-2])


def params_from_tensors(arrays, tensors: dict, shapes: dict, **messages: str):
  """Parameters, a nested dict of float32 arrays, from PyTorch's tensors by key.

  Args:
    tensors: for each parameter's path, of each layer, {key: shape} of what is concatenated.
    shapes: of the parameters, see `shapes_of`.
    messages: as `check_tensors` takes them.
  """
  parts = [part for layers in tensors.values() for part in layers]
  check_tensors(arrays, {key: shape for part in parts for key, shape in part.items()}, **messages)
  return stack_layers(arrays, tensors, shapes)


def stack_layers(arrays, keys: dict, shapes: dict):
  """`params_from_tensors`, of tensors that are checked: `keys` has those of each layer."""
  params = {}
  for path, leaf in shapes.items():
    layers = [np.concatenate([arrays[key] for key in layer]) for layer in keys[path]]
    if path[-1] == "kernel":
      layers = [np.moveaxis(array, (0, 1), (-1, -2)) for array in layers]
    params[path] = np.ascontiguousarray(np.stack(layers).reshape(leaf.shape), np.float32)
  return traverse_util.unflatten_dict(params)


def check_tensors(arrays, shapes, *, source: str, what: str, needed: str) -> None:
  """Raises ValueError unless arrays by key have exactly these {key: shape}.

  Args:
    what: what they should be: "the weights of ...".
    needed: which tensors those are, and where.
  """
  problems = {
    "missing": [key for key in shapes if key not in arrays],
    "unexpected": sorted(str(key) for key in arrays if key not in shapes),
    "of another shape": [
      f"{key} is {np.shape(arrays[key])}, not {shape}"
      for key, shape in shapes.items()
      if key in arrays and np.shape(arrays[key]) != shape
    ],
  }
  lines = [
    f"{problem}: {', '.join(keys[:_LISTED])}"
    + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")
    for problem, keys in problems.items()
    if keys
  ]
  if lines:
    raise ValueError(f"{source} does not hold {what}; {'; '.join(lines)}. Needed are {needed}.")


def find(name: str, published: Published) -> pathlib.Path:
  """The file of weights that a name stands for.

  Args:
    name: of a file that `torch.save` or safetensors wrote, whatever its checksum; or "" for the
      published weights, downloaded where they are not yet in the cache.
  Raises:
    FileNotFoundError: the file is not there, or cannot be downloaded; says what to download from
      where, and where to put it.
    ValueError: the cached or downloaded file has another checksum than the published one.
  """
  if name:
    path = pathlib.Path(files.local_path(name))
    if not path.is_file():
      raise _absent(published, f"there is no file {name!r}")
    return path
  path = cache() / published.file
  if not path.is_file():
    _download(published, path)
  if (sha256 := files.sha256(path)) != published.sha256:
    raise ValueError(
      f"{path} ({path.stat().st_size} bytes) is not the published file of {published.what} "
      f"weights: its sha256 is {sha256}, not {published.sha256}. Delete it and download "
      f"{published.url} to {cache() / published.file}, or pass its name if it is what you want."
    )
  return path


def _download(published, path):
  try:
    with files.whole_file(path) as temporary:
      logging.info("Downloading %s to %s.", published.url, path)
      whole = pathlib.Path(temporary)
      _fetch(published.url, whole)
      if (sha256 := files.sha256(whole)) != published.sha256:
        raise OSError(f"it gave {whole.stat().st_size} bytes of sha256 {sha256}")
  # No network, a full disk, a page that is gone: the libraries' errors have no base in common, and
  # the remedy is the same for all.
  except Exception as error:
    raise _absent(published, f"the download failed ({cause_of(error)})") from error


def cause_of(error: Exception) -> str:
  """What made a download fail, in one line."""
  cause = error.__cause__ or error  # the hub's error says only that something went wrong
  line = str(cause).strip().partition("\n")[0]
  return f"{type(cause).__name__}: {line}"


def _fetch(url, path):
  with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as file:
    size = int(response.headers.get("Content-Length") or 0)
    done, tenths = 0, 0
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      done += len(chunk)
      if size and done * 10 // size > tenths:
        tenths = done * 10 // size
        logging.info("%d%% of %.0f MB.", 10 * tenths, size / 1e6)
    if done < size:
      raise OSError(f"it broke off after {done} of {size} bytes")


def _absent(published, reason):
  return FileNotFoundError(
    f"no {published.what} weights: {reason}. Download {published.url} to "
    f"{cache() / published.file} (${CACHE} names another folder), or pass the name of the file."
  )

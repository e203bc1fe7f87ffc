"""Files of PyTorch weights as NumPy arrays, without PyTorch.

Read are safetensors and both formats of `torch.save`:
- A zip archive (PyTorch 1.6 and later): `data.pkl` holds the structure, in which each tensor names
  its storage, and `data/<key>` the bytes of a storage.
- A stream (earlier, and many published files): a magic number, a version and facts about the
  machine, each pickled; then the structure, the list of the storages' keys, and for each storage
  the number of its elements as int64 and their bytes.

A pickle is a program, and a downloaded one is a stranger's. Here it can name nothing but the few
globals that state dicts are made of, each of which has a stand-in below: none of PyTorch's code and
none of the file's is ever run.
"""

import io
import itertools
import math
import os
import pathlib
import pickle
import re
import struct
from typing import Any, NamedTuple
import zipfile
import zlib

import ml_dtypes
import numpy as np
import safetensors

from ism_jax.runtime import arrays, files

_STREAM_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_STREAM_VERSION = 1001
_MOST_VALUES = 2**18  # tensors, numbers and texts, and the dicts and lists around them

_WRAPPERS = re.compile(
  r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
_MODULE, _COUNT = "module.", "n_averaged"

_STORAGES = {  # torch's names
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "ComplexFloatStorage": np.complex64,
  "ComplexDoubleStorage": np.complex128,
}
_SAFETENSORS = {
  **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
  "BF16": ml_dtypes.bfloat16,
  **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
  **{f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)},
  "BOOL": "bool",
}


def read_state_dict(path) -> dict[str, Any]:
  """Reads the tensors of a file that `torch.save` or safetensors wrote.

  Args:
    path: of the file. Its first bytes tell the format, whatever its name.
  Returns:
    What was saved: dicts, lists and plain values as they are nested in the file, with an array in
    place of each tensor or parameter; an argparse.Namespace becomes a dict. Keys are without what
    PyTorch's wrappers put into them, see `_unwrapped`. Arrays have the dtypes of the file, with
    ml_dtypes.bfloat16 for bfloat16. They are read-only, and those that shared a storage may share
    memory: copy before writing.
  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, is none of the formats, holds no dict, or names a global that a
      state dict does not need.
  """
  path = pathlib.Path(path)
  with files.open_regular(path) as file:
    head = file.read(32)
    file.seek(0)
    if head.startswith(b"PK"):
      saved = _read_zip(path, file)
    elif _STREAM_MAGIC in head:
      saved = _read_stream(path, file)
    elif head[8:9] == b"{" or path.suffix == ".safetensors":
      saved = _read_safetensors(path, file)
    else:
      raise _unreadable(path, f"is no file of torch.save or safetensors: it {_looks_like(head)}")
  if not isinstance(saved, dict):
    raise _unreadable(path, f"holds a {type(saved).__name__}, not a dict of tensors")
  return _unwrapped(saved)


def _unwrapped(saved: dict) -> dict:
  """Keys as those of the module itself, also of dicts inside.

  DataParallel and AveragedModel, which counts, put "module." before all keys; torch.compile, FSDP
  and activation checkpointing name themselves wherever they are.
  """
  saved = {k: _unwrapped(v) if isinstance(v, dict) else v for k, v in saved.items()}
  names = {key: _WRAPPERS.sub(r"\1", key) if isinstance(key, str) else key for key in saved}
  while (of_module := names.keys() - {_COUNT}) and all(
    str(names[key]).startswith(_MODULE) for key in of_module
  ):
    names = {key: name.removeprefix(_MODULE) for key, name in names.items() if key != _COUNT}
  if len(set(names.values())) < len(names):  # then these words are of the module's own
    return saved
  return {name: saved[key] for key, name in names.items()}


def _read_safetensors(path, file):
  try:
    entries = safetensors.deserialize(file.read())
  except safetensors.SafetensorError as error:
    raise _unreadable(path, f"is a damaged safetensors file ({error})") from error
  tensors = {}
  for name, entry in entries:
    if entry["dtype"] not in _SAFETENSORS:
      raise _unreadable(
        path, f"holds {name} as {entry['dtype']}; readable are {', '.join(_SAFETENSORS)}"
      )
    dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
    tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
  return tensors


def _read_zip(path, file):
  left = os.fstat(file.fileno()).st_size

  def read(name):
    nonlocal left
    left -= archive.getinfo(name).file_size
    if left < 0:  # zeros take a thousandth, and members may share their bytes
      raise _unreadable(path, "is compressed, as no file of torch.save is: save it again")
    return archive.read(name)

  try:
    with arrays.open_zip(file) as archive:
      names = archive.namelist()
      # All lie in one folder, called as the file was when it was written.
      root = next((name[:-8] for name in names if name.endswith("/data.pkl")), None)
      if root is None:
        raise _unreadable(path, "is a zip archive, but not of torch.save: it has no data.pkl")
      if f"{root}constants.pkl" in names:
        raise _unreadable(path, "is a TorchScript program, not a state dict")
      if f"{root}byteorder" in names and read(f"{root}byteorder") != b"little":
        raise _unreadable(path, "has the bytes of a big-endian machine; only little can be read")
      storages = {}
      structure = _unpickle(path, io.BytesIO(read(f"{root}data.pkl")), storages)
      data = {key: read(f"{root}data/{key}") for key in storages}  # checks their CRC, too
  except (zipfile.BadZipFile, zlib.error, OSError, KeyError, EOFError, RuntimeError) as error:
    raise _damaged(path, error) from error
  return _build(path, structure, data)


def _read_stream(path, file):
  storages = {}
  _unpickle(path, file, {})  # the magic number
  version, machine = _unpickle(path, file, {}), _unpickle(path, file, {})
  if version != _STREAM_VERSION or not isinstance(machine, dict):
    raise _unreadable(path, f"is a torch.save stream of version {version!r}, not {_STREAM_VERSION}")
  if not machine.get("little_endian", True):
    raise _unreadable(path, "has the bytes of a big-endian machine; only little can be read")
  structure, keys = _unpickle(path, file, storages), _unpickle(path, file, {})
  if not isinstance(keys, list) or {str(key) for key in keys} != set(storages):
    raise _damaged(path, "its list of storages is not that of its tensors")
  data, size = {}, os.fstat(file.fileno()).st_size
  for key in map(str, keys):
    header = file.read(8)
    numel = struct.unpack("<q", header)[0] if len(header) == 8 else -1
    if not 0 <= numel * storages[key].itemsize <= size - file.tell():
      raise _damaged(path, "it ends within a storage")
    data[key] = file.read(numel * storages[key].itemsize)
  return _build(path, structure, data)


class _Refused(Exception):
  """A global that no state dict needs."""


# Tuples, so that a pickle cannot change them once they are made.
class _Storage(NamedTuple):
  """A run of elements, of which tensors are views; its bytes are read later."""

  key: str
  dtype: np.dtype


class _Tensor(NamedTuple):
  """A view, with the offset and the strides in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
  """Unpickles into dicts, lists, plain values and `_Tensor`s; runs none of the file's code."""

  def __init__(self, file, storages):
    super().__init__(file, encoding="utf-8")  # of Python 2's strings
    self.storages = storages  # {key: dtype}, filled as tensors name them
    # New objects in each file: whatever a pickle does to them ends with its reading.
    self.globals = {
      "collections.OrderedDict": type("Dict", (dict,), {}),
      "argparse.Namespace": type("Namespace", (dict,), {"__setstate__": dict.update}),
      "torch._utils._rebuild_tensor_v2": lambda *args: _tensor(*args[:4]),
      "torch._utils._rebuild_parameter": lambda data, *_: data,
      "torch.Size": lambda size=(): tuple(size),
      **{f"torch.{name}": f"torch.{name}" for name in _STORAGES},
    }

  def find_class(self, module, name):
    if f"{module}.{name}" not in self.globals:
      raise _Refused(f"{module}.{name}")
    return self.globals[f"{module}.{name}"]

  def persistent_load(self, pid):
    kind, storage_type, key, _, _, *view = pid
    if kind != "storage" or any(part is not None for part in view):
      raise ValueError(f"unknown reference {pid}")
    storage = _Storage(str(key), np.dtype(_STORAGES[storage_type.removeprefix("torch.")]))
    self.storages[storage.key] = storage.dtype
    return storage


def _unpickle(path, file, storages):
  try:
    return _Unpickler(file, storages).load()
  except _Refused as error:
    raise _unreadable(
      path,
      f"is not read: its pickle names {error}, which no state dict needs and which could run any "
      "code. Where you trust the file, save its state_dict() alone with PyTorch",
    ) from error
  # A damaged pickle can fail in every way there is.
  except Exception as error:
    raise _damaged(path, error) from error


def _tensor(storage, offset, shape, strides):
  tensor = _Tensor(storage, offset, tuple(shape), tuple(strides))
  numbers = (tensor.offset, *tensor.shape, *tensor.strides)
  if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
    raise ValueError(f"no tensor: {tensor}")
  return tensor


def _build(path, saved, data, depth=0, count=None):
  """What was saved, with arrays in place of tensors."""
  count = itertools.count() if count is None else count
  if next(count) > _MOST_VALUES:  # a few lists that each hold the next one twice are as many
    raise _unreadable(path, f"holds more than {_MOST_VALUES} values, as no state dict does")
  if isinstance(saved, _Tensor):
    return _array(path, saved, data[saved.storage.key])
  if isinstance(saved, _Storage):
    raise _unreadable(path, "holds a storage that is no tensor's")
  if depth > 50:  # also a dict that holds itself
    raise _unreadable(path, "nests its dicts too deeply")
  if isinstance(saved, dict):
    return {key: _build(path, value, data, depth + 1, count) for key, value in saved.items()}
  if isinstance(saved, list | tuple):
    return type(saved)([_build(path, value, data, depth + 1, count) for value in saved])
  return saved


def _array(path, tensor, data):
  (_, dtype), offset, shape, strides = tensor
  if not math.prod(shape):
    return np.empty(shape, dtype)
  elements = len(data) // dtype.itemsize
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if last >= elements:
    raise _damaged(path, f"a tensor of shape {shape} reaches beyond its {elements} stored elements")
  flat = np.frombuffer(data, dtype, elements)[offset:]
  strides = [stride * dtype.itemsize for stride in strides]
  try:
    # No copy: with strides of 0, a shape can promise what no memory holds.
    return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)
  except ValueError as error:
    raise _damaged(path, f"a tensor of shape {shape}: {error}") from error


def _looks_like(head):
  start = head.lstrip().lower()
  if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
    return "is a web page"
  if start.startswith(b"version https://"):
    return "is a Git LFS pointer, not the file it points to"
  return f"begins with {head[:8]!r}" if head else "is empty"


def _damaged(path, cause):
  line = str(cause).strip().partition("\n")[0]
  if isinstance(cause, Exception):
    line = f"{type(cause).__name__}: {line}"
  return _unreadable(path, f"is cut short or damaged ({line})")


def _unreadable(path, reason):
  size = path.stat().st_size
  return ValueError(f"{path} ({size} bytes) {reason}. Download it again, or name another file.")

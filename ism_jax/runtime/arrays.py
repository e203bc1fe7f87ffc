"""Arrays in npz and npy files. Their headers are read first, so that nothing is read for nothing.

A zip of a few kilobytes can hold gigabytes of zeros, and a header can promise anything: whoever
needs an array looks at its shape before he reads it.
"""

from collections.abc import Iterator
import contextlib
import errno
import io
import lzma
import math
import struct
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from ism_jax.runtime import files

_ZIP = b"PK\x03\x04"  # how a zip begins
_MOST_HEADER = 2**14  # bytes; NumPy reads no header of more than 10,000
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, struct.error)


class Header(NamedTuple):
  """An array in a file that has not been read."""

  name: str  # without .npy; "" in an npy file
  shape: tuple[int, ...]
  dtype: np.dtype
  fortran_order: bool
  offset: int  # of the elements in the file, or the member of the zip


def headers(path) -> dict[str, Header]:
  """{name: header} of the arrays of an npz file, or {"": header} of an npy file.

  Raises:
    OSError: there is no such file, or it is no regular one.
    ValueError: it is damaged, or no file of arrays of numbers.
  """
  with _damage_as_value_error(path), files.open_regular(path) as file:
    if file.read(len(_ZIP)) != _ZIP:  # which one that has lost its end has, too
      size = file.seek(0, io.SEEK_END)
      file.seek(0)
      return {"": _header(path, "", file, size)}
    with open_zip(file) as archive:
      members = [m for m in archive.infolist() if m.filename[1:].endswith(".npy")]
      arrays = {}
      for member in members:
        name = member.filename.removesuffix(".npy")
        with archive.open(member) as content:
          arrays[name] = _header(path, name, content, member.file_size)
      return arrays


@contextlib.contextmanager
def opened(path, array: Header) -> Iterator[io.BufferedIOBase]:
  """A file from which the elements are read; damage is a ValueError, also inside.

  So are objects: they are pickles, of which no code is ever run.
  """
  if array.dtype.hasobject or not array.dtype.itemsize:
    raise ValueError(f"{array.name} in {path} is {array.dtype}; needed is an array of numbers.")
  with _damage_as_value_error(path), contextlib.ExitStack() as stack:
    file = stack.enter_context(files.open_regular(path))
    if array.name:
      archive = stack.enter_context(open_zip(file))
      file = stack.enter_context(archive.open(f"{array.name}.npy"))
    if len(file.read(array.offset)) < array.offset:
      raise EOFError("it ends in a header")
    yield file


def read(path, array: Header) -> np.ndarray:
  """All elements; read-only."""
  with opened(path, array) as file:
    needed = math.prod(array.shape) * array.dtype.itemsize
    content = file.read(needed)
    if len(content) < needed:
      raise EOFError(f"{array.name} has {len(content)} bytes of {needed}")
  order = "F" if array.fortran_order else "C"
  return np.ndarray(array.shape, array.dtype, content, order=order)


def _header(path, name, file, size) -> Header:
  """The header of an array in `file`, which has `size` bytes with it."""
  where = f"{name}.npy in {path}" if name else str(path)
  start = io.BytesIO(file.read(_MOST_HEADER))
  try:
    version = np.lib.format.read_magic(start)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran_order, dtype = read_header(start)
    if min(shape, default=0) < 0:
      raise ValueError(f"its shape is {shape}")
  except Exception as error:  # a header is a literal of Python's, which fails in many ways
    if isinstance(error, _DAMAGE):
      raise
    raise ValueError(
      f"{where} is no array of NumPy's, or its header is damaged ({error}): needed is an npz or "
      "an npy file of numbers."
    ) from error
  needed = start.tell() + math.prod(shape) * dtype.itemsize
  if size != needed and not dtype.hasobject:
    raise ValueError(
      f"{where} is truncated or damaged: {size} bytes, and an array of shape {shape} has {needed}. "
      "Fetch or write it again."
    )
  return Header(name, shape, dtype, fortran_order, start.tell())


def open_zip(file) -> zipfile.ZipFile:
  """The zip archive in a file; whatever is wrong with it is a `zipfile.BadZipFile`."""
  try:
    return zipfile.ZipFile(file)
  except (ValueError, OverflowError, struct.error) as error:  # of places and names that cannot be
    raise zipfile.BadZipFile(str(error)) from error


@contextlib.contextmanager
def _damage_as_value_error(path):
  try:
    yield
  except (*_DAMAGE, OSError) as error:
    # Places before the beginning of a file are invalid arguments, which have no name.
    if isinstance(error, OSError) and (error.errno, error.filename) != (errno.EINVAL, None):
      raise
    damage = f"{path} is truncated or damaged: {error}"
    raise ValueError(f"{damage}. Fetch or write it again.") from error

"""Files that are written whole or not at all, their checksums, and tables to put into them."""

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import secrets
import stat
import tempfile
import urllib.parse

from etils import epath
import jax

_MOST_JSON = 2**28  # bytes: no manifest or report comes near
_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a FIFO",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
}


def as_dict(config) -> dict:
  """A ConfigDict as a plain dict that JSON can hold."""
  return json.loads(config.to_json())


def markdown_table(header: list[str], lines: list[list[str]]) -> list[str]:
  """The lines of a Markdown table, with an empty one after it."""
  row = lambda cells: f"| {' | '.join(cells)} |"
  return [row(header), "|---" * len(header) + "|", *map(row, lines), ""]


def open_regular(path):
  """Opens a file to read bytes. An OSError for any other kind, which is never opened.

  Opening a FIFO waits for a writer, and what a device gives may never end.
  """
  kind = stat.S_IFMT(os.stat(path).st_mode)
  if kind != stat.S_IFREG:
    reason = f"{_KINDS.get(kind, 'of another kind')}, and no regular file"
    raise OSError(errno.EINVAL, reason, os.fspath(path))
  return open(path, "rb")


def read_json(path, needed, remedy: str) -> dict:
  """The object in a file of JSON; `path` may have a scheme, such as gs://.

  Args:
    needed: the shape that it must have, see `parse_json`.
    remedy: what to do about a file of another shape.
  Raises:
    OSError: there is no such file, or it cannot be read.
    ValueError: it is damaged, or is another file; names what is wrong with it, and the remedy.
  """
  path = os.fspath(path)
  with epath.Path(path).open("rb") if "://" in path else open_regular(path) as file:
    content = file.read(_MOST_JSON + 1)
  try:
    if len(content) > _MOST_JSON:
      raise ValueError(f"it has more than {_MOST_JSON} bytes")
    return parse_json(content, path, needed)
  except ValueError as error:
    raise ValueError(f"{error} {remedy}") from error.__cause__


def parse_json(content: str | bytes, source: str, needed):
  """What a text of JSON says, if it has the shape that is needed.

  Args:
    source: where the text is from, for the ValueError.
    needed: of an object, {key: shape of its value}, where other keys are allowed; of one with any
      keys, {str: shape of every value}; of a list, [shape of every element]; else the type.
  """
  try:
    if isinstance(content, bytes):
      content = content.decode()
    value = json.loads(content)
    check_shape(value, needed, "it")
  except (ValueError, RecursionError) as error:  # no UTF-8, and no JSON, are ValueErrors
    reason = str(error).partition("\n")[0]
    raise ValueError(f"{source} is damaged, or another file: {reason}.") from error
  return value


def check_shape(value, needed, name: str) -> None:
  """Raises ValueError unless a value of JSON, called by this name, has the shape; see above."""
  kind = {dict: dict, list: list}.get(type(needed), needed)
  kind = int | float if kind is float else kind
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    is_one = "an object" if isinstance(value, dict) else type(value).__name__
    wanted = "an object" if kind is dict else getattr(kind, "__name__", kind)
    raise ValueError(f"{name} is {is_one}, not {wanted}")
  if isinstance(needed, dict):
    for key, shape in needed.items():
      if key is str:
        for each, element in value.items():
          check_shape(element, shape, f"{name}[{each!r}]")
      elif key not in value:
        raise ValueError(f"{name} has no {key!r}")
      else:
        check_shape(value[key], shape, key if name == "it" else f"{name}.{key}")
  elif isinstance(needed, list):
    for i, element in enumerate(value):
      check_shape(element, needed[0], f"{name}[{i}]")


def local_path(path) -> str:
  """A path as its user means it: ~ and ~name are homes, file:///x is /x, and others are themselves.

  Commands, configs and `api` take all their paths through this.

  Raises:
    ValueError: there is no such home, or file:// names another machine.
  """
  path = os.fspath(path)
  if path.startswith("file:"):
    host, slash, rest = path.removeprefix("file:").removeprefix("//").partition("/")
    if host not in ("", "localhost") or not slash:
      raise ValueError(f"{path} is no file of this machine: write file:///FOLDER or /FOLDER.")
    return urllib.parse.unquote(slash + rest)
  expanded = os.path.expanduser(path)
  if expanded.startswith("~"):
    home = expanded.partition("/")[0]
    raise ValueError(
      f"{path}: there is no home {home}. Write the whole path; a name that begins with ~ is "
      f"./{home}."
    )
  return expanded


def sha256(path) -> str:
  """The checksum of a file, in hex."""
  with open_regular(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_utf8(name: str, path: str) -> None:
  """Raises ValueError for a path, the value of `name`, that libraries in C++ cannot take."""
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name}={os.fspath(path)!r} has bytes that are no UTF-8: rename the folder, or name another."
    ) from error


def check_writable(folder) -> None:
  """Raises OSError unless `folder` can be made and written; leaves nothing behind."""
  folder = os.fspath(folder)
  if "://" in folder:
    _check_writable_object(folder)
    return
  if not folder:
    raise OSError("the name of a folder is empty; name one, or . for the current one.")
  folder = existing = os.path.abspath(folder)
  while not os.path.exists(existing):
    existing = os.path.dirname(existing)
  # Writing is the test: permission bits say nothing about read-only mounts, quotas or root.
  try:
    tempfile.TemporaryFile(dir=existing).close()
  except OSError as e:
    raise OSError(f"{folder} cannot be written ({e.strerror}); name a folder that can.") from e


def _check_writable_object(folder: str) -> None:
  try:
    probe = epath.Path(folder) / f".writing-{secrets.token_hex(8)}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
  except Exception as e:  # each storage has errors of its own
    raise OSError(
      f"{folder} cannot be written ({type(e).__name__}: {e}); name a folder that can."
    ) from e
  with contextlib.suppress(Exception):  # who may write need not be allowed to remove
    probe.unlink()


def check_file(path, suffix: str) -> None:
  """Raises unless a file can be made or replaced at `path`, whose name ends in `suffix`.

  Raises:
    ValueError: it has another suffix.
    OSError: a folder is there, or its own folder cannot be written.
  """
  path = os.fspath(path)
  if not path.endswith(suffix):
    raise ValueError(f"{path} does not end in {suffix}, as the file that is written there must.")
  if os.path.isdir(path):
    raise IsADirectoryError(f"{path} is a folder; name a file in it, or another one.")
  folder, _, _ = path.rpartition("/")
  check_writable(folder if "://" in path else os.path.dirname(os.path.abspath(path)))


@contextlib.contextmanager
def whole_file(path) -> Iterator[str]:
  """A temporary file to write to, which is at `path` once the block has ended without an error.

  A reader sees all of it or none. Of several writers at once the last one's file stays.
  """
  path = os.path.abspath(path)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  # Renaming is atomic, within one file system, and replaces no folder that has something in it.
  with tempfile.TemporaryDirectory(prefix=".writing-", dir=os.path.dirname(path)) as folder:
    temporary = os.path.join(folder, os.path.basename(path))
    yield temporary
    for file in pathlib.Path(folder).rglob("*"):
      if file.is_file():
        with open(file, "rb") as f:
          os.fsync(f.fileno())
    os.replace(temporary, path)


def check_empty(path) -> None:
  """Raises OSError unless a folder can be made at `path`: no bucket, and nothing in it yet."""
  path = os.fspath(path)
  if "://" in path:
    raise OSError(f"{path} is no folder: name one, and copy it to the bucket.")
  folder = pathlib.Path(path)
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise FileExistsError(f"{path} is there and not empty; name another folder, or remove it.")
  if os.path.ismount(path):
    raise OSError(f"{path} is a mount, which cannot be replaced; name a folder in it.")
  check_writable(os.path.dirname(os.path.abspath(path)))  # where it is made, and then renamed


@contextlib.contextmanager
def whole_folder(path) -> Iterator[pathlib.Path]:
  """A folder as `whole_file`, to write files into; raises as `check_empty` does."""
  check_empty(path)
  with whole_file(path) as folder:
    os.mkdir(folder)
    yield pathlib.Path(folder)


def write_whole(path, data: str | bytes) -> None:
  """Writes a file that is either all there or not there, from the first process alone."""
  if jax.process_index() == 0:
    write_here(path, data)


def write_here(path, data: str | bytes) -> None:
  """Writes a file that is either all there or not there, from this process."""
  if isinstance(data, str):
    data = data.encode(errors="backslashreplace")  # names of files need not be UTF-8
  path = os.fspath(path)
  if "://" in path:  # an object store shows an object once it is whole
    epath.Path(path).write_bytes(data)
    return
  with whole_file(path) as temporary, open(temporary, "wb") as f:
    f.write(data)

"""Where the weights of a published network come from: a named file, a cache, or a download.

The cache is the folder $ISM_JAX_CACHE, or ~/.cache/ism_jax. A file that was put there by hand, for
machines without network, is used as if it had been downloaded. Files of the Hugging Face hub may
lie there too, or in the hub's own cache, where downloading puts them.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import urllib.request

from absl import logging
from huggingface_hub import hf_hub_download
import jax

from ism_jax import files

CACHE = "ISM_JAX_CACHE"
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Published:
  """A file of weights that anyone can download.

  Attributes:
    what: what it holds, for messages: "FID Inception".
    file: its name in the cache.
    sha256: its checksum in hex, or as many first digits as are known, at least 8.
    url: where it is; or
    repository, member: the name on the Hugging Face hub, and the file there.
  """

  what: str
  file: str
  sha256: str
  url: str = ""
  repository: str = ""
  member: str = ""

  def __post_init__(self):
    if not re.fullmatch(r"[0-9a-f]{8,64}", self.sha256):
      raise ValueError(f"sha256={self.sha256!r} must be 8 to 64 hex digits, lower case.")
    if bool(self.url) == bool(self.repository) or bool(self.repository) != bool(self.member):
      raise ValueError(
        f"{self.file} needs a url or else a repository and its member; got url={self.url!r}, "
        f"repository={self.repository!r}, member={self.member!r}."
      )

  @property
  def page(self) -> str:
    """Where a reader can download it by hand."""
    return self.url or f"https://huggingface.co/{self.repository}/resolve/main/{self.member}"


def cache() -> pathlib.Path:
  """The folder in which downloaded weights are kept."""
  return pathlib.Path(os.environ.get(CACHE) or "~/.cache/ism_jax").expanduser()


def sha256_of_params(params) -> str:
  """The checksum of weights that come from no file, a pytree of NumPy arrays, in hex."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(leaf.tobytes())
  return digest.hexdigest()


def find(name: str, published: Published) -> pathlib.Path:
  """The file of weights that a name stands for, downloaded where there is none yet.

  Args:
    name: of a file, whatever its checksum; or "" for the published weights.
  Raises:
    FileNotFoundError: the file is not there, or cannot be downloaded; says what to download from
      where, and where to put it.
    ValueError: the cached or downloaded file has another checksum than the published one.
  """
  if name:
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
      raise _absent(published, f"there is no file {name!r}")
    return path
  path = cache() / published.file
  if not path.is_file():
    path = _download(published, path)
  found = files.sha256(path)
  if not found.startswith(published.sha256):
    raise ValueError(
      f"{path} ({path.stat().st_size} bytes) is not the published file of {published.what} "
      f"weights: its sha256 is {found}, not {published.sha256}. Delete it and download "
      f"{published.page} to {cache() / published.file}, or pass its name if it is what you want."
    )
  return path


def _download(published, path):
  try:
    if published.repository:  # the hub's cache, which works offline, or else the hub
      return pathlib.Path(hf_hub_download(published.repository, published.member))
    with files.whole_file(path) as temporary:
      logging.info("Downloading %s to %s.", published.page, path)
      whole = pathlib.Path(temporary)
      _fetch(published.url, whole)
      if not (found := files.sha256(whole)).startswith(published.sha256):
        raise OSError(f"it gave {whole.stat().st_size} bytes of sha256 {found}")
    return path
  # No network, a full disk, a page that is gone: the libraries' errors have no base in common, and
  # the remedy is the same for all.
  except Exception as error:
    cause = error.__cause__ or error  # the hub's own says only that something went wrong
    line = str(cause).strip().partition("\n")[0]
    raise _absent(published, f"the download failed ({type(cause).__name__}: {line})") from error


def _fetch(url, path):
  with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as file:
    size = int(response.headers.get("Content-Length") or 0)
    done, told = 0, 0
    while chunk := response.read(_CHUNK):
      file.write(chunk)
      done += len(chunk)
      if size and done * 10 // size > told:
        told = done * 10 // size
        logging.info("%d%% of %.0f MB.", 10 * told, size / 1e6)
    if done < size:
      raise OSError(f"it broke off after {done} of {size} bytes")


def _absent(published, reason):
  return FileNotFoundError(
    f"no {published.what} weights: {reason}. Download {published.page} to "
    f"{cache() / published.file} (${CACHE} names another folder), or pass the name of the file."
  )

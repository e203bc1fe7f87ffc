"""Networks as people name them: a file or folder, "digits", or a repository of the hub.

Of the Hugging Face hub, all that one may have at hand is understood: OWNER/NAME,
OWNER/NAME@REVISION, hf://OWNER/NAME[@REVISION][/FILE], and the address of a page of the repository
or of its files. What is on this machine comes first; "digits" is a small network in this package.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
import queue
import re
import threading
from typing import NamedTuple
import urllib.parse

from absl import logging
from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

from ism_jax.pretrained.weights import cause_of

SECONDS = 10  # that the hub may take to answer
SCHEMES = ("http://", "https://", "hf://")
LOGIN = "`hf auth login`, or a token of it as $HF_TOKEN"
SHIPPED = {"digits": pathlib.Path(__file__).with_name("digits")}  # what comes with this package
_NAME = r"(?!(?:datasets|spaces|models)/)\w[\w.-]*/\w[\w.-]*"
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # names of files


class Repository(NamedTuple):
  """A repository of the hub.

  Attributes:
    name: OWNER/NAME.
    revision: a branch, tag or commit; None for the main branch.
    file: of weights within it; "" for the whole.
  """

  name: str
  revision: str | None = None
  file: str = ""

  @property
  def page(self) -> str:
    """Its address."""
    revision = f"/tree/{urllib.parse.quote(self.revision, safe='')}" if self.revision else ""
    return f"{constants.ENDPOINT}/{self.name}{revision}"


def parse(source: str) -> Repository | None:
  """The repository that a source names, whether or not it exists; None of what can only be a path.

  Raises:
    ValueError: it is an address, but none of a repository of models.
  """
  address = re.split("[?#]", source.strip())[0].rstrip("/")
  hosts = "|".join(
    re.escape(host.partition("://")[2] or host)
    for host in ("huggingface.co", "www.huggingface.co", "hf.co", constants.ENDPOINT)
  )
  revision = r"@((?:refs/\w+/)?[^/]+)"
  if page := re.fullmatch(rf"(?:https?://)?(?:{hosts})/({_NAME})(?:/(.*))?", address):
    name, rest = page.groups()
    part = re.fullmatch(r"(?:tree|blob|resolve|raw)/([^/]+)(?:/(.*))?", rest or "")
    revision, file = part.groups() if part else (None, "")
  elif uri := re.fullmatch(rf"hf://(?:models/)?({_NAME})(?:{revision})?(?:/(.*))?", address):
    name, revision, file = uri.groups()
  elif re.match(rf"(https?|hf)://|({hosts})/", address):
    raise ValueError(
      f"{source} is no repository of models: those are {constants.ENDPOINT}/OWNER/NAME, or "
      "hf://OWNER/NAME, or OWNER/NAME alone, and behind it perhaps @REVISION."
    )
  elif plain := re.fullmatch(rf"({_NAME})(?:{revision})?", address):
    name, revision, file = *plain.groups(), ""
    if name.endswith(_WEIGHTS):
      return None
  else:
    return None
  file = urllib.parse.unquote(file or "")
  revision = revision and urllib.parse.unquote(revision)
  return Repository(name, revision, file if file.endswith(_WEIGHTS) else "")


def find(
  source: str, files: Sequence[str | tuple[str, ...]], *, what: str, remedy: str
) -> pathlib.Path:
  """The file or folder that a source names, on this machine.

  A repository's is in the hub's cache, which is read alone where the hub cannot be reached.

  Args:
    source: a path, or what `parse` understands.
    files: that are needed of a repository, as far as it has them; of a tuple the first that it has.
    what: what should be there, for errors: "weights".
    remedy: a sentence for errors: what else to name.
  Returns:
    The path; a repository's folder, or its file where `source` names one.
  Raises:
    FileNotFoundError: there is nothing at `source`, or it cannot be had; says why.
    ValueError: see `parse`.
  """
  path = pathlib.Path(source).expanduser()
  if path.exists() or source in SHIPPED:
    return path if path.exists() else SHIPPED[source]
  missing = lambda reason: absent(source, reason, what=what, remedy=remedy)
  repository = parse(source)
  if repository is None:
    raise missing("there is no such file or folder")
  name, revision, file = repository
  choices = [(f,) if isinstance(f, str) else f for f in [*files, *filter(None, [file])]]
  api = HfApi()
  neither = "" if "://" in source else "there is no such folder, and "

  listing = functools.partial(api.model_info, name, revision=revision, timeout=SECONDS)
  try:
    about = within(SECONDS, listing)  # DNS and proxies know no timeouts
    there = {sibling.rfilename for sibling in about.siblings or ()}
    logging.info("Reading %s from the Hugging Face hub, commit %s.", name, about.sha)
    wanted = [f for choice in choices if (f := next(filter(there.__contains__, choice), None))]
    paths = {f: api.hf_hub_download(name, f, revision=revision) for f in wanted}
  except errors.GatedRepoError as error:
    raise missing(
      f"{repository.page} is for those who have accepted its conditions: do so there, and log in "
      f"({LOGIN})"
    ) from error
  except errors.RevisionNotFoundError as error:
    raise missing(f"{constants.ENDPOINT}/{name} has no revision {revision!r}") from error
  except errors.RepositoryNotFoundError as error:
    raise missing(
      f"{neither}no such repository on the Hugging Face hub, unless it is private: then log in as "
      f"somebody who may read it ({LOGIN})"
    ) from error
  # No network, a full disk, a download that breaks off: the hub's errors have no base in common,
  # and the remedy is the same for all.
  except Exception as error:
    cached = {f: try_to_load_from_cache(name, f, revision=revision) for c in choices for f in c}
    paths = {f: path for f, path in cached.items() if isinstance(path, str)}
    if not paths:
      raise missing(
        f"{neither}the Hugging Face hub did not give {repository.page} ({cause_of(error)}). "
        f"Name it on a machine with network: it is then kept in {constants.HF_HUB_CACHE}, which "
        "can be copied from there"
      ) from error
    copy = "The Hugging Face hub did not give %s (%s): reading the copy in %s."
    logging.warning(copy, name, cause_of(error), constants.HF_HUB_CACHE)
  if file:
    if file not in paths:
      raise missing(f"{repository.page} has no file {file}")
    return pathlib.Path(paths[file])
  if not paths:
    raise missing(f"{repository.page} has no {' and no '.join(map(' or '.join, choices))}")
  first, path = next(iter(paths.items()))
  return pathlib.Path(path).parents[first.count("/")]


def absent(source: str, reason: str, *, what: str, remedy: str) -> FileNotFoundError:
  """The error of `find`, for what it has found and its caller has not."""
  return FileNotFoundError(f"no {what} under {source!r}: {reason}. {remedy}")


def within(seconds: float, function: Callable):
  """function(), in a thread that is left behind if it takes longer; raises TimeoutError then."""
  results = queue.SimpleQueue()

  def call():
    try:
      results.put((function(), None))
    except BaseException as error:
      results.put((None, error))

  threading.Thread(target=call, daemon=True).start()
  try:
    result, error = results.get(timeout=seconds)
  except queue.Empty:
    raise TimeoutError(f"no answer within {seconds} seconds") from None
  if error is not None:
    raise error
  return result

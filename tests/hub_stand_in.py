"""A stand-in of the Hugging Face hub's HTTP interface, on the loopback."""

import collections
import contextlib
import hashlib
import http.server
import json
import socket
import threading
import urllib.parse

import huggingface_hub
import pytest


class Hub:
  """What it holds and what it was asked.

  Attributes:
    repositories: {OWNER/NAME: {revision: {file: bytes}}}.
    private, gated: names of repositories for those with `token` alone.
    requests: [(method, path)].
  """

  token = "hf_secret"

  def __init__(self):
    self.repositories = collections.defaultdict(dict)
    self.private, self.gated, self.requests = set(), set(), []

  def commit(self, name, revision) -> str:
    """The hash of what a revision holds."""
    files = self.repositories[name][revision]
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

  def revision(self, name, revision):
    """The revision that a branch or a commit names, or None."""
    known = self.repositories[name]
    return next((r for r in known if revision in (r, self.commit(name, r))), None)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def answer(self, status, body=b"", **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in ({"Content-Length": len(body)} | headers).items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def refuse(self, status, code):
    self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

  def do_GET(self):
    hub, path = self.server.hub, urllib.parse.urlsplit(self.path).path
    hub.requests.append((self.command, path))
    listing = path.startswith("/api/models/")
    parts = map(urllib.parse.unquote, path.removeprefix("/api/models/").strip("/").split("/"))
    owner, name, *rest = parts
    name, rest = f"{owner}/{name}", rest or ["revision", "main"]
    knows_us = self.headers.get("Authorization") == f"Bearer {hub.token}"
    if name not in hub.repositories or (name in hub.private and not knows_us):
      return self.refuse(401, "RepoNotFound")
    if name in hub.gated and not knows_us and not listing:
      return self.refuse(403, "GatedRepo")
    revision = hub.revision(name, rest[1])
    if revision is None:
      return self.refuse(404, "RevisionNotFound")
    files, commit = hub.repositories[name][revision], hub.commit(name, revision)
    if listing:
      siblings = [{"rfilename": file} for file in files]
      return self.answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings})
    file = "/".join(rest[2:])
    if file not in files:
      return self.refuse(404, "EntryNotFound")
    digest = hashlib.sha256(files[file]).hexdigest()
    return self.answer(200, files[file], X_Repo_Commit=commit, ETag=f'"{digest}"')

  do_HEAD = do_GET


@contextlib.contextmanager
def serve(cache):
  """A `Hub` in place of the real one, with its own cache, while the block lasts."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  server.hub, server.daemon_threads = Hub(), True
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  try:
    with in_place_of_the_hub(f"http://127.0.0.1:{server.server_port}", cache):
      yield server.hub
  finally:
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def serve_silence(cache):
  """A hub that takes connections and never answers, while the block lasts."""
  with contextlib.ExitStack() as stack:
    port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
    stack.enter_context(in_place_of_the_hub(f"http://127.0.0.1:{port}", cache))
    yield


@contextlib.contextmanager
def in_place_of_the_hub(address, cache):
  """The address of the hub, with a cache and no token, while the block lasts."""
  constants = huggingface_hub.constants
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(constants, "ENDPOINT", address)
    files = "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + files)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.delenv("HF_TOKEN", raising=False)
    yield

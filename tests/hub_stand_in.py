"""A stand-in of the Hugging Face hub's HTTP interface, on the loopback."""

import base64
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
    lfs: {sha256: bytes} of large files.
    requests: [(method, path)].
  """

  token = "hf_secret"

  def __init__(self):
    self.repositories = collections.defaultdict(dict)
    self.private, self.gated, self.requests, self.lfs = set(), set(), [], {}

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
    if path == "/api/whoami-v2":
      if self.headers.get("Authorization") != f"Bearer {hub.token}":
        return self.refuse(401, "InvalidToken")
      return self.answer(200, {"name": "someone", "type": "user", "orgs": [{"name": "lab"}]})
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
      about = {"id": name, "modelId": name, "sha": commit, "private": name in hub.private}
      return self.answer(200, about | {"siblings": siblings})
    file = "/".join(rest[2:])
    if file not in files:
      return self.refuse(404, "EntryNotFound")
    digest = hashlib.sha256(files[file]).hexdigest()
    return self.answer(200, files[file], X_Repo_Commit=commit, ETag=f'"{digest}"')

  do_HEAD = do_GET

  def do_POST(self):
    hub, path = self.server.hub, urllib.parse.urlsplit(self.path).path
    hub.requests.append((self.command, path))
    lines = self.read().splitlines()
    asked = json.loads(lines[0]) if lines else {}
    if self.headers.get("Authorization") != f"Bearer {hub.token}" and path != "/api/validate-yaml":
      return self.refuse(401, "InvalidToken")
    address = f"http://{self.headers['Host']}"
    name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
    if path == "/api/repos/create":
      name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
      status = 409 if name in hub.repositories else 200
      if status == 200:
        hub.repositories[name]["main"] = {}
        is_private = asked.get("private") or asked.get("visibility") == "private"
        hub.private |= {name} if is_private else set()
      return self.answer(status, {"url": f"{address}/{name}", "name": name})
    if path == "/api/validate-yaml":
      huggingface_hub.ModelCard(asked["content"])  # raises
      return self.answer(200, {"errors": [], "warnings": []})
    if path.endswith("/info/lfs/objects/batch"):
      upload = lambda o: {"upload": {"href": f"{address}/lfs/{o['oid']}", "header": {}}}
      objects = [o | {"actions": upload(o)} for o in asked["objects"] if o["oid"] not in hub.lfs]
      return self.answer(200, {"transfer": "basic", "objects": objects})
    if "/preupload/" in path:
      mode = lambda file: "lfs" if file.endswith(".safetensors") else "regular"
      described = lambda f: {"path": f, "uploadMode": mode(f), "shouldIgnore": False}
      return self.answer(200, {"files": [described(f["path"]) for f in asked["files"]]})
    if "/commit/" in path:
      files = hub.repositories[name]["main"]
      for value in (json.loads(line) for line in lines):
        kind, file = value["key"], value["value"]
        if kind == "file":
          files[file["path"]] = base64.b64decode(file["content"])
        elif kind == "lfsFile":
          files[file["path"]] = hub.lfs[file["oid"]]
      commit = hub.commit(name, "main")
      url = f"{address}/{name}/commit/{commit}"
      return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
    if "/tag/" in path:
      hub.repositories[name][asked["tag"]] = dict(hub.repositories[name]["main"])
      return self.answer(200, {})
    return self.refuse(404, "EntryNotFound")

  def do_PUT(self):
    hub = self.server.hub
    hub.requests.append((self.command, self.path))
    hub.lfs[self.path.removeprefix("/lfs/")] = self.read()
    self.answer(200)

  def read(self) -> bytes:
    """The request's body."""
    if "chunked" not in self.headers.get("Transfer-Encoding", ""):
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    body = b""
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body


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
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, of another server
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.delenv("HF_TOKEN", raising=False)
    yield

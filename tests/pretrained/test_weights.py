"""Weights from a file, the cache, and downloads of which many go wrong."""

import hashlib
import http.server
import pathlib
import pwd
import threading

import pytest

from ism_jax.pretrained import weights

DATA = bytes(range(256)) * 9000  # more than one read
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("ISM_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def server():
  """Serves DATA as /whole, and breaks off in the middle of /half; remembers what was asked for."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      if self.path not in ("/whole", "/half"):
        self.send_error(404)
        return
      self.send_response(200)
      self.send_header("Content-Length", str(len(DATA)))
      self.end_headers()
      self.wfile.write(DATA if self.path == "/whole" else DATA[: len(DATA) // 2])

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    served.url, served.asked = f"http://127.0.0.1:{served.server_port}", asked
    yield served
    served.shutdown()


def published(url="http://127.0.0.1:9/none", sha256=SHA256):
  return weights.Published(what="test", file="net.pth", sha256=sha256, url=url)


def test_a_download_is_stored_and_not_repeated(cache, server):
  for _ in range(2):
    path = weights.find("", published(f"{server.url}/whole"))
    assert path == cache / "net.pth" and path.read_bytes() == DATA
  assert server.asked == ["/whole"]
  assert [entry.name for entry in cache.iterdir()] == ["net.pth"]


@pytest.mark.parametrize(
  ("page", "sha256", "reason"),
  [
    ("half", SHA256, f"broke off after {len(DATA) // 2} of {len(DATA)} bytes"),
    ("whole", "0" * 64, f"gave {len(DATA)} bytes of sha256 {SHA256}"),
    ("gone", SHA256, "HTTPError: HTTP Error 404"),
  ],
)
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(
  cache, server, page, sha256, reason
):
  with pytest.raises(FileNotFoundError, match=reason) as error:
    weights.find("", published(f"{server.url}/{page}", sha256))
  assert f"Download {server.url}/{page} to {cache / 'net.pth'}" in str(error.value)
  assert "\n" not in str(error.value)
  assert not list(cache.iterdir())


def test_without_network_the_cache_serves_and_is_checked(cache):
  with pytest.raises(FileNotFoundError, match="no test weights: the download failed"):
    weights.find("", published())
  (cache / "net.pth").write_bytes(DATA)
  assert weights.find("", published()) == cache / "net.pth"
  (cache / "net.pth").write_bytes(DATA[1:])
  with pytest.raises(ValueError, match=f"not {SHA256}. Delete it and download http"):
    weights.find("", published())


def test_a_named_file_is_taken_as_it_is(cache, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "other.pth").write_bytes(b"other weights")
  assert weights.find("~/other.pth", published()) == tmp_path / "other.pth"
  with pytest.raises(FileNotFoundError, match=r"no file '~/nosuch\.pth'. Download http"):
    weights.find("~/nosuch.pth", published())
  assert not cache.exists(), "and nothing is downloaded in its place"


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch):
  monkeypatch.delenv("ISM_JAX_CACHE", raising=False)
  assert weights.cache() == pathlib.Path.home() / ".cache/ism_jax"


def test_a_user_without_a_home_has_a_cache_all_the_same(tmp_path, monkeypatch, server):
  for name in ("ISM_JAX_CACHE", "HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # as of a container's user
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  path = weights.find("", published(f"{server.url}/whole"))
  assert tmp_path in path.parents and path.read_bytes() == DATA


def test_a_cache_that_cannot_be_written_is_an_error_with_the_remedy(tmp_path, monkeypatch, server):
  (tmp_path / "file").touch()  # below which not even root can write
  monkeypatch.setenv("ISM_JAX_CACHE", str(tmp_path / "file" / "cache"))
  with pytest.raises(FileNotFoundError, match=r"download failed .*\$ISM_JAX_CACHE names another"):
    weights.find("", published(f"{server.url}/whole"))

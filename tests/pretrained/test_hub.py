"""Names of repositories, and files that come from them or from their copies."""

import pathlib
import shutil

import hub_stand_in
import huggingface_hub
import pytest

from ism_jax.pretrained import hub, sit, vae
from ism_jax.pretrained.hub import Repository

WANTED = {"what": "weights", "remedy": "Name others."}


@pytest.fixture
def server(tmp_path):
  with hub_stand_in.serve(tmp_path / "cache") as server:
    yield server


@pytest.mark.parametrize(
  ("source", "repository"),
  [
    ("someone/some.net", Repository("someone/some.net")),
    (" someone/net/ ", Repository("someone/net")),
    ("someone/net@v1.0", Repository("someone/net", "v1.0")),
    ("someone/net@refs/pr/7", Repository("someone/net", "refs/pr/7")),
    ("hf://someone/net", Repository("someone/net")),
    ("hf://models/someone/net@main", Repository("someone/net", "main")),
    ("hf://someone/net@v1/a/b.safetensors", Repository("someone/net", "v1", "a/b.safetensors")),
    ("https://huggingface.co/someone/net", Repository("someone/net")),
    ("huggingface.co/someone/net/", Repository("someone/net")),
    ("https://hf.co/someone/net?library=ism#use", Repository("someone/net")),
    ("https://huggingface.co/someone/net/tree/v1", Repository("someone/net", "v1")),
    (
      "https://huggingface.co/someone/net/tree/refs%2Fpr%2F7/in",
      Repository("someone/net", "refs/pr/7"),
    ),
    ("https://huggingface.co/someone/net/blob/main/README.md", Repository("someone/net", "main")),
    ("https://huggingface.co/someone/net/discussions", Repository("someone/net")),
    (
      "https://huggingface.co/someone/net/resolve/main/SiT-XL-2-256.pt?download=true",
      Repository("someone/net", "main", "SiT-XL-2-256.pt"),
    ),
    ("weights/vae.safetensors", None),
    ("./someone/net", None),
    ("/someone/net", None),
    ("net", None),
    ("a/b/c", None),
    ("gs://bucket/run", None),
  ],
)
def test_what_people_paste_is_a_repository_or_a_path(source, repository):
  assert hub.parse(source) == repository


@pytest.mark.parametrize(
  "address",
  [
    "https://huggingface.co/datasets/someone/images",
    "hf://spaces/someone/page",
    "https://huggingface.co/someone",
    "https://example.com/someone/net",
  ],
)
def test_an_address_of_something_else_says_what_one_of_a_model_is(address):
  with pytest.raises(ValueError, match=r"no repository of models: .*/OWNER/NAME.*@REVISION"):
    hub.find(address, ["a"], **WANTED)


def test_the_files_asked_for_come_from_the_revision_asked_for(server):
  both = {"net.pt": b"first", "in/config.json": b"{}", "huge.bin": b"unwanted"}
  server.repositories["someone/net"] = {"main": both | {"net.pt": b"second"}, "v1": both}
  server.repositories["someone/net"]["refs/pr/7"] = {"net.pt": b"third"}
  files = ["net.pt", "in/config.json", "absent.json"]
  for source, content in {
    "someone/net": b"second",
    "someone/net@v1": b"first",
    f"{huggingface_hub.constants.ENDPOINT}/someone/net/tree/v1": b"first",
    "hf://someone/net@refs/pr/7": b"third",
  }.items():
    folder = hub.find(source, files, **WANTED)
    assert (folder / "net.pt").read_bytes() == content, source
  assert (hub.find("someone/net", files, **WANTED) / "in/config.json").read_bytes() == b"{}"
  file = hub.find("hf://someone/net@v1/net.pt", [], **WANTED)
  assert file.name == "net.pt" and file.read_bytes() == b"first"
  assert not [path for _, path in server.requests if "huge" in path or "absent" in path]


def test_what_is_on_this_machine_comes_before_the_hub(server, tmp_path, monkeypatch):
  (tmp_path / "someone" / "net").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert hub.find("someone/net", ["a"], **WANTED) == pathlib.Path("someone/net")
  assert not server.requests


@pytest.mark.parametrize(
  ("source", "reason"),
  [
    ("someone/nothing", "no such repository on the Hugging Face hub, unless it is private"),
    ("someone/private", r"log in as somebody who may read it \(`hf auth login`, or a token"),
    ("someone/gated", r"/someone/gated is for those who have accepted its .* log in \(`hf auth"),
    ("someone/net@v2", r"/someone/net has no revision 'v2'"),
    ("someone/other", r"/someone/other has no net\.pt"),
    ("hf://someone/net/other.pt", r"/someone/net has no file other\.pt"),
    ("./someone/net", "there is no such file or folder"),
  ],
)
def test_what_the_hub_does_not_give_says_why_and_what_to_do(server, source, reason):
  for name in ("net", "gated", "private"):
    server.repositories[f"someone/{name}"]["main"] = {"net.pt": b"x"}
  server.repositories["someone/other"]["main"] = {"README.md": b"x"}
  server.gated, server.private = {"someone/gated"}, {"someone/private"}
  with pytest.raises(FileNotFoundError, match=reason) as error:
    hub.find(source, ["net.pt"], **WANTED)
  message = str(error.value)
  assert message.startswith(f"no weights under {source!r}: ") and message.endswith("Name others.")
  assert "\n" not in message


def test_a_token_opens_what_is_private(server, monkeypatch):
  server.repositories["someone/private"]["main"] = {"net.pt": b"x"}
  server.private = {"someone/private"}
  monkeypatch.setenv("HF_TOKEN", server.token)
  assert (hub.find("someone/private", ["net.pt"], **WANTED) / "net.pt").read_bytes() == b"x"


def test_a_hub_that_is_silent_or_away_gives_its_copy_or_says_so_at_once(tmp_path, monkeypatch):
  cache = tmp_path / "cache"
  with hub_stand_in.serve(cache) as server:
    server.repositories["someone/net"] = {"main": {"net.pt": b"x"}, "v1": {"net.pt": b"y"}}
    hub.find("someone/net", ["net.pt"], **WANTED)
  shutil.copytree(cache, tmp_path / "elsewhere", symlinks=True)
  monkeypatch.setattr(hub, "SECONDS", 0.1)
  away = hub_stand_in.in_place_of_the_hub("http://127.0.0.1:9", cache)
  for hub_of_today in (hub_stand_in.serve_silence(cache), away):
    with hub_of_today:
      assert (hub.find("someone/net", ["net.pt"], **WANTED) / "net.pt").read_bytes() == b"x"
      for load in (
        lambda: hub.find("someone/net@v1", ["net.pt"], **WANTED),
        lambda: vae.load("someone/vae"),
        lambda: sit.read("hf://someone/sit"),
      ):
        with pytest.raises(FileNotFoundError, match=r"hub did not give http.* \(\w+: ") as error:
          load()
        assert str(cache) in str(error.value)  # what to copy from another machine
  with hub_stand_in.serve_silence(tmp_path / "elsewhere"):
    assert (hub.find("someone/net", ["net.pt"], **WANTED) / "net.pt").read_bytes() == b"x"


def test_the_silence_of_a_hub_is_what_the_error_names(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, "SECONDS", 0.1)
  with (
    hub_stand_in.serve_silence(tmp_path),
    pytest.raises(FileNotFoundError, match=r"no answer within 0\.1 seconds|timed out"),
  ):
    hub.find("someone/net", ["net.pt"], **WANTED)

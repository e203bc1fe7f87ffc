"""Paths as users write them, and outputs that are checked before the work."""

import os

import pytest

from ism_jax.runtime import files


@pytest.fixture
def home(monkeypatch):
  monkeypatch.setenv("HOME", "/home of/someone")


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("~", "/home of/someone"),
    ("~/runs/a", "/home of/someone/runs/a"),
    ("~root/runs", os.path.expanduser("~root") + "/runs"),
    ("file:///runs/a%20b", "/runs/a b"),
    ("file://localhost/runs?", "/runs?"),
    ("file:/runs", "/runs"),
    ("gs://bucket/~/a", "gs://bucket/~/a"),
    ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
    ("./~", "./~"),
    ("runs/a,b=~", "runs/a,b=~"),
    ("", ""),
  ],
)
def test_a_path_is_what_its_user_means(home, path, expected):
  assert files.local_path(path) == expected


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("~nobody-of-this-name/runs", r"there is no home ~nobody-of-this-name\..*\./~nobody-of-this"),
    ("file://host/runs", "is no file of this machine: write file:///FOLDER"),
    ("file://runs", "is no file of this machine"),
  ],
)
def test_a_path_that_means_nothing_is_an_error(path, message):
  with pytest.raises(ValueError, match=message):
    files.local_path(path)


def test_what_cannot_be_written_is_an_error_that_leaves_nothing(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "folder.npz").mkdir()
  for name, message in {
    "x.png": r"x\.png does not end in \.npz",
    "folder.npz": "is a folder; name a file in it",
    "file/x.npz": r"file cannot be written \(Not a directory\)",
  }.items():
    with pytest.raises((ValueError, OSError), match=message):
      files.check_file(tmp_path / name, ".npz")
  with pytest.raises(OSError, match="the name of a folder is empty"):
    files.check_writable("")
  with pytest.raises(OSError, match=r"file cannot be written \(Not a directory\)"):
    files.check_empty(tmp_path / "file" / "new")
  files.check_file(tmp_path / "new" / "x.npz", ".npz")
  files.check_file(tmp_path / "file.npz", ".npz")
  files.check_writable(tmp_path / "new")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.npz"]

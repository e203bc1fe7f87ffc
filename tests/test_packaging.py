"""What pip installs: a wheel that works in any folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy, since building leaves files beside setup.py."""
  source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for name in ("ism_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  # The wheel is built from the source distribution, which has to hold all of it.
  subprocess.run([sys.executable, "-m", "build", "--outdir", out, source], check=True)
  (path,) = out.glob("*.whl")
  return path


@pytest.mark.slow
def test_a_wheel_has_every_module_and_config_and_says_that_it_is_typed(wheel):
  names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  modules = [path for room in ("ism_jax", "configs") for path in (ROOT / room).rglob("*.py")]
  assert {path.relative_to(ROOT).as_posix() for path in modules} <= names
  digits = ROOT / "ism_jax" / "pretrained" / "digits"
  assert {p.relative_to(ROOT).as_posix() for p in digits.rglob("*") if p.is_file()} <= names
  assert "ism_jax/py.typed" in names and not [name for name in names if "test" in name]


@pytest.mark.slow
def test_a_wheel_trains_a_config_of_its_own_in_a_folder_that_has_none(wheel, tmp_path):
  site, here = tmp_path / "site", tmp_path / "here"
  here.mkdir()
  install = ["pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
  subprocess.run([sys.executable, "-m", *install], check=True)
  run = lambda *arguments: subprocess.run(
    [sys.executable, *arguments],
    cwd=here,
    env=os.environ | {"PYTHONPATH": str(site)},
    check=True,
    capture_output=True,
    text=True,
  )
  where = "import configs, ism_jax; print(configs.__file__, ism_jax.__file__)"
  assert run("-c", where).stdout.count(str(site)) == 2
  small = ["--config.steps=4", "--config.coupling.pool_size=4", "--config.monitor.every=0"]
  small += ["--config.scan_steps=4"]
  run("-m", "ism_jax", "train", "--config=configs/digits.py:sm", *small)
  assert (here / "runs" / "digits-sm" / "checkpoints" / "4").is_dir()

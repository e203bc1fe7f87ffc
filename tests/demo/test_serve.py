"""The page of a trained network: what it draws, and how the command ends."""

import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.request

from examples import random_params, tiny_config
import numpy as np
import pytest

import ism_jax
from ism_jax import experiment
from ism_jax import state as state_lib
from ism_jax.demo import serve
from ism_jax.export import pytorch as torch_export
from ism_jax.runtime import checkpoints, files

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder, config = tmp_path_factory.mktemp("run"), tiny_config()
  exp = experiment.parse(config)
  params = random_params(exp.network(), exp.image_shape)
  state = state_lib.create(params, state_lib.optimizer(exp.optimizer, exp.total_steps))
  with checkpoints.open_manager(folder, keep=1) as manager:
    checkpoints.save(manager, 4, state, {}, files.as_dict(config))
  return folder


def test_the_page_draws_what_the_network_samples(workdir):
  model = ism_jax.load(str(workdir))
  sampler = serve.sampler(model)
  noise, labels, w = sampler.noise(3, 7), np.array([2, 0, 1]), np.float32([0.0, 1.5, 0.3])
  expected, _ = model.sample(3, seed=7, labels=labels, steps=2, w=w, batch_size=3)
  np.testing.assert_array_equal(sampler.draw(noise, labels, "2", w), expected)
  assert len(sampler.classes) == model.experiment.data.num_classes
  with pytest.raises(ValueError, match="off the trained grid"):
    sampler.draw(noise, labels, "5", w)


def test_a_space_draws_in_pytorch_what_the_network_samples(workdir, tmp_path, monkeypatch, pytorch):
  space = tmp_path / "space"
  torch_export.export(str(workdir), str(space), tree="ema", dtype="float32", space=True)
  header = (space / "README.md").read_text(encoding="utf-8").split("---")[1]
  assert "\nsdk: gradio\n" in header and "\napp_file: app.py\n" in header
  assert "\nlibrary_name: diffusers\n" in header
  needed = (space / "requirements.txt").read_text().splitlines()
  assert all(f'"{requirement}"' in (ROOT / "setup.py").read_text() for requirement in needed)
  monkeypatch.syspath_prepend(space)
  import app

  assert pathlib.Path(app.__file__).parent == space
  sampler = app.of_export(space)
  labels, w = np.array([2, 0, 1]), np.float32([0.0, 1.5, 0.3])
  noise = sampler.noise(3, 7)
  model = ism_jax.load(str(workdir))
  in_jax = np.transpose(noise, (0, 2, 3, 1))
  expected, _ = model.sample(3, noise=in_jax, labels=labels, steps=2, w=w, batch_size=3)
  images = sampler.draw(noise, labels, "2", w)
  assert images.shape == expected.shape and np.ptp(images) > 100
  np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)
  assert (sampler.w_max, len(sampler.classes)) == (3.5, 10)


def test_classes_of_one_name_are_told_apart():
  from ism_jax.demo import page

  names = ["crane, a bird", "maillot", "crane"]
  assert page.class_labels(3, names) == ("crane (0)", "maillot (1)", "crane (2)")
  assert page.class_labels(2) == ("0", "1")


def test_the_command_serves_until_it_is_interrupted_and_refuses_a_port_in_use(workdir):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "ism_jax", "demo", f"--source={workdir}", f"--port={port}"]
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    said = next(line for line in server.stderr if "open http" in line)
    address = re.search(r"http://127\.0\.0\.1:\d+/", said)[0]
    with urllib.request.urlopen(address) as answer:
      assert b"gradio" in answer.read()
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "give another --port" in second.stderr.splitlines()[-1]
    server.send_signal(signal.SIGINT)
    assert "Traceback" not in server.stderr.read()

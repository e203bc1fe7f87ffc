"""Reading a trained network from a workdir."""

import pathlib
import subprocess
import sys

from examples import random_params, tiny_config
import jax
import numpy as np
import pytest

from ism_jax import experiment, generate, restore, steps
from ism_jax import state as state_lib
from ism_jax.evaluation import evaluate
from ism_jax.runtime import checkpoints, files, sharding

TREES = {"params": 1.0, "ema": 2.0, "target_ema": 3.0}  # times the random parameters


def expected(step, tree):
  """The parameters in the checkpoint of `step`."""
  exp = experiment.parse(tiny_config())
  params = random_params(exp.network(), exp.image_shape, seed=step)
  return jax.tree.map(lambda a: np.float32(TREES[tree] * a), params)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with checkpoints of the steps 4 and 8."""
  folder, exp = tmp_path_factory.mktemp("run"), experiment.parse(tiny_config())
  optimizer = state_lib.optimizer(exp.optimizer, exp.total_steps)
  with checkpoints.open_manager(folder, keep=2) as manager:
    for step in (4, 8):
      trees = {tree: jax.device_put(expected(step, tree)) for tree in TREES}
      state = state_lib.create(trees["params"], optimizer).replace(**trees)
      checkpoints.save(manager, step, state, {}, files.as_dict(tiny_config()))
  return str(folder)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("step", [None, 4])
def test_any_tree_of_any_step_comes_to_every_device_of_a_mesh(workdir, tree, step, devices):
  mesh = sharding.data_mesh(jax.devices()[:devices])
  trained = restore.read(workdir, tree, step=step, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, trained.params, expected(step or 8, tree))
  for array in jax.tree.leaves(trained.params):
    assert array.sharding.is_fully_replicated and len(array.devices()) == devices
  assert (trained.step, trained.tree) == (step or 8, tree)
  assert trained.config == restore.read_config(workdir) == files.as_dict(tiny_config())
  assert trained.about == f"{restore.TREES[tree]}, step {step or 8}"


def test_a_config_is_that_of_the_run_or_is_refused(workdir):
  config = tiny_config()
  config.sample.seed = 3
  assert restore.read(workdir, config=config).exp == experiment.parse(config)
  assert restore.read(workdir).exp == experiment.parse(tiny_config())
  config.seed = 3
  with pytest.raises(ValueError, match="was made with seed=0, now 3"):
    restore.read(workdir, config=config)
  with pytest.raises(ValueError, match="tree='average' is unknown; known are ema"):
    restore.read(workdir, "average")
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* there are: \[4, 8\]"):
    restore.read(workdir, step=5)


def test_judging_and_sampling_build_no_optimizer_and_decide_no_placement(
  workdir, tmp_path, monkeypatch
):
  def refuse(*_, **__):
    raise AssertionError("only training needs this")

  for module, name in (
    (state_lib, "optimizer"),
    (state_lib, "create"),
    (steps, "placement"),
    (sharding, "split"),
  ):
    monkeypatch.setattr(module, name, refuse)
  config, devices = tiny_config(), jax.devices()[:2]
  config.placement = "auto"
  config.sample.update({"num_images": 5, "batch_size": 4})
  generate.write_samples(config, workdir, str(tmp_path / "samples.npz"), devices)
  with np.load(tmp_path / "samples.npz") as archive:
    assert archive["arr_0"].shape == (5, 8, 8, 1)
  config.evaluation.update({"num_images": 100, "steps": (1,), "w": (0.5,)})
  assert evaluate.evaluate(config, workdir, devices)["step"] == 8


def test_what_judges_samples_or_exports_does_not_import_training():
  modules = (
    *("restore", "generate", "evaluation.monitor", "evaluation.evaluate", "evaluation.report"),
    *("export.pytorch", "export.stablehlo"),
  )
  script = (
    "import importlib, sys\n"
    f"for name in {modules!r}: importlib.import_module(f'ism_jax.{{name}}')\n"
    "training = {'ism_jax.train', 'ism_jax.steps'} & set(sys.modules)\n"
    "assert not training, training\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, cwd=pathlib.Path(__file__).parents[1])

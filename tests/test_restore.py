"""Reading a trained network from a workdir."""

import json
import pathlib
import subprocess
import sys

import examples
from examples import draw_samples, flags_of, random_params
import hub_stand_in
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ism_jax import experiment, generate, main, restore, steps
from ism_jax import state as state_lib
from ism_jax.evaluation import evaluate
from ism_jax.export import pytorch
from ism_jax.pretrained import sit
from ism_jax.runtime import checkpoints, files, sharding

# Times the random parameters.
TREES = {"params": 1.0, "ema": 2.0, "target_ema": 3.0, "ema:0.9": 0.5}


def tiny_config():
  config = examples.tiny_config()
  config.ema.others = (0.9,)
  return config


def expected(step, tree):
  """The parameters in the checkpoint of `step`."""
  exp = experiment.parse(tiny_config())
  params = random_params(exp.network(), exp.image_shape, seed=step)
  return jax.tree.map(lambda a: np.float32(TREES[tree] * a), params)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with checkpoints of the steps 4 and 8."""
  return write_run(tmp_path_factory.mktemp("run"), {})


def write_run(folder, position) -> str:
  exp = experiment.parse(tiny_config())
  optimizer = state_lib.optimizer(exp.optimizer, exp.total_steps)
  with checkpoints.open_manager(folder, keep=2) as manager:
    for step in (4, 8):
      trees = {tree: jax.device_put(expected(step, tree)) for tree in TREES}
      others = {tree: trees.pop(tree) for tree in exp.ema.decays}
      state = state_lib.create(trees["params"], optimizer).replace(**trees, others=others)
      checkpoints.save(manager, step, state, position, files.as_dict(tiny_config()))
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
  name = restore.TREES.get(tree, "inference EMA of decay 0.9")
  assert trained.about == f"{name}, step {step or 8}"


def test_a_config_is_that_of_the_run_or_is_refused(workdir):
  config = tiny_config()
  config.sample.seed = 3
  assert restore.read(workdir, config=config).exp == experiment.parse(config)
  assert restore.read(workdir).exp == experiment.parse(tiny_config())
  config.seed = 3
  with pytest.raises(ValueError, match="was made with seed=0, now 3"):
    restore.read(workdir, config=config)
  config.seed, config.objective.t_interval = 0, 0.1
  with pytest.raises(ValueError, match=r"t_interval=0.1 where 0.3 was trained"):
    restore.read(workdir, config=config)
  known = "known are ema, target_ema, params, ema:0.9"
  with pytest.raises(ValueError, match=rf"tree='ema:0\.5' is unknown; {known}\."):
    restore.read(workdir, "ema:0.5")
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
    images = archive["arr_0"]
  assert images.shape == (5, 8, 8, 3)
  tree = {"tree": "ema:0.9"}
  generate.write_samples(config, workdir, str(tmp_path / "other.npz"), devices, **tree)
  exp, mesh = experiment.parse(config), sharding.data_mesh(devices)
  drawing = {k: config.sample[k] for k in ("num_images", "steps", "w", "seed", "batch_size")}
  by_hand, _ = draw_samples(exp, mesh, expected(8, "ema:0.9"), **drawing)
  with np.load(tmp_path / "other.npz") as archive:
    np.testing.assert_array_equal(archive["arr_0"][..., :1], by_hand)
  assert (images[..., :1] != by_hand).any()
  config.evaluation.update({"num_images": 100, "steps": (1,), "w": (0.5,)})
  report = evaluate.evaluate(config, workdir, devices)
  other = evaluate.evaluate(config, workdir, devices, **tree)
  assert (report["step"], report["parameters"]) == (8, "inference EMA")
  assert (other["step"], other["parameters"]) == (8, "inference EMA of decay 0.9")
  for folder, written in ((workdir, report), (f"{workdir}/ema-0.9", other)):
    assert files.read_json(f"{folder}/evaluation.json", {}, "") == written


def test_a_checkpoint_from_before_the_other_averages_is_read_and_continued(tmp_path):
  config = examples.tiny_config()
  exp, before = experiment.parse(config), files.as_dict(config)
  del before["ema"]["others"]
  mesh = sharding.data_mesh(jax.devices()[:1])
  state = steps.init_function(exp, mesh)(steps.base_keys(0).init)
  with checkpoints.open_manager(tmp_path, keep=1) as manager:
    older = {name: value for name, value in vars(state).items() if name != "others"}
    checkpoints.save(manager, 4, older, {}, before)
    restored, _ = checkpoints.restore(manager, steps.abstract_state(exp, mesh))
  assert jax.tree.structure(restored) == jax.tree.structure(state) and restored.others == {}
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  trained = restore.read(str(tmp_path), config=config)
  jax.tree.map(np.testing.assert_array_equal, trained.params, state.ema)
  with pytest.raises(ValueError, match="known are ema, target_ema, params"):
    restore.read(str(tmp_path), "ema:0.9")


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


@pytest.fixture(scope="module")
def export(workdir, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exports") / "weights"
  pytorch.export(workdir, str(folder), tree="ema:0.9", dtype="float32", step=4)
  return str(folder)


def test_an_export_is_read_as_its_workdir_is(export):
  mesh = sharding.data_mesh(jax.devices()[:2])
  trained = restore.read(export, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, trained.params, expected(4, "ema:0.9"))
  assert all(len(array.devices()) == 2 for array in jax.tree.leaves(trained.params))
  assert trained.about == "inference EMA of decay 0.9, step 4" and not trained.exp.data.vae
  assert trained.config == restore.read_config(export)
  config = tiny_config()
  config.sample.seed = 3
  assert restore.read(export, config=config).exp == experiment.parse(config)
  config.seed = 3
  with pytest.raises(ValueError, match="was made with seed=0, now 3"):
    restore.read(export, config=config)
  for asked in ({"tree": "params"}, {"step": 4}):
    with pytest.raises(ValueError, match="leave tree and step out"):
      restore.read(export, **asked)


def test_exports_of_two_networks_are_told_apart_and_keep_the_names_of_classes(
  workdir, export, tmp_path, monkeypatch
):
  other = tmp_path / "other"
  pytorch.export(workdir, str(other), tree="ema", dtype="float32", step=4)
  checksums = [restore.read(str(folder)).checksum for folder in (export, other)]
  checksums.append(restore.read(workdir, "ema:0.9", step=4).checksum)
  assert checksums[0] == checksums[2] != checksums[1]
  config = json.loads((other / "config.json").read_text())
  del config["checksum"]  # of an older version
  names = [f"digit {i}" for i in range(10)]
  config["id2label"] = {str(i): name for i, name in enumerate(names)}
  (other / "config.json").write_text(json.dumps(config))
  trained = restore.read(str(other))
  assert trained.names == names and trained.checksum not in ("", *checksums)
  pytorch.write(trained, str(tmp_path / "again"), dtype="float32")
  assert restore.read(str(tmp_path / "again")).names == names
  monkeypatch.chdir(other / "transformer")
  assert restore.read("diffusion_pytorch_model.safetensors").names == names


def of_data(count=10, size=8, channels=1, model=None, **objective):
  """The experiment of a training on other data."""
  config = tiny_config()
  config.objective.update(objective)
  config.data.update({"num_classes": count, "image_size": size, "channels": channels})
  config.model.size = model or config.model.size
  config.sample.label = "all"
  return experiment.parse(config)


def label_rows(params) -> np.ndarray:
  return params["y_embedder"]["embedding"]


def all_but_labels(params) -> dict:
  return {key: value for key, value in params.items() if key != "y_embedder"}


ANIMALS = ["tench, Tinca tinca", "tabby, tabby cat", "crane, bird", "crane, machine", *"efghij"]


def test_classes_are_matched_by_any_name_that_is_of_one_class_alone():
  names = ["Tabby", "crane", "crane,  Bird", "tinca_tinca", "tabby cat", "ox", "E", ""]
  assert restore.match_names(names, ANIMALS) == [1, -1, 2, 0, 1, -1, 4, -1]
  assert restore.match_names(ANIMALS, ANIMALS) == list(range(10))
  assert restore.match_names(["a", "a", "b", "a"], ["a", "b", "a", "a"]) == [0, -1, 1, 3]
  assert restore.match_names(["b", "a"], ["a", "A"]) == [-1, -1]


def test_a_training_begins_with_the_rows_of_classes_of_the_same_name(workdir, tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  folder, before = tmp_path / "named", expected(4, "ema")
  pytorch.export(workdir, str(folder), tree="ema", dtype="float32", step=4)
  config = json.loads((folder / "config.json").read_text())
  config["id2label"] = {str(i): name for i, name in enumerate(ANIMALS)}
  (folder / "config.json").write_text(json.dumps(config))
  for count, names, rows, said in (
    (4, ["ox", "tabby", "e", "crane"], [-1, 1, 4, -1], "2 of 4 classes by name, 2 new"),
    (10, ANIMALS[::-1], range(9, -1, -1), "10 of 10 classes by name, 0 new"),
    (10, None, range(10), "10 of 10 classes by number, 0 new"),
    (3, None, [-1] * 3, "0 of 3 classes (of its 10 or of these the names are unknown), 3 new"),
  ):
    begun = restore.read_start(str(folder), of_data(count), names)
    np.testing.assert_array_equal(label_rows(begun), label_rows(before)[[*rows, 10]])
    jax.tree.map(np.testing.assert_array_equal, all_but_labels(begun), all_but_labels(before))
    assert said in caplog.text
  run = write_run(tmp_path / "run", {"classes": ANIMALS})
  begun = restore.read_start(run, of_data(3), ["tabby", "ox", "tench"])
  np.testing.assert_array_equal(label_rows(begun), label_rows(expected(8, "ema"))[[1, 10, 0, 10]])
  state = steps.init_function(of_data(3), sharding.data_mesh())(jax.random.key(0), begun)
  assert label_rows(state.ema).shape == (4, label_rows(before).shape[1])


def test_of_1000_unnamed_classes_those_with_imagenets_names_are_taken(tmp_path):
  exp = of_data(count=1000)
  state = sit.from_params(random_params(exp.network(), exp.image_shape), exp.network(), (8, 8, 1))
  safetensors.numpy.save_file(state, tmp_path / "sit.safetensors")
  begun = restore.read_start(str(tmp_path / "sit.safetensors"), of_data(2), ["ox_cart", "tabby"])
  table = state["y_embedder.embedding_table.weight"]
  # 281 is ImageNet's tabby, the last row no class.
  np.testing.assert_array_equal(label_rows(begun), table[[1000, 281, 1000]])


@pytest.mark.parametrize("size", [12, (8, 16), (16, 4)])
def test_a_training_begins_with_a_run_of_another_size_of_images(workdir, export, size):
  begun = restore.read_start(workdir, of_data(size=size), None)  # as of the newest checkpoint
  jax.tree.map(np.testing.assert_array_equal, begun, expected(8, "ema"))
  begun = restore.read_start(export, of_data(size=size), None)
  jax.tree.map(np.testing.assert_array_equal, begun, expected(4, "ema:0.9"))


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (3, 5), (4, 4)])
def test_the_positions_of_a_state_dict_tell_its_rows_and_columns(grid):
  exp = of_data(size=tuple(4 * n for n in grid))
  params = random_params(exp.network(), exp.image_shape)
  state = sit.from_params(params, exp.network(), exp.image_shape)
  state["pos_embed"] = state["pos_embed"].astype(ml_dtypes.bfloat16)
  read = sit.to_own_params(state, of_data(3).network(), (8, 8, 1), "it")
  jax.tree.map(np.testing.assert_array_equal, read, params)
  state["pos_embed"] = np.full_like(state["pos_embed"], np.nan)
  with pytest.raises(ValueError, match=r"(not finite|another shape): pos_embed"):
    sit.to_own_params(state, of_data(3).network(), (8, 8, 1), "it")


def test_a_training_begins_with_no_network_of_other_channels_or_blocks(workdir, export, tmp_path):
  for source in (workdir, export):
    with pytest.raises(ValueError, match=r"of 1 channels, and the data has 3: .* Set init_from"):
      restore.read_start(source, of_data(channels=3), None)
    with pytest.raises(ValueError, match=r"(?s)'SiT-XS/4' for 8x8x1 .*\nIt has 3 blocks"):
      restore.read_start(source, of_data(size=16, model="SiT-XS/4"), None)
  with pytest.raises(FileNotFoundError, match=r"no weights under .*Name a state dict"):
    restore.read_start(str(tmp_path / "nosuch"), of_data(), None)
  (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    restore.read_start(str(tmp_path / "empty"), of_data(), None)


def test_a_start_takes_the_interval_as_a_new_input_and_no_other_scale(workdir, export):
  for source in (workdir, export):
    exp = of_data(t_interval_max=0.5)
    begun = restore.read_start(source, exp, None)
    state = steps.init_function(exp, sharding.data_mesh())(jax.random.key(0), begun)
    assert not state.params["interval_embedder"]["mlp_2"]["kernel"].any()
    with pytest.raises(ValueError, match=r"Set objective\.w_scaled=False"):
      restore.read_start(source, of_data(w_scaled=True), None)


def run(command, *arguments):
  """Runs a command of `main` in this process."""
  with flags_of(command):
    main.main(main.parse_flags([command, *arguments]))


def test_weights_alone_are_sampled_and_judged_and_nothing_is_written_to_them(
  export, tmp_path, monkeypatch
):
  before = sorted(pathlib.Path(export).rglob("*"))
  monkeypatch.chdir(tmp_path)
  at, small = (
    f"--workdir={export}",
    ["--config.sample.num_images=5", "--config.evaluation.w=(0.5,)"],
  )
  small += ["--config.evaluation.num_images=100", "--config.evaluation.steps=(1,)"]
  run("sample", at, "--out=samples.npz", *small)
  with np.load("samples.npz") as archive:
    assert archive["arr_0"].shape == (5, 8, 8, 3)
  run("evaluate", at, "--config.evaluation.networks=random", *small)
  report = json.loads((tmp_path / "evaluations/weights/evaluation.json").read_text())
  assert (report["step"], report["parameters"]) == (4, "inference EMA of decay 0.9")
  assert sorted(pathlib.Path(export).rglob("*")) == before


@pytest.mark.parametrize(
  ("arguments", "written"),
  [
    (["--workdir={export}", "--out=mine"], "mine"),
    (["--workdir={export}", "--samples=x.npz"], "evaluations/weights"),
    (["--workdir=some/folder", "--samples=x.npz", "--config={config}"], "some/folder"),
    (["--workdir={run}"], "{run}"),
    (["--workdir={run}", "--out=mine"], "mine"),
    (["--workdir={run}", "--tree=ema:0.9"], "{run}/ema-0.9"),
  ],
)
def test_an_evaluation_is_written_where_it_is_asked_for(
  workdir, export, monkeypatch, arguments, written
):
  config = pathlib.Path(main.__file__).parents[1] / "configs" / "digits.py"
  place = lambda text: text.format(export=export, run=workdir, config=config)
  outs = []
  monkeypatch.setattr(evaluate, "evaluate", lambda config, source, out, tree: outs.append(out))
  monkeypatch.setattr(evaluate, "evaluate_samples", lambda config, out, samples: outs.append(out))
  run("evaluate", *map(place, arguments))
  assert outs == [place(written)]


@pytest.mark.parametrize(
  ("source", "folder"),
  [
    ("someone/digits", "evaluations/someone-digits"),
    ("someone/digits@refs/pr/7", "evaluations/someone-digits-refs-pr-7"),
    ("https://huggingface.co/someone/digits/tree/v1", "evaluations/someone-digits-v1"),
    ("/somewhere/exports/digits/", "evaluations/digits"),
    ("../exports/digits", "evaluations/digits"),
  ],
)
def test_the_results_of_an_export_have_a_folder_of_its_name_here(source, folder):
  assert main.default_results(source) == folder


def test_a_default_workdir_is_no_name_on_the_hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with (
    hub_stand_in.serve(tmp_path / "cache") as hub,
    pytest.raises(SystemExit, match=r"no trained network under .*there is no such file or folder"),
  ):
    path = pathlib.Path(__file__).parents[1] / "configs" / "digits.py"
    run("evaluate", f"--config={path}")
  assert not hub.requests

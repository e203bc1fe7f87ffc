"""Parameters to PyTorch and back: SiT's state dicts, the folder of an export, and its sampler."""

import argparse
import dataclasses
import json
import struct
import subprocess
import sys

from examples import random_params, tiny_config
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from configs import imagenet256
from ism_jax import experiment, generate, model, paths, restore, sampling, train
from ism_jax.export import pytorch as export
from ism_jax.export import stablehlo
from ism_jax.performance import benchmark
from ism_jax.pretrained import sit, torch_files, vae
from ism_jax.runtime import checkpoints, files, sharding
from ism_jax.steps import abstract_state, init_function

SHAPE = (8, 8, 2)  # of images; two channels, so that their order shows
CLASSES = 5


def network(size="SiT-XXS/2", guided=True, classes=CLASSES, dtype="float32"):
  return model.SiT(model.ModelConfig(size, dtype, "none", 1), classes, guided)


def inputs(shape=SHAPE, classes=CLASSES, n=4):
  x = np.random.default_rng(1).standard_normal((n, *shape), np.float32)
  t, d, w = np.float32([[0, 0.25, 0.5, 127 / 128], [1, 0.25, 1 / 64, 0], [0, 0.25, 3.5, 1]])
  return x, t, np.array([0, classes, 1, classes - 1]), d, w


def leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def assert_equal(actual, expected):
  for (path, a), (other, b) in zip(leaves(actual), leaves(expected), strict=True):
    assert path == other
    np.testing.assert_array_equal(a, b, err_msg=str(path))


def sit_shapes(depth, width, patch, channels, tokens, classes, embedders):
  """{key: shape} of SiT's state dict, written down from its code."""
  shapes = {
    "pos_embed": (1, tokens, width),
    "x_embedder.proj.weight": (width, channels, patch, patch),
    "x_embedder.proj.bias": (width,),
    "y_embedder.embedding_table.weight": (classes + 1, width),
  }

  def linear(key, inputs, outputs):
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (outputs, inputs), (outputs,)

  for name in ("t_embedder", *embedders):
    linear(f"{name}.mlp.0", 256, width)
    linear(f"{name}.mlp.2", width, width)
  for i in range(depth):
    linear(f"blocks.{i}.attn.qkv", width, 3 * width)
    linear(f"blocks.{i}.attn.proj", width, width)
    linear(f"blocks.{i}.mlp.fc1", width, 4 * width)
    linear(f"blocks.{i}.mlp.fc2", 4 * width, width)
    linear(f"blocks.{i}.adaLN_modulation.1", width, 6 * width)
  linear("final_layer.linear", width, patch * patch * channels)
  linear("final_layer.adaLN_modulation.1", width, 2 * width)
  return shapes


@pytest.mark.parametrize(
  ("guided", "embedders"), [(True, ("d_embedder", "w_embedder")), (False, ("d_embedder",))]
)
def test_the_keys_and_shapes_are_those_of_sits_code(guided, embedders):
  net, shape = network("SiT-XL/2", guided, 1000), (32, 32, 4)
  params = jax.eval_shape(lambda: model.init_params(jax.random.key(0), net, shape))
  state = jax.eval_shape(lambda params: sit.from_params(params, net, shape), params)
  expected = sit_shapes(28, 1152, 2, 4, 256, 1000, embedders)
  assert {key: a.shape for key, a in state.items()} == expected


@pytest.mark.parametrize("guided", [True, False])
def test_parameters_come_back_bit_for_bit(guided):
  net = network(guided=guided)
  params = random_params(net, SHAPE)
  state = sit.from_params(params, net, SHAPE)
  assert_equal(sit.to_params(state, net, SHAPE, "it"), params)


def published(net, learn_sigma=False):
  """A state dict as SiT's own code has it, with the parameters that make it."""
  params = random_params(net, SHAPE)
  params = {k: v for k, v in params.items() if k not in sit.EMBEDDERS}
  state = sit.from_params(params, net, SHAPE)
  if learn_sigma:  # of each pixel of a patch, the velocity's channels come first
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
      pixels = state[key].reshape(4, SHAPE[-1], *state[key].shape[1:])
      both = np.concatenate([pixels, np.full_like(pixels, 99.0)], axis=1)
      state[key] = both.reshape(-1, *state[key].shape[1:])
  return state, params


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_of_a_published_network_all_is_taken_but_its_variances(learn_sigma):
  net = network()
  state, params = published(net, learn_sigma)
  assert_equal(sit.to_params(state, net, SHAPE, "it"), params)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_network_of_reversed_time_is_converted_exactly(learn_sigma):
  net = network()
  state, theirs = published(net, learn_sigma)
  only_in_training = {"projectors.0.0.weight": np.ones((3, 3)), "logvar_linear.bias": np.ones(1)}
  with pytest.raises(ValueError, match=r"(?s)unexpected: projectors.*init_time=data_to_noise"):
    sit.to_params(state | only_in_training, net, SHAPE, "it")
  ours = sit.to_params(sit.reverse_time(state | only_in_training, "it"), net, SHAPE, "it")
  absent = {k: v for k, v in random_params(net, SHAPE).items() if k in sit.EMBEDDERS}
  absent = jax.tree.map(np.zeros_like, absent)
  x, t, c, d, w = inputs()
  velocity = jax.jit(lambda params, t: net.apply({"params": params | absent}, x, t, c, d, w))
  assert relative(velocity(ours, t), -velocity(theirs, 1 - t)) < 1e-5
  assert relative(velocity(ours, t), velocity(theirs, t)) > 0.1
  with pytest.raises(ValueError, match=r"has d_embedder and w_embedder.*init_time=noise_to_data"):
    sit.reverse_time(sit.from_params(theirs | absent, net, SHAPE), "it")


def test_the_embedding_of_reversed_time_is_that_of_the_time():
  first, key = np.random.default_rng(2).standard_normal((7, 256)), "t_embedder.mlp.0.weight"
  f = np.float64(model.frequencies(128))
  features = lambda t: np.concatenate([np.cos(f * t), np.sin(f * t)])
  reverse = sit.reverse_time({key: first}, "it")[key]
  for t in (0.0, 1 / 128, 0.3, 0.5, 1.0):
    np.testing.assert_allclose(reverse @ features(t), first @ features(1 - t), atol=1e-10)


def with_new_embedders(net):
  """The parameters that a run begins with, after those of a published network."""
  state, _ = published(net)
  fresh = random_params(net, SHAPE, seed=1)
  return sit.complete(sit.to_params(state, net, SHAPE, "it"), fresh), fresh


def test_a_published_network_begins_as_itself_at_every_step_size_and_guidance():
  net = network()
  params, fresh = with_new_embedders(net)
  x, t, c, _, _ = inputs()
  velocity = jax.jit(lambda params, d, w: net.apply({"params": params}, x, t, c, d, w))
  # Itself has no embedders of d and w: zeros altogether.
  absent = jax.tree.map(np.zeros_like, {name: fresh[name] for name in sit.EMBEDDERS})
  expected = velocity(params | absent, np.zeros(4, "f"), np.zeros(4, "f"))
  assert np.abs(expected).max() > 0.1
  for d in (0, 1 / 64, 1 / 2, 1):
    for w in (0, 0.25, 3.5):
      out = velocity(params, np.full(4, d, "f"), np.full(4, w, "f"))
      np.testing.assert_array_equal(out, expected)


@pytest.mark.slow
def test_new_embedders_learn_from_the_first_step_on():
  net = network()
  params, _ = with_new_embedders(net)
  x, t, c, d, w = inputs()
  loss = lambda params: jnp.mean(model.velocity_function(net, params)(x, t, c, d, w) ** 2)
  gradient = jax.jit(jax.grad(loss))(params)
  for name in sit.EMBEDDERS:
    for a in gradient[name]["mlp_2"].values():
      assert jnp.abs(a).max() > 1e-6


def test_an_average_is_preferred_and_files_are_told_apart(tmp_path, monkeypatch):
  path = tmp_path / "sit.pt"
  path.touch()
  for saved, expected in (
    ({"model": {"a": 1}, "ema": {"a": 2}, "opt": {}}, ({"a": 2}, f"the EMA of {path}")),
    ({"model": {"a": 1}}, ({"a": 1}, f"the raw parameters (there is no EMA) of {path}")),
    ({"a": 3}, ({"a": 3}, str(path))),
  ):
    monkeypatch.setattr(torch_files, "read_state_dict", lambda path: saved)
    assert sit.read(path) == expected


def test_everything_that_is_wrong_is_listed():
  net = network()
  state = sit.from_params(random_params(net, SHAPE), net, SHAPE)
  del state["blocks.2.mlp.fc1.bias"], state["w_embedder.mlp.0.weight"]
  state["blocks.3.mlp.fc1.bias"] = np.zeros(384, np.float32)
  state["y_embedder.embedding_table.weight"] = np.zeros((1001, 96), np.float32)
  state["t_embedder.mlp.0.bias"] = np.full(96, np.nan, np.float32)
  state["t_embedder.mlp.2.bias"] = np.zeros(96, np.int64)
  state["epoch"] = 3
  with pytest.raises(
    ValueError, match=r"it does not hold the network of model\.size='SiT-XXS/2'"
  ) as e:
    sit.to_params(state, net, SHAPE, "it")
  assert str(e.value).split("\n")[1:-1] == [
    "  missing: blocks.2.mlp.fc1.bias (384,)",
    "  unexpected: blocks.3.mlp.fc1.bias (384,)",
    "  unexpected: epoch int",
    "  not finite: t_embedder.mlp.0.bias",
    "  no floating-point numbers: t_embedder.mlp.2.bias int64",
    "  missing: w_embedder.mlp.0.weight (96, 256)",
    "  of another shape: y_embedder.embedding_table.weight (1001, 96), needed (6, 96)",
  ]
  assert "It has 4 blocks of width 96, patches of 2 pixels and 2 channels" in str(e.value)


def test_a_w_input_that_the_network_lacks_is_named():
  state = sit.from_params(random_params(network(), SHAPE), network(), SHAPE)
  with pytest.raises(
    ValueError, match=r"without a w input:\n  unexpected: w_embedder\.mlp\.0\.bias"
  ):
    sit.to_params(state, network(guided=False), SHAPE, "it")
  with pytest.raises(ValueError, match="It is no state dict of SiT"):
    sit.to_params({3: np.ones(2)}, network(), SHAPE, "it")


def test_positions_may_be_rounded_and_not_others():
  net = network()
  state = sit.from_params(random_params(net, SHAPE), net, SHAPE)
  rounded = state | {"pos_embed": state["pos_embed"].astype(ml_dtypes.bfloat16)}
  sit.to_params(rounded, net, SHAPE, "it")
  rows_first = state["pos_embed"].reshape(4, 4, 2, -1)[:, :, ::-1].reshape(1, 16, -1)
  with pytest.raises(ValueError, match="another pos_embed than SiT's sinusoids"):
    sit.to_params(state | {"pos_embed": rows_first}, net, SHAPE, "it")


def test_files_that_hold_no_state_dict_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no such file or folder\. Name a state dict of SiT"):
    sit.read(tmp_path / "nosuch.pt")
  (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
  with pytest.raises(ValueError, match=r"model\.safetensors .*damaged safetensors file"):
    sit.read(tmp_path)  # a folder's


TREES = ("params", "ema", "target_ema")
BOTH = pytest.mark.parametrize("workdir", ["ism", "sm"], indirect=True)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """By variant: a workdir with checkpoints of steps 2 and 4 at random parameters, and the state."""
  return {
    variant: write_checkpoints(tmp_path_factory.mktemp(variant), tiny_config(variant))
    for variant in ("ism", "sm")
  }


@pytest.fixture
def workdir(workdirs, request):
  """One of them: folder, experiment and the state of step 4."""
  return workdirs[getattr(request, "param", "ism")]


def write_checkpoints(folder, config):
  config.data.dir = "/somewhere/private"
  exp = experiment.parse(config)
  shapes = abstract_state(exp, sharding.data_mesh(jax.devices()[:1]))
  state = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype)), shapes)
  with checkpoints.open_manager(folder, keep=5) as manager:
    for step in (2, 4):
      draw = lambda i: random_params(exp.network(), exp.image_shape, seed=10 * step + i)
      trees = {name: jax.device_put(draw(i)) for i, name in enumerate(TREES)}
      state = state.replace(step=jnp.int32(step), **trees)
      checkpoints.save(manager, step, state, {}, files.as_dict(config))
  return folder, exp, state


@BOTH
def test_each_tree_is_exported_and_imported_bit_for_bit(workdir, tmp_path):
  folder, exp, state = workdir
  for tree in TREES:
    export.export(str(folder), str(tmp_path / tree), tree=tree, dtype="float32")
    actual = sit.load(tmp_path / tree, exp.network(), exp.image_shape)
    assert_equal(actual, getattr(state, tree))
  export.export(str(folder), str(tmp_path / "earlier"), tree="ema", dtype="float32", step=2)
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 in .*there are: \[2, 4\]"):
    export.export(str(folder), str(tmp_path / "new"), tree="ema", dtype="float32", step=3)
  earlier = sit.load(tmp_path / "earlier", exp.network(), exp.image_shape)
  assert_equal(earlier, random_params(exp.network(), exp.image_shape, seed=21))


def test_bfloat16_is_the_nearest(workdir, tmp_path):
  folder, exp, state = workdir
  export.export(str(folder), str(tmp_path / "half"), tree="ema", dtype="bfloat16")
  arrays = torch_files.read_state_dict(tmp_path / "half" / sit.WEIGHTS)
  assert {a.dtype for a in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
  actual = sit.load(tmp_path / "half", exp.network(), exp.image_shape)
  assert_equal(actual, jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype("f"), state.ema))


@BOTH
def test_an_export_says_what_it_is_and_keeps_the_machine_to_itself(workdir, tmp_path):
  folder, exp, _ = workdir
  out = tmp_path / "out"
  export.export(str(folder), str(out), tree="target_ema", dtype="float32")
  of_folder = [p for p in out.rglob("*") if p.is_file()]
  assert {str(p.relative_to(out)) for p in of_folder} == {
    "config.json",
    "ism_pytorch.py",
    "README.md",
    # For diffusers.
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/ism_pytorch.py",
  }
  assert len({p.stat().st_mode for p in of_folder}) == 1
  config = json.loads((out / "config.json").read_text())
  assert (config["step"], config["tree"], config["dtype"]) == (4, "target_ema", "float32")
  assert experiment.parse(config["config"]).network() == exp.network()
  card = (out / "README.md").read_text()
  assert "The parameters are the target EMA, in float32." in card
  assert "8x8x1 images" in card and "Not measured" in card
  assert ("The guidance is fixed at `w` = 0.5" in card) != exp.objective.intrinsic
  assert not any(b"private" in p.read_bytes() for p in of_folder)


def test_the_autoencoder_of_latents_is_named():
  config = imagenet256.get_config()
  trained = restore.Trained(experiment.parse(config), files.as_dict(config), 4, "ema", {})
  described = export.describe(trained, "float32")
  assert (described["vae"], described["vae_scale"]) == ("stabilityai/sd-vae-ft-mse", 0.18215)
  card = export.card(trained, "float32", None)
  assert "# SiT-XL/2 on ImageNet, ism" in card and "the 1000 classes of ImageNet" in card
  assert "32x32x4 latents of `stabilityai/sd-vae-ft-mse`" in card
  config.data.update({"vae_scale": 0.13025, "vae_shift": 0.5})
  trained = restore.Trained(experiment.parse(config), files.as_dict(config), 4, "ema", {})
  described = export.describe(trained, "float32")
  assert (described["vae_scale"], described["vae_shift"]) == (0.13025, 0.5)
  assert "0.13025 (z - 0.5)" in export.card(trained, "float32", None)


def test_the_machines_folders_are_nowhere(tmp_path):
  """Neither the autoencoder's, nor that of the statistics of an evaluation."""
  config = imagenet256.get_config()
  config.data.vae = "/home/someone/vae.safetensors"
  trained = restore.Trained(experiment.parse(config), files.as_dict(config), 4, "ema", {})
  evaluation = report(step=4)
  evaluation["networks"][0]["reference"] = {"file": "/home/someone/inception.npz"}
  card, settings = export.card(trained, "float32", evaluation), export.describe(trained, "float32")
  assert "latents of `vae`" in card and "Reference: inception.npz." in card
  assert settings["vae"] == settings["config"]["data"]["vae"] == "vae"
  assert "someone" not in card + json.dumps(settings)


def test_weights_are_found_where_exports_have_them_and_where_older_ones_had_them(tmp_path):
  net = network()
  (tmp_path / "transformer").mkdir()
  for seed, name in enumerate(("model.safetensors", sit.WEIGHTS)):
    params = random_params(net, SHAPE, seed)
    state = sit.from_params(params, net, SHAPE)
    contiguous = {key: np.ascontiguousarray(a) for key, a in state.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / name)
    assert_equal(sit.load(tmp_path, net, SHAPE), params)


def report(step, parameters="inference EMA"):
  """As `evaluate.evaluate` writes it."""
  network = {
    "name": "classifier",
    "features": "a classifier",
    "weights_sha256": None,
    "held_out_accuracy": 0.9,
    "reference": {"split": "train", "images": 9},
    "reference_images": 9,
    "floor": None,
  }
  result = lambda steps, distance: {
    "steps": steps,
    "w": 0.5,
    "seed": 0,
    "scores": {"classifier": {"frechet_distance": distance}},
  }
  return {
    "config": files.as_dict(tiny_config()),
    "variant": "ism",
    "step": step,
    "parameters": parameters,
    "vae": "",
    "labels": "balanced",
    "rounding": "nearest",
    "num_images": 9,
    "networks": [network],
    "metrics": {"kid": "none"},
    "reference_spectrum": None,
    "results": [result(1, 7.125), result(4, 3.5)],
    "yardsticks": {},
  }


def test_the_card_has_the_evaluation_of_its_own_parameters_alone(workdir, tmp_path):
  folder, _, _ = workdir
  file = folder / "evaluation.json"

  def card(name, tree="ema"):
    export.export(str(folder), str(tmp_path / name), tree=tree, dtype="float32")
    return (tmp_path / name / "README.md").read_text()

  try:
    file.write_text(json.dumps(report(step=4)))
    measured = card("measured")
    assert "| 1 | 0.5 | 0 | 7.125 |" in measured and "| 4 | 0.5 | 0 | 3.500 |" in measured
    assert "9 samples, against" in measured
    assert "7.125" not in card("of_another_tree", "params")
    ours = restore.read(str(folder)).checksum
    file.write_text(json.dumps(report(step=4) | {"parameters_checksum": ours}))
    assert "7.125" in card("of_the_same")
    of_the_same, again = str(tmp_path / "of_the_same"), str(tmp_path / "again")
    export.export(of_the_same, again, tree="ema", dtype="float32")
    assert "7.125" in (tmp_path / "again" / "README.md").read_text()
    another_run = report(step=4) | {"parameters_checksum": "01234567"}
    samples = {"samples": "x.npz", "results": []}
    for i, other in enumerate((report(step=2), another_run, samples, {"step": 4})):
      file.write_text(json.dumps(other))
      assert "Not measured" in card(str(i))
  finally:
    file.unlink()


def test_an_export_refuses_an_autoencoder_that_did_not_encode_the_data(workdir, tmp_path):
  trained = restore.read(str(workdir[0]))
  latents = {"name": "latents", "vae": "random-small", "channels": 4, "dir": str(tmp_path)}
  data = dataclasses.replace(trained.exp.data, **latents)
  exp = dataclasses.replace(trained.exp, data=data)
  trained = dataclasses.replace(trained, exp=exp, dataset={"vae_sha256": "01234567"})
  with pytest.raises(ValueError, match="encoded by those of 01234567"):
    export.write(trained, str(tmp_path / "out"), dtype="float32")


def test_an_export_replaces_nothing_and_leaves_nothing_half_written(workdir, tmp_path, monkeypatch):
  folder, out = str(workdir[0]), tmp_path / "out"
  out.mkdir()
  (out / "notes").write_text("notes")
  with pytest.raises(FileExistsError, match=r"out is there and not empty; name another folder"):
    export.export(folder, str(out), tree="ema", dtype="float32")
  assert (out / "notes").read_text() == "notes"
  with pytest.raises(OSError, match="is no folder: name one"):
    export.export(folder, "gs://bucket/out", tree="ema", dtype="float32")

  def fail(*_):
    raise OSError("no space left")

  (out / "notes").unlink()
  with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
    patch.setattr(safetensors.numpy, "save_file", fail)
    export.export(folder, str(out), tree="ema", dtype="float32")
  assert [p.name for p in tmp_path.iterdir()] == ["out"] and not any(out.iterdir())
  export.export(folder, str(out), tree="ema", dtype="float32")  # an empty folder is none
  assert (out / sit.WEIGHTS).is_file()


@pytest.mark.slow
def test_a_run_begins_with_what_is_imported(workdir, tmp_path):
  folder, exp, state = workdir
  export.export(str(folder), str(tmp_path / "out"), tree="ema", dtype="float32")
  imported = sit.load(tmp_path / "out", exp.network(), exp.image_shape)
  init = init_function(exp, sharding.data_mesh())
  begun = init(jax.random.key(1), imported)
  for name in TREES:
    assert_equal(getattr(begun, name), state.ema)
  assert int(begun.step) == 0


@pytest.mark.slow
def test_the_command_exports_and_its_errors_are_one_line(workdir, tmp_path):
  command = [sys.executable, "-m", "ism_jax.export", f"--workdir={workdir[0]}"]
  command += [f"--out={tmp_path / 'out'}", "--tree=target_ema", "--step=2", "--dtype=bfloat16"]
  run = lambda: subprocess.run(command, capture_output=True, text=True)
  ran = run()
  assert ran.returncode == 0, ran.stderr
  assert "Wrote the target EMA, step 2" in ran.stderr
  failed = run()
  assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
  assert failed.stderr.startswith(f"Error: {tmp_path / 'out'} is there"), failed.stderr


@pytest.fixture(scope="module")
def trained(workdirs, tmp_path_factory):
  """(experiment, workdir, final state, export) of a short training that began with an import."""
  folder, (before, _, _) = tmp_path_factory.mktemp("trained"), workdirs["ism"]
  export.export(str(before), str(folder / "before"), tree="ema", dtype="float32")
  config = tiny_config()
  config.update({"steps": 16, "init_from": str(folder / "before")})
  config.optimizer.learning_rate = 1e-3
  state = train.train(config, str(folder / "run"), jax.devices()[:1])
  export.export(str(folder / "run"), str(folder / "out"), tree="ema", dtype="float32")
  return experiment.parse(config), folder / "run", state, folder / "out"


@pytest.mark.slow
def test_latents_that_are_not_square_are_trained_sampled_and_exported(pytorch, ours, tmp_path):
  """32x48 images of 4x6x16 latents, from their folder to pixels in JAX, PyTorch and StableHLO."""
  config = tiny_config()
  cfg = vae.load("random-small-16").cfg
  config.data.update({"name": "latents", "vae": "random-small-16", "dir": str(tmp_path / "data")})
  config.data.update({"channels": 16, "image_size": (4, 6)})
  config.data.update({"vae_scale": cfg.scale, "vae_shift": cfg.shift})
  config.model.size = "SiT-XXS/2"
  config.update({"steps": 4, "sample": {"num_images": 3, "steps": "2"}})
  (tmp_path / "data").mkdir()
  benchmark.write_random_latents(experiment.parse(config).data, str(tmp_path / "data"))
  state = train.train(config, str(tmp_path / "run"), jax.devices()[:1])
  generate.write_samples(config, str(tmp_path / "run"), str(tmp_path / "x.npz"), jax.devices()[:1])
  drawn = np.load(tmp_path / "x.npz")["arr_0"]
  assert drawn.shape == (3, 32, 48, 3)

  export.export(str(tmp_path / "run"), str(tmp_path / "out"), tree="ema", dtype="float32")
  assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == [4, 6]
  trained = restore.read(str(tmp_path / "out"))
  assert_equal(trained.params, state.ema)
  x0 = np.asarray(sampling.draw_noise(jax.random.key(0), np.arange(3), trained.exp.image_shape))
  x1 = ours.sample(ours.load(tmp_path / "out"), to_torch(pytorch, x0), [0, 1, 2], 0.5, 2)
  expected = jax_samples(trained.exp, state.ema, x0, np.arange(3), np.full(3, 0.5), 2)
  assert relative(to_numpy(x1), np.asarray(expected)) < 1e-4

  stablehlo.write(trained.exp, state.ema, str(tmp_path / "hlo"), (2,), about="it")
  program = lambda name: jax.export.deserialize(bytearray((tmp_path / "hlo" / name).read_bytes()))
  arrays = lambda name: dict(np.load(tmp_path / "hlo" / name))
  x1 = program("sampler_2.stablehlo").call(
    arrays("parameters.npz"), x0, np.arange(3, dtype=np.int32), np.full(3, 0.5, np.float32)
  )
  pixels = np.asarray(program("decoder.stablehlo").call(arrays("decoder.npz"), x1))
  assert np.abs(pixels.astype(int) - drawn).max() <= 1


@pytest.mark.slow
def test_training_imports_when_it_begins_and_not_when_it_continues(workdir, trained, tmp_path):
  _, run, state, _ = trained
  for (path, a), (_, b) in zip(leaves(state.params), leaves(workdir[2].ema), strict=True):
    assert np.abs(a - b).max() > 1e-4, path  # it has learnt
    assert np.vdot(a, b) > 0.9 * np.linalg.norm(a) * np.linalg.norm(b), path
  config = tiny_config()
  config.update({"steps": 16, "init_from": str(tmp_path / "gone")})
  assert int(train.train(config, str(run), jax.devices()[:1]).step) == 16
  with pytest.raises(FileNotFoundError, match=r"no weights under .*gone.*no such file"):
    train.train(config, str(tmp_path / "another"), jax.devices()[:1])


# In PyTorch.


@pytest.fixture(scope="module")
def ours(pytorch):
  """Our PyTorch module."""
  from ism_jax.export import ism_pytorch as module

  return module


def pytorch_network(torch, ours, net, params, shape):
  """The network in PyTorch, loaded as state dicts are."""
  depth, width, heads = net.cfg.dimensions
  config = ours.Config(
    depth=depth,
    width=width,
    heads=heads,
    patch=net.cfg.patch,
    image_size=shape[0] if shape[0] == shape[1] else list(shape[:2]),
    channels=shape[2],
    num_classes=net.num_classes,
    guided=net.guided,
    w_max=3.5,
    fixed_w=0.5,
    t_interval=0.3,
    vae="",
    vae_scale=1.0,
  )
  module = ours.SiT(config)
  state = sit.from_params(params, net, shape)
  module.load_state_dict({key: torch.from_numpy(np.array(a)) for key, a in state.items()})
  return module.requires_grad_(False)


def to_torch(torch, x):
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def to_numpy(x):
  return np.moveaxis(x.float().numpy(), 1, -1)


def relative(actual, expected):
  return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("size", "depth", "shape"),
  [("SiT-S/2", 12, (32, 32, 4)), ("SiT-XL/2", 2, (32, 32, 4)), ("SiT-XS/4", 6, (12, 40, 3))],
)
def test_the_networks_agree(pytorch, ours, monkeypatch, size, depth, shape):
  monkeypatch.setitem(model._SIZES, "XL", (2, 1152, 16))
  net = network(size, classes=1000)
  assert net.cfg.dimensions[0] == depth
  params = random_params(net, shape)
  x, *conditions = inputs(shape, 1000)
  expected = np.asarray(jax.jit(model.velocity_function(net, params))(x, *conditions))
  module = pytorch_network(pytorch, ours, net, params, shape)
  actual = module(to_torch(pytorch, x), *map(pytorch.from_numpy, conditions))
  assert np.abs(expected).max() > 0.1
  assert relative(to_numpy(actual), expected) < 1e-5


@pytest.mark.slow
def test_it_compiles_whole_and_takes_either_memory_format(pytorch, ours):
  net = network()
  module = pytorch_network(pytorch, ours, net, random_params(net, SHAPE), SHAPE)
  x0, c = ours.draw_noise(module, 3, seed=0), pytorch.tensor([0, 1, 5])
  expected = ours.sample(module, x0, c, 0.5, 2)
  # All but the generation of machine code, which takes a compiler and a minute.
  compiled = pytorch.compile(module, fullgraph=True, backend="aot_eager")
  actual = ours.sample(compiled, x0, c, 0.5, 2)
  assert relative(to_numpy(actual), to_numpy(expected)) < 1e-6
  last = x0.to(memory_format=pytorch.channels_last)
  assert not last.is_contiguous()
  assert relative(to_numpy(ours.sample(module, last, c, 0.5, 2)), to_numpy(expected)) < 1e-6


@pytest.mark.slow
def test_schedules_are_those_of_training(ours):
  schedules = [
    1,
    2,
    "4",
    8,
    16,
    32,
    64,
    128,
    "1/2,1/4,1/4",
    "1/64," * 63 + "1/128,1/128",
    "1/2, .5",
  ]
  for steps in schedules:
    assert ours.parse_schedule(steps) == list(paths.parse_schedule(steps))
  for steps in [0, 3, 256, -4, "", "x", "1/4,1/2,1/4", "1/2", "1/2,1/2,1/2", "1/3,2/3", "3/4,1/4"]:
    with pytest.raises(ValueError):
      paths.parse_schedule(steps)
    with pytest.raises(ValueError, match="is no schedule: give a count"):
      ours.parse_schedule(steps)


def jax_samples(exp, params, x0, c, w, steps):
  velocity, schedule = model.velocity_function(exp.network(), params), paths.parse_schedule(steps)
  if exp.objective.intrinsic:
    return jax.jit(lambda x0: sampling.sample(velocity, x0, c, w, schedule))(x0)
  fixed = lambda x0: sampling.sample_fixed(
    velocity, x0, c, w, schedule, t_interval=exp.objective.t_interval, null_class=exp.null_class
  )
  return jax.jit(fixed)(x0)


@pytest.mark.slow
def test_a_trained_network_and_its_samples_agree(pytorch, ours, trained):
  exp, _, state, folder = trained
  module = ours.load(folder)
  x, *conditions = inputs(exp.image_shape, 10)
  expected = model.velocity_function(exp.network(), state.ema)(x, *conditions)
  actual = module(to_torch(pytorch, x), *map(pytorch.from_numpy, conditions))
  assert np.abs(expected).max() > 0.1
  assert relative(to_numpy(actual), np.asarray(expected)) < 1e-5

  c, w = np.array([3, 0, 10, 9]), np.float32([0.0, 0.5, 2.0, 3.5])
  for steps in (1, 2, 4, "1/2,1/4,1/4"):
    expected = np.asarray(jax_samples(exp, state.ema, x, c, w, steps))
    actual = ours.sample(module, to_torch(pytorch, x), c, w, steps)
    assert relative(to_numpy(actual), expected) < 1e-4
    pixels, round_trip = (
      ours.to_pixels(module, actual).numpy(),
      np.asarray(generate.to_uint8(expected)),
    )
    assert pixels.shape == round_trip.shape and pixels.dtype == np.uint8
    # A value between two levels may be rounded either way.
    assert np.abs(pixels.astype(int) - round_trip).max() <= 1
    assert (pixels == round_trip).mean() > 0.99


@BOTH
@pytest.mark.slow
def test_guidance_of_either_kind_samples_alike(pytorch, ours, workdir, tmp_path):
  folder, exp, state = workdir
  export.export(str(folder), str(tmp_path / "out"), tree="ema", dtype="float32")
  module = ours.load(tmp_path / "out")
  x, c = inputs(exp.image_shape, 10)[0], np.array([3, 0, 10, 9])
  finest = "1/2,1/4,1/8," + ",".join(["1/128"] * 16)
  for w, steps in ((0.5, 4), (0.5, finest), (1.5, 128)):
    expected = np.asarray(jax_samples(exp, state.ema, x, c, np.full(4, w, np.float32), steps))
    actual = ours.sample(module, to_torch(pytorch, x), c, w, steps)
    assert relative(to_numpy(actual), expected) < 1e-4
  if not exp.objective.intrinsic:
    assert not any(key.startswith("w_embedder") for key in module.state_dict())
    for steps in (4, finest):
      with pytest.raises(ValueError, match=r"learnt the fixed guidance w=0\.5 in its long steps"):
        ours.sample(module, to_torch(pytorch, x), c, 1.5, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [{}, {"w_scaled": True}, {"t_interval_max": 0.5, "t_interval": 0.25}],
  ids=["fm", "w_scaled", "interval"],
)
def test_networks_that_are_not_the_papers_sample_alike(pytorch, ours, tmp_path, changes):
  config = tiny_config("ism" if changes else "fm")
  config.objective.update(changes)
  exp = experiment.parse(config)
  params = random_params(exp.network(), exp.image_shape)
  trained = restore.Trained(exp, files.as_dict(config), 4, "ema", params)
  export.write(trained, str(tmp_path / "out"), dtype="float32")
  module = ours.load(tmp_path / "out")
  x, c, w = inputs(exp.image_shape, 10)[0], np.array([3, 0, 10, 9]), np.float32([0, 0.5, 2, 3.5])
  for steps in (1, 4, "1/2,1/4,1/4"):
    sample_of = lambda trained, steps=steps: generate.sampler(
      trained.exp, paths.parse_schedule(steps)
    )
    expected = np.asarray(jax.jit(sample_of(trained))(params, x, c, w))
    actual = ours.sample(module, to_torch(pytorch, x), c, w, steps)
    assert relative(to_numpy(actual), expected) < 1e-4
  again = restore.read(str(tmp_path / "out"))
  assert relative(np.asarray(jax.jit(sample_of(again))(again.params, x, c, w)), expected) < 1e-5


@pytest.mark.slow
def test_the_folder_works_alone_as_its_card_says(pytorch, ours, trained, tmp_path):
  exp, _, state, folder = trained
  code = (folder / "README.md").read_text().split("```python\n")[2].partition("```")[0]
  script = (
    "import sys\n"
    "class Absent:\n"
    "  def find_spec(self, name, *_):\n"
    "    if name.partition('.')[0] in ('ism_jax', 'jax', 'flax', 'safetensors', 'diffusers'):\n"
    "      raise ImportError(name)\n"
    "sys.meta_path.insert(0, Absent())\n"
    f"{code}\n"
    f"torch.save((x0, x1, pixels), {str(tmp_path / 'samples.pt')!r})\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, cwd=folder)
  x0, x1, pixels = pytorch.load(tmp_path / "samples.pt")
  expected = jax_samples(exp, state.ema, to_numpy(x0), np.arange(8), np.full(8, 0.5, "f"), 4)
  assert relative(to_numpy(x1), np.asarray(expected)) < 1e-4
  assert (
    pixels.shape == (8, 8, 8, 1) and pixels.dtype == pytorch.uint8 and pixels.float().std() > 10
  )


@pytest.mark.slow
def test_bfloat16_keeps_the_conditioning_in_float32(pytorch, ours, workdir, tmp_path):
  folder, exp, state = workdir
  export.export(str(folder), str(tmp_path / "out"), tree="ema", dtype="bfloat16")
  half, full = ours.load(tmp_path / "out"), ours.load(tmp_path / "out", dtype=pytorch.float32)
  assert {p.dtype for p in half.parameters()} == {pytorch.bfloat16}
  t = pytorch.tensor([127 / 128, 1.0])
  pytorch.testing.assert_close(half.t_embedder(t), full.t_embedder(t), rtol=0, atol=0)
  x, t, c, d, w = inputs(exp.image_shape, 10)
  arguments = (to_torch(pytorch, x), *map(pytorch.from_numpy, (t, c, d, w)))
  assert half(*arguments).dtype == pytorch.float32
  actual, expected = to_numpy(half(*arguments)), to_numpy(full(*arguments))
  assert 1e-5 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 0.05
  rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype("f"), state.ema)
  theirs = model.velocity_function(exp.network(), rounded)(x, t, c, d, w)
  positions = sit.from_params({}, exp.network(), exp.image_shape)["pos_embed"]
  full.pos_embed.copy_(pytorch.from_numpy(positions))  # which theirs does not round
  expected = to_numpy(full(*arguments))
  assert relative(expected, np.asarray(theirs)) < 1e-5


@pytest.mark.slow
def test_latents_are_decoded_by_the_autoencoder_of_the_config(pytorch, ours, monkeypatch):
  import diffusers

  cfg = vae.VaeConfig(channels=(8, 16), blocks=1, groups=2)
  pytorch.manual_seed(0)
  autoencoder = diffusers.AutoencoderKL(
    block_out_channels=cfg.channels,
    layers_per_block=1,
    norm_num_groups=2,
    latent_channels=4,
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
  )
  state = {key: a.numpy() for key, a in autoencoder.state_dict().items()}
  params = vae.params_from_state_dict(cfg, state)
  asked = []
  monkeypatch.setattr(
    diffusers.AutoencoderKL, "from_pretrained", lambda name: asked.append(name) or autoencoder
  )
  net = network()
  module = pytorch_network(pytorch, ours, net, random_params(net, SHAPE), SHAPE)
  object.__setattr__(module.config, "vae", "someone/vae")
  object.__setattr__(module.config, "vae_scale", cfg.scale)
  x1 = np.random.default_rng(0).standard_normal((5, 4, 4, 4), np.float32)
  expected = np.asarray(generate.to_uint8(vae.decode(cfg, params, x1))).astype(int)
  assert expected.std() > 5
  for decoder in (None, autoencoder, None):
    actual = ours.to_pixels(module, to_torch(pytorch, x1), decoder).numpy().astype(int)
    assert actual.shape == expected.shape == (5, 8, 8, 3)
    assert np.abs(actual - expected).max() <= 1 and (actual == expected).mean() > 0.99
  assert asked == ["someone/vae"]
  # Another scale: refused of an autoencoder that says its own, and otherwise undone.
  other = dataclasses.replace(cfg, scale=0.3611, shift=0.1159)
  object.__setattr__(module.config, "vae_scale", other.scale)
  object.__setattr__(module.config, "vae_shift", other.shift)
  with pytest.raises(ValueError, match=r"factor=0\.18215 .* latents have 0\.3611 and 0\.1159"):
    ours.to_pixels(module, to_torch(pytorch, x1), autoencoder)
  autoencoder.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
  expected = np.asarray(generate.to_uint8(vae.decode(other, params, x1))).astype(int)
  actual = ours.to_pixels(module, to_torch(pytorch, x1), autoencoder).numpy().astype(int)
  assert np.abs(actual - expected).max() <= 1 and (actual == expected).mean() > 0.99


@pytest.mark.slow
def test_pytorch_refuses_what_the_network_was_not_trained_for(pytorch, ours, trained):
  module = ours.load(trained[3])
  x0 = ours.draw_noise(module, 2, seed=0)
  assert not pytorch.equal(x0, ours.draw_noise(module, 2, seed=1))
  pytorch.testing.assert_close(x0, ours.draw_noise(module, 3, seed=0)[:2])
  for args, message in (
    ((x0[:, :, :4], 0), r"x0 has shape \(2, 1, 4, 8\); the network needs \[B, 1, 8, 8\], B >= 1"),
    ((x0[:0], 0), r"x0 has shape \(0, 1, 8, 8\)"),
    ((np.zeros((2, 8, 8, 1)), 0), r"x0 has shape \(2, 8, 8, 1\)"),
    (("noise", 0), "x0 is a str that is no numbers, array or tensor"),
    ((x0, 11), r"classes are 0\.\.9, and 10 for none; got 11\.\.11"),
    ((x0, 1.7), r"classes are torch\.float32; needed are whole numbers"),
    ((x0, True), r"classes are torch\.bool; needed are whole numbers"),
    ((x0, np.float64([1, 2])), r"classes are torch\.float64"),
    ((x0, [1, 2, 3]), r"c has shape \(3,\); needed is a number, or \[2\]"),
    ((x0, [[1], [2]]), r"c has shape \(2, 1\)"),
    ((x0, "tabby"), "c is a str that is no numbers"),
    ((x0, 0, [0.5]), r"w has shape \(1,\); needed is a number, or \[2\]"),
    ((x0, 0, None), "w is a NoneType that is no numbers"),
    ((x0, 0, -0.5), "w is negative"),
    ((x0, 0, float("nan")), "w is negative or beyond 100"),
    ((x0, 0, float("inf")), "w is negative or beyond 100"),
    ((x0, 0, 0.5, 10**12), r"steps=10{12} is no schedule"),
    ((x0, 0, 0.5, "1e999999999,1/2"), "is no schedule"),
  ):
    with pytest.raises(ValueError, match=message):
      ours.sample(module, *args)
  with pytest.raises(ValueError, match="count=0 must be at least 1"):
    ours.draw_noise(module, 0, seed=0)
  with pytest.raises(ValueError, match="seed=4294967297 would draw the noise of seed 1"):
    ours.draw_noise(module, 2, seed=2**32 + 1)
  with pytest.raises(FloatingPointError, match="samples are not finite"):
    ours.sample(module, x0 * float("nan"), 0)
  # What JAX's sampler takes.
  as_arrays = ours.sample(module, x0.numpy(), np.array([3, 10]), np.float32([0, 1.5]), 2)
  expected = ours.sample(module, x0, pytorch.tensor([3, 10]), pytorch.tensor([0, 1.5]), 2)
  pytorch.testing.assert_close(as_arrays, expected, rtol=0, atol=0)
  with pytest.warns(UserWarning, match=r"trained maximum, w_max=3\.5"):
    ours.sample(module, x0, 0, 4.0, 1)


@pytest.mark.slow
def test_pytorch_refuses_damaged_folders(pytorch, ours, trained, tmp_path):
  folder = trained[3] / "transformer"
  files = {p.name: p.read_bytes() for p in folder.iterdir()}
  weights = files["diffusion_pytorch_model.safetensors"]
  state = safetensors.numpy.load(weights)
  other = {k: a for k, a in state.items() if "fc1.bias" not in k} | {"more": state["pos_embed"]}
  other["x_embedder.proj.bias"] = np.zeros(7, np.float32)
  config = json.loads(files["config.json"])
  with pytest.raises(
    FileNotFoundError, match=r"is no export: it has no transformer/.* and no model"
  ):
    ours.load(tmp_path)
  (tmp_path / "transformer").mkdir()

  def refused(*messages, **changed):
    for name, data in files.items():
      key = name.partition(".")[0].rpartition("_")[2]
      (tmp_path / "transformer" / name).write_bytes(changed.get(key, data))
    with pytest.raises(ValueError) as error:
      ours.load(tmp_path)
    assert all(message in str(error.value) for message in messages), error.value

  for data in (weights[:-1], weights[:100], weights[:4], b"", b"<html>", b"\xff" * 99):
    refused("is damaged, or no safetensors file", model=data)
  # All keys, not the first.
  keys = [f"blocks.{i}.mlp.fc1.bias" for i in range(3)]
  refused(*keys, '"more"', "x_embedder.proj.bias", model=safetensors.numpy.save(other))
  refused("size mismatch", config=json.dumps(config | {"width": 48}).encode())
  refused(
    "lacks heads, vae",
    config=json.dumps({k: v for k, v in config.items() if k not in ("heads", "vae")}).encode(),
  )
  for content in (files["config.json"][:-9], b"\xff", b"[" * 10**5):
    refused("is damaged", config=content)
  refused("is damaged, or no safe", model=struct.pack("<Q", 9) + b'["arrays"]')


@pytest.mark.slow
def test_what_sits_training_saves_is_read(pytorch, ours, tmp_path):
  """A file as the official code writes it: raw parameters, an average, Adam's state, arguments."""
  torch, net = pytorch, network()
  state, params = published(net, learn_sigma=True)
  tensors = {key: torch.from_numpy(np.array(a)) for key, a in state.items()}
  weight = torch.nn.Parameter(torch.ones(3))
  adam = torch.optim.AdamW([weight])
  weight.sum().backward()
  adam.step()
  saved = {
    "model": {key: a + 1 for key, a in tensors.items()},
    "ema": tensors,
    "opt": adam.state_dict(),
    "args": argparse.Namespace(model="SiT-XXS/2"),
  }
  torch.save(saved, tmp_path / "0100000.pt")
  assert_equal(sit.load(tmp_path / "0100000.pt", net, SHAPE), params)
  torch.save(tensors, tmp_path / "bare.pt")
  assert_equal(sit.load(tmp_path / "bare.pt", net, SHAPE), params)

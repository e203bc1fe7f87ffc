"""The public names, on networks at random weights and on checkpoints."""

import json
import pathlib
import shutil
import subprocess
import sys

from examples import draw_samples, random_params, tiny_config
import hub_stand_in
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import ism_jax
from ism_jax import api, experiment, generate, paths
from ism_jax import state as state_lib
from ism_jax.export import pytorch
from ism_jax.pretrained import vae as vae_lib
from ism_jax.runtime import checkpoints, files, sharding

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def logging_as_it_is():
  """Nothing here configures the logging of all tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(api, "_log_as_commands_do", lambda: None)
    yield


def model_of(config, devices=2):
  exp, mesh = experiment.parse(config), sharding.data_mesh(jax.devices()[:devices])
  params = jax.device_put(random_params(exp.network(), exp.image_shape), sharding.replicated(mesh))
  return ism_jax.Model(exp, params, mesh, "random")


@pytest.fixture(scope="module")
def model():
  return model_of(tiny_config())


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
  """Two checkpoints, of which each tree has parameters of its own."""
  folder = tmp_path_factory.mktemp("run")
  exp = model.experiment
  state = state_lib.create(model.params, state_lib.optimizer(exp.optimizer, exp.total_steps))
  times = lambda factor: jax.tree.map(lambda a: factor * a, model.params)
  with checkpoints.open_manager(folder, keep=2) as manager:
    for step, scale in ((4, 0.5), (8, 1.0)):
      trees = {"ema": times(scale), "target_ema": times(0.2 * scale), "params": times(-scale)}
      checkpoints.save(manager, step, state.replace(**trees), {}, files.as_dict(tiny_config()))
  return folder


def assert_equal_trees(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


def close(images, others):
  """Equal but for the order of float sums, which may round to the next level."""
  difference = np.abs(images.astype(int) - others.astype(int))
  return images.shape == others.shape and difference.max() <= 1 and difference.mean() < 1e-2


def test_importing_the_package_imports_nothing_else():
  script = (
    "import sys, ism_jax\n"
    "assert not {'jax', 'numpy', 'absl'} & set(sys.modules), 'import ism_jax is not light'\n"
    "assert {'load', 'fit', 'Model', 'picture'} <= set(dir(ism_jax))\n"
    "try: ism_jax.lod\n"
    "except AttributeError as error: assert 'load' in str(error)\n"
    "else: raise AssertionError\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.slow
def test_samples_are_those_of_the_command_whatever_the_batch_size(model):
  images, labels = draw_samples(
    model.experiment,
    model.mesh,
    model.params,
    num_images=13,
    steps="1/2,1/4,1/4",
    w=0.5,
    seed=7,
    batch_size=13,
  )
  for batch_size in (4, 100):
    others, other_labels = model.sample(
      13, steps="1/2,1/4,1/4", w=0.5, seed=7, batch_size=batch_size
    )
    assert others.dtype == np.uint8 and close(others, images)
    np.testing.assert_array_equal(other_labels, labels)
  assert not close(model.sample(13, steps=4, w=0.5, seed=7)[0], images)


def test_one_schedule_is_compiled_once_however_it_is_written(model):
  schedules = (4, "4", " 4", "1/4,1/4,1/4,1/4", "1/4, .25, 1/4, 1/4")
  generate.sample_function.cache_clear()
  images = [model.sample(4, steps=steps)[0] for steps in schedules]
  assert generate.sample_function.cache_info().currsize == 1
  sample = generate.sample_function(model.experiment, model.mesh, paths.parse_schedule(4))
  assert sample._cache_size() == 1
  for other in images[1:]:
    np.testing.assert_array_equal(other, images[0])


@pytest.mark.slow
def test_noise_labels_and_guidance_are_each_images_own(model):
  noise, labels, w = model.noise(6, seed=3), np.array([4, 1, 9, 10, 0, 4]), np.linspace(0, 3, 6)
  images, _ = model.sample(steps=2, noise=noise, labels=labels, w=w)
  assert len(np.unique(images.reshape(6, -1), axis=0)) == 6
  for i in (0, 3, 5):
    image, label = model.sample(
      1, steps=2, noise=noise[i : i + 1], labels=int(labels[i]), w=float(w[i])
    )
    assert close(image, images[i : i + 1]) and label == labels[i]
  assert close(model.sample(steps=2, labels=labels, w=w, seed=3)[0], images)
  assert not close(model.sample(steps=2, labels=labels, w=0.0, seed=3)[0], images)


@pytest.mark.slow
def test_a_step_of_the_velocity_is_a_one_step_sample(model):
  noise = model.noise(4)
  x1 = noise + np.asarray(model.velocity(noise, 0.0, 7, d=1.0, w=1.5))
  images, _ = model.sample(steps=1, labels=np.full(4, 7), w=1.5)
  assert close(images, np.uint8(np.clip(np.round(127.5 * (x1 + 1)), 0, 255)))
  inside = jax.jit(lambda x: model.velocity(x, 0.0, jnp.full(4, 7), d=1.0, w=1.5))(noise)
  np.testing.assert_allclose(noise + inside, x1, atol=1e-5)


@pytest.mark.slow
def test_latents_are_decoded():
  config = tiny_config()
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4})
  model, vae = model_of(config), generate.load_vae("random-small")
  images, labels = model.sample(3, steps=1, w=0.5)
  noise = model.noise(3)
  latents = noise + model.velocity(noise, 0.0, labels, d=1.0, w=0.5)
  wanted = generate.to_uint8(vae_lib.decode(vae.cfg, vae.params, latents))
  assert images.shape == (3, 64, 64, 3) and close(images, np.asarray(wanted))


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ({"num_images": 3, "labels": [1, 2]}, "num_images: 3, labels: 2"),
    ({"num_images": 0}, "at least 1; given are num_images: 0"),
    ({"num_images": -1}, "at least 1"),
    ({"num_images": 2, "labels": 11}, "classes are 0 to 9, and 10 is no class"),
    ({"num_images": 2, "labels": 1.5}, "labels are float64"),
    ({"num_images": 2, "labels": [2**32, 0]}, "label 4294967296: classes are 0 to 9"),
    ({"num_images": 2, "labels": np.zeros((2, 1), int)}, r"labels has shape \(2, 1\)"),
    ({"num_images": 2, "batch_size": 0}, r"batch_size=0: give a whole number in \[1, 1e6\]"),
    ({"noise": np.zeros((2, 8, 8, 3))}, r"needed is \(2, 8, 8, 1\)"),
    ({"num_images": 2, "steps": 3}, "off the trained grid"),
    ({"num_images": 2, "seed": 2**32}, r"seed=4294967296: give a whole number in \[0, 2\^32\)"),
    ({"num_images": 2, "w": np.nan}, "w=nan: give a number"),
    ({"num_images": 2, "w": -1.0}, r"w=-1.0: give a number in \[0, 100\]"),
  ],
)
def test_what_cannot_be_sampled_is_refused(model, asked, message):
  with pytest.raises(ValueError, match=message):
    model.sample(**{"steps": 1, "w": 0.5, **asked})


@pytest.mark.slow
def test_noise_that_is_not_finite_is_not_drawn_black(model):
  with pytest.raises(FloatingPointError, match="not finite"):
    model.sample(steps=1, w=0.5, noise=np.full((2, 8, 8, 1), np.nan))


@pytest.mark.slow
def test_a_workdir_gives_the_newest_average_or_the_tree_and_step_asked_for(model, workdir):
  newest = ism_jax.load(str(workdir), devices=jax.devices()[:2])
  assert_equal_trees(newest.params, model.params)
  assert newest.experiment == model.experiment and "inference EMA, step 8" in repr(newest)
  other = ism_jax.load(workdir, tree="params", step=4)
  assert_equal_trees(other.params, jax.tree.map(lambda a: -0.5 * a, model.params))
  with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
    ism_jax.load(workdir, step=5)
  with pytest.raises(ValueError, match="known are ema, target_ema, params"):
    ism_jax.load(workdir, tree="raw")


@pytest.mark.slow
def test_an_export_samples_as_its_workdir_from_a_folder_a_file_or_the_hub(model, workdir, tmp_path):
  folder = tmp_path / "export"
  pytorch.export(str(workdir), str(folder), tree="ema", dtype="float32")
  loaded = ism_jax.load(str(folder))
  assert_equal_trees(loaded.params, model.params)
  assert loaded.experiment.model == model.experiment.model and "step 8" in loaded.about
  assert close(loaded.sample(5, steps=2, w=1.0)[0], model.sample(5, steps=2, w=1.0)[0])
  file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
  assert_equal_trees(ism_jax.load(file).params, model.params)
  with pytest.raises(ValueError, match="leave tree and step out"):
    ism_jax.load(folder, step=8)

  with hub_stand_in.serve(tmp_path / "cache") as hub:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    hub.repositories["someone/digits"] = {"main": files, "v1": files}
    page = f"{huggingface_hub.constants.ENDPOINT}/someone/digits"
    for name in (
      "someone/digits",
      "someone/digits@v1",
      page,
      f"{page}/tree/v1",
      "hf://someone/digits",
    ):
      assert_equal_trees(ism_jax.load(name).params, model.params)
    assert not [path for _, path in hub.requests if path.endswith("README.md")]
    # An older export has its weights beside its config.
    file.rename(folder / "model.safetensors")
    hub.repositories["someone/older"]["main"] = older = dict(files)
    older["model.safetensors"] = older.pop(file.relative_to(folder).as_posix())
    for source in (folder, folder / "model.safetensors", "someone/older"):
      assert_equal_trees(ism_jax.load(source).params, model.params)
    del files["config.json"]
    hub.repositories["someone/other"]["main"] = files
    with pytest.raises(FileNotFoundError, match=r"someone/other'.* no config\.json"):
      ism_jax.load("someone/other")


def test_what_is_no_model_says_what_is_needed(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"no checkpoints, and no config\.json.* Needed is the"
  ):
    ism_jax.load(tmp_path)
  with pytest.raises(FileNotFoundError, match="no such file or folder"):
    ism_jax.load("/not/there/at/all")
  (tmp_path / "model.safetensors").write_bytes(b"")
  texts = ('{"model_type": "bert"}', "[]", "{", "[" * 10**5, '{"config": [], "tree": 1, "step": 2}')
  for content in (*map(str.encode, texts), b'{"config": "\xff"}'):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is none that python -m ism_jax export"):
      ism_jax.load(tmp_path)

  with (
    hub_stand_in.in_place_of_the_hub("http://127.0.0.1:9", tmp_path / "cache"),
    pytest.raises(FileNotFoundError, match=r"hub did not give .*/someone/digits \(ConnectError: "),
  ):
    ism_jax.load("someone/digits")


def test_a_path_in_a_script_is_that_of_a_command(model, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}/run"):
    ism_jax.load("~/run")
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=f"{tmp_path}/file/run cannot be written"):
    ism_jax.fit(tiny_config(), "~/file/run")
  with pytest.raises(FileExistsError, match=f"{tmp_path} is there and not empty"):
    model.export_sampler("~", 1)


def test_a_picture_has_a_row_for_each_caption_and_keeps_every_pixel():
  rng = np.random.default_rng(0)
  rows = {"a": rng.integers(0, 256, (3, 8, 8, 1), np.uint8), "long caption": np.zeros((2, 8, 8, 1))}
  with pytest.raises(ValueError, match=r"images are float64 \(2, 8, 8, 1\)"):
    ism_jax.picture(rows)
  with pytest.raises(ValueError, match=r"one size are needed; given are \[\(4, 8\), \(8, 8\)\]"):
    ism_jax.picture({1: rows["a"], 2: rows["a"][:, :4]})
  rows["long caption"] = rng.integers(0, 256, (2, 8, 8, 1), np.uint8)
  pixels = np.asarray(ism_jax.picture(rows, enlarge=2))
  margin = pixels.shape[1] - (3 * 16 + 2 * 2)  # two pixels between images
  assert pixels.shape[0] == 2 * 16 + 2 and 60 < margin < 150
  for i, row in enumerate(rows.values()):
    for j, image in enumerate(row):
      tile = pixels[18 * i : 18 * i + 16 : 2, margin + 18 * j : margin + 18 * j + 16 : 2]
      np.testing.assert_array_equal(tile, np.repeat(image, 3, axis=2))
    assert pixels[18 * i : 18 * i + 16, :margin].min() < 100  # letters
  plain = ism_jax.picture(np.zeros((13, 4, 6, 3), np.uint8), columns=5)
  assert isinstance(plain, Image.Image) and plain.size == (5 * 8 - 2, 3 * 6 - 2)


def without_this_project(folder, script):
  """Runs a script in a process that has JAX and NumPy, and nothing that this project is made of."""
  blocked = "ism_jax configs flax optax orbax ott jaxwt clu grain ml_collections absl safetensors"
  header = (
    "import sys\n"
    "class Absent:\n"
    "  def find_spec(self, name, *_):\n"
    f"    if name.partition('.')[0] in {blocked.split()!r}: raise ImportError(name)\n"
    "sys.meta_path.insert(0, Absent())\n"
  )
  subprocess.run([sys.executable, "-c", header + script], check=True, cwd=folder)


def readme_code(folder):
  """The program that the folder's README shows."""
  return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


@pytest.mark.slow
def test_the_exported_sampler_samples_without_this_project_as_its_readme_says(
  model, workdir, tmp_path
):
  folder = tmp_path / "sampler"
  command = ["-m", "ism_jax", "stablehlo", f"--workdir={workdir}", f"--out={folder}"]
  command += ["--steps=1/2,1/4,1/4", "--steps=1"]
  subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
  details = json.loads((folder / "sampler.json").read_text())
  assert details["platforms"] == ["cpu", "tpu", "cuda"]
  shutil.copytree(folder, tmp_path / "elsewhere")
  script = readme_code(folder) + (
    "np.save('images.npy', images)\n"
    # Another batch size, no class, and each image with its own guidance.
    f"one = export.deserialize(bytearray(open({details['programs']['1']!r}, 'rb').read()))\n"
    "assert set(one.platforms) == {'cpu', 'tpu', 'cuda'}\n"
    "c, w = jnp.array([3, 10, 0]), jnp.array([0.0, 0.5, 3.5])\n"
    "np.save('x1.npy', one.call(parameters, x0[:3], c, w))\n"
  )
  without_this_project(tmp_path / "elsewhere", script)
  images, _ = model.sample(8, steps="1/2,1/4,1/4", w=model.experiment.sample.w)
  assert close(np.load(tmp_path / "elsewhere" / "images.npy"), images)
  noise, c, w = model.noise(3), np.array([3, 10, 0]), np.array([0.0, 0.5, 3.5])
  expected = noise + model.velocity(noise, 0.0, c, d=1.0, w=w)
  np.testing.assert_allclose(np.load(tmp_path / "elsewhere" / "x1.npy"), expected, atol=2e-5)


@pytest.mark.slow
def test_an_exported_sampler_of_latents_decodes_them(tmp_path):
  config = tiny_config()
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4})
  model = model_of(config)
  model.export_sampler(str(tmp_path / "sampler"), (1,))
  code = readme_code(tmp_path / "sampler").replace("n, seed = 8, 0", "n, seed = 3, 0")
  without_this_project(tmp_path / "sampler", code + "np.save('images.npy', images)\n")
  images, _ = model.sample(3, steps=1, w=config.sample.w)
  assert images.shape == (3, 64, 64, 3)
  assert close(np.load(tmp_path / "sampler" / "images.npy"), images)


@pytest.mark.slow
def test_fixed_guidance_is_in_the_exported_program(tmp_path):
  model = model_of(tiny_config("sm"))
  model.export_sampler(str(tmp_path / "sampler"), (128,))
  exported = jax.export.deserialize(
    bytearray((tmp_path / "sampler" / "sampler_128.stablehlo").read_bytes())
  )
  with np.load(tmp_path / "sampler" / "parameters.npz") as file:
    parameters = dict(file)
  assert not [name for name in parameters if name.startswith("w_embedder")]
  noise, c = model.noise(5), np.arange(5)
  draw = lambda w: np.asarray(exported.call(parameters, noise, np.int32(c), np.full(5, w, "f")))
  # By hand, in two passes where time has left the interval.
  exp, x = model.experiment, jnp.asarray(noise)
  velocity = jax.jit(model.velocity)
  for i in range(paths.FINEST):
    t = i / paths.FINEST
    conditional, unconditional = velocity(x, t, c), velocity(x, t, np.full(5, exp.null_class))
    w = 0.5 if t >= exp.objective.t_interval else 0.0
    x = x + (conditional + w * (conditional - unconditional)) / paths.FINEST
  np.testing.assert_allclose(draw(0.5), x, atol=1e-4)
  assert np.abs(draw(0.0) - x).max() > 1e-2


@pytest.mark.slow
def test_an_exported_sampler_is_written_whole_or_not_at_all(model, tmp_path, monkeypatch):
  folder = tmp_path / "deep" / "sampler"
  with pytest.raises(ValueError, match="off the trained grid"):
    model.export_sampler(str(folder), (1, 3))
  with pytest.raises(ValueError, match="name numbers of steps"):
    model.export_sampler(str(folder), ())
  with pytest.raises(ValueError, match="steps='12' has a step of 1/12"):
    model.export_sampler(str(folder), "12")
  with monkeypatch.context() as patch:
    patch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
      model.export_sampler(str(folder), (1,))
  assert not folder.exists() and not list(folder.parent.iterdir())
  model.export_sampler(str(folder), ("1", " 1", 1))
  assert sorted(p.name for p in folder.parent.iterdir()) == ["sampler"]
  assert [p.name for p in folder.glob("*.stablehlo")] == ["sampler_1.stablehlo"]
  with pytest.raises(FileExistsError, match="there and not empty"):
    model.export_sampler(str(folder), (1,))


@pytest.mark.slow
def test_fit_trains_to_the_end_and_samples_with_the_average(tmp_path):
  config, one = tiny_config(), jax.devices()[:1]
  model = ism_jax.fit(config, str(tmp_path), one)
  assert_equal_trees(ism_jax.load(tmp_path).params, model.params)
  assert "inference EMA, step 8" in repr(model)
  again = ism_jax.fit(config, str(tmp_path), one)  # nothing is left to do
  assert_equal_trees(again.params, model.params)

"""The folder of an export as a pipeline of diffusers."""

import json
import pathlib
import shutil
import types

from examples import random_params, tiny_config
import jax
import numpy as np
import pytest

import ism_jax
from ism_jax import api, experiment, restore
from ism_jax.data import pipeline
from ism_jax.export import pytorch as export
from ism_jax.pretrained import sit
from ism_jax.pretrained import vae as vae_lib
from ism_jax.runtime import files

pytestmark = pytest.mark.slow
CLASSES = ["tench", "tabby, tabby cat", "crane, bird", "crane, machine", *"efghij"]


def write(out, config):
  exp = experiment.parse(config)
  params = random_params(exp.network(), exp.image_shape)
  trained = restore.Trained(exp, files.as_dict(config), 4, "ema", params)
  export.write(trained, str(out), dtype="float32")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
  """Exports: of an ism, an sm and an oblong network, and of latents whose classes have names."""
  folder = tmp_path_factory.mktemp("exports")
  for variant in ("ism", "sm"):
    write(folder / variant, tiny_config(variant))
  config = tiny_config()
  config.data.update({"image_size": (8, 16), "channels": 3})
  write(folder / "oblong", config)
  (folder / "data").mkdir()
  manifest = {"format": 1, "classes": CLASSES}
  (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
  # An autoencoder under the name of a folder of this machine.
  vae = vae_lib.load("random-small-16")
  (folder / "private").mkdir()
  export._write_weights(folder / "private" / vae_lib.WEIGHTS, vae_lib.state_dict(vae.params))
  export._write_json(folder / "private" / vae_lib.CONFIG, vae_lib.diffusers_config(vae.cfg))
  config = tiny_config()
  config.data.update({"name": "latents", "vae": str(folder / "private"), "channels": 16})
  config.data.update({"vae_scale": vae.cfg.scale, "vae_shift": vae.cfg.shift})
  config.data.dir = str(folder / "data")
  write(folder / "latents", config)
  return folder


@pytest.fixture(scope="module")
def diffusers(pytorch, tmp_path_factory):
  """diffusers, which copies code of exports to a folder of this test."""
  import diffusers
  from diffusers.utils import dynamic_modules_utils, logging

  logging.disable_progress_bar()
  with pytest.MonkeyPatch.context() as patch:
    modules = str(tmp_path_factory.mktemp("modules"))
    patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", modules)
    patch.syspath_prepend(modules)
    yield diffusers


@pytest.fixture(scope="module")
def ours(pytorch):
  from ism_jax.export import ism_pytorch

  return ism_pytorch


@pytest.fixture(scope="module")
def load(diffusers):
  """load(folder, ...): the pipeline, without a progress bar."""

  def load(folder, **options):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe

  return load


@pytest.fixture(scope="module")
def pipe(load, exports):
  return load(exports / "ism")


@pytest.mark.parametrize("variant", ["ism", "sm", "oblong"])
def test_samples_are_those_of_the_pytorch_module_in_any_number_of_steps(
  load, ours, exports, variant
):
  pipe, model = load(exports / variant), ours.load(exports / variant)
  x0, c = ours.draw_noise(model, 3, seed=0), [3, 10, 7]
  for steps in (1, 2, 4, 8, 128, "1/2,1/4,1/4"):
    w = [0, 1.5, 3] if variant != "sm" else [2.0] * 3 if steps == 128 else [0.5] * 3
    expected = ours.sample(model, x0, c, w, steps)
    scale = [1 + a for a in w]
    options = {"num_inference_steps": steps, "latents": x0, "output_type": "latent"}
    actual = pipe(c, guidance_scale=scale, **options).images
    assert expected.std() > 0.1 and (actual - expected).abs().max() < 1e-5
  assert {float(p.scheduler.config.shift) for p in (pipe,)} == {1.0}
  height, width = (8, 16) if variant == "oblong" else (8, 8)
  assert pipe(1, num_inference_steps=1).images[0].size == (width, height)


def test_each_image_has_its_own_guidance_and_generator(pytorch, pipe):
  generators = lambda: [pytorch.Generator().manual_seed(i) for i in (5, 6)]
  together = pipe([1, 2], guidance_scale=[1, 3.5], generator=generators(), output_type="pt").images
  for i, (c, scale) in enumerate(((1, 1), (2, 3.5))):
    alone = pipe(c, guidance_scale=scale, generator=generators()[i], output_type="pt").images
    assert (alone[0] - together[i]).abs().max() < 1e-5
  other = pipe(2, guidance_scale=1, generator=generators()[1], output_type="pt").images
  assert (other[0] - together[1]).abs().max() > 1e-3


def test_images_come_as_pictures_arrays_and_tensors(pytorch, ours, pipe, exports):
  model = ours.load(exports / "ism")
  x0 = ours.draw_noise(model, 2, seed=0)
  draw = lambda kind: pipe([1, 2], latents=x0, output_type=kind, guidance_scale=1.5).images
  expected = ours.to_pixels(model, ours.sample(model, x0, [1, 2], 0.5)).numpy()
  assert [image.size for image in draw("pil")] == [(8, 8), (8, 8)]
  np.testing.assert_array_equal(np.stack(draw("pil")), expected[..., 0])
  np.testing.assert_allclose(255 * draw("np"), expected, atol=0.51)
  np.testing.assert_array_equal(draw("pt").permute(0, 2, 3, 1), draw("np"))
  (images,) = pipe(np.int64(1), latents=x0[:1], output_type="pt", return_dict=False)
  assert (images - draw("pt")[:1]).abs().max() < 1e-5


def test_latents_are_decoded_by_the_exports_own_autoencoder(load, ours, exports, monkeypatch):
  monkeypatch.setattr(api, "_log_as_commands_do", lambda: None)
  pipe, model = load(exports / "latents"), ours.load(exports / "latents")
  in_jax = ism_jax.load(exports / "latents", devices=jax.devices()[:1])
  noise = in_jax.noise(2)
  expected, _ = in_jax.sample(noise=noise, labels=[3, 10], w=[0.0, 1.5], steps=2)
  x0 = np.ascontiguousarray(np.moveaxis(noise, -1, 1))
  pictures = pipe([3, 10], num_inference_steps=2, guidance_scale=[1, 2.5], latents=x0).images
  pixels = ours.to_pixels(model, ours.sample(model, x0, [3, 10], [0.0, 1.5], 2)).numpy()
  assert expected.shape == (2, 64, 64, 3) and expected.std() > 20
  for actual in (np.stack(pictures), pixels):
    assert np.abs(actual.astype(int) - expected).max() <= 1
  for path in (exports / "latents").rglob("*"):
    assert not path.is_file() or b"private" not in path.read_bytes(), path
  without = load(exports / "latents", vae=None)
  assert without(3, output_type="latent").images.shape == (1, 16, 8, 8)
  with pytest.raises(ValueError, match="this folder has no autoencoder"):
    without(3)


def test_classes_go_by_name_where_they_have_one(pytorch, load, pipe, exports):
  named = load(exports / "latents")
  draw = lambda labels: (
    named(labels, generator=pytorch.Generator().manual_seed(0), output_type="latent").images
  )
  pytorch.testing.assert_close(draw(["tabby", 0, "tabby cat"]), draw([1, 0, 1]), rtol=0, atol=0)
  pytorch.testing.assert_close(draw("tabby, tabby cat"), draw(1), rtol=0, atol=0)
  assert named.get_label_ids(["tench", "bird"]) == [0, 2]
  for pipe_, name, message in (
    (named, "crane", r"'crane' is of the classes \[2, 3\]: pass a number"),
    (named, "dog", "'dog' is the name of no class: pass a number. Names are .*tabby"),
    (pipe, "three", "the classes of this model have numbers alone"),
  ):
    with pytest.raises(ValueError, match=message):
      pipe_(name)
  config = json.loads((exports / "latents" / "config.json").read_text())
  assert config["id2label"]["1"] == "tabby, tabby cat"


def test_imagenets_classes_are_known_by_the_ids_of_its_folders(tmp_path):
  config = tiny_config()
  config.data.update({"name": "latents", "vae": "random", "title": "ImageNet"})
  config.data.dir = str(tmp_path)
  data = experiment.parse(config).data
  assert pipeline.class_names(data) is None and pipeline.title(data, None) == "ImageNet"
  for classes, title in ((pipeline._imagenet_ids(), "ImageNet"), (CLASSES, "latents")):
    manifest = {"format": 1, "classes": classes}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    names = pipeline.class_names(data)
    assert pipeline.title(data, names) == title
    assert names == CLASSES or (len(names) == 1000 and names[281] == "tabby, tabby cat")
  digits = experiment.parse(tiny_config()).data
  assert pipeline.class_names(digits) is None and pipeline.title(digits, None) == "digits"


def test_what_is_saved_is_loaded_again(pytorch, load, ours, pipe, exports, tmp_path):
  pipe.save_pretrained(tmp_path / "saved")
  again, model = load(tmp_path / "saved"), ours.load(exports / "ism")
  x0 = ours.draw_noise(model, 2, seed=0)
  draw = lambda pipe: pipe([1, 2], latents=x0, output_type="latent").images
  pytorch.testing.assert_close(draw(again), draw(pipe), rtol=0, atol=0)
  for other in (again.transformer, ours.load(tmp_path / "saved")):
    for key, a in model.state_dict().items():
      pytorch.testing.assert_close(other.state_dict()[key], a, rtol=0, atol=0)
  state, _ = sit.read(tmp_path / "saved")
  assert state.keys() == model.state_dict().keys()
  again.save_pretrained(tmp_path / "saved")  # in its place
  load(tmp_path / "saved")


@pytest.mark.parametrize("place", [("ism", "transformer"), ("ism/transformer", None)])
def test_the_network_alone_is_an_auto_model(pytorch, diffusers, ours, exports, place):
  folder, subfolder = place
  options = {"subfolder": subfolder} if subfolder else {}
  model = diffusers.AutoModel.from_pretrained(
    str(exports / folder), trust_remote_code=True, **options
  )
  expected = ours.load(exports / "ism")
  x0 = ours.draw_noise(expected, 2, seed=0)
  samples = (ours.sample(network, x0, 3, 0.5, 2) for network in (model, expected))
  pytorch.testing.assert_close(*samples, rtol=0, atol=0)
  assert type(model).__name__ == "ISMTransformer2DModel"


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.02), ("float16", 0.005)])
def test_half_precision_is_near(pytorch, load, pipe, ours, exports, dtype, most):
  half = load(exports / "ism", torch_dtype=getattr(pytorch, dtype))
  x0 = ours.draw_noise(ours.load(exports / "ism"), 3, seed=0)
  draw = lambda pipe: pipe([3, 10, 7], latents=x0, output_type="latent").images
  actual, expected = draw(half), draw(pipe)
  assert half.transformer.dtype == getattr(pytorch, dtype) and actual.dtype == pytorch.float32
  assert 1e-5 < (actual - expected).norm() / expected.norm() < most


def test_the_compiled_network_samples_the_same_and_is_saved(pytorch, load, ours, exports, tmp_path):
  pipe = load(exports / "ism")
  x0 = ours.draw_noise(ours.load(exports / "ism"), 3, seed=0)
  draw = lambda: pipe([3, 10, 7], latents=x0, num_inference_steps=2, output_type="latent").images
  expected = draw()
  # All but the generation of machine code, which takes a compiler and a minute.
  pipe.transformer = pytorch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
  pytorch.testing.assert_close(draw(), expected)
  pipe.save_pretrained(tmp_path)
  assert load(tmp_path).transformer.config.width == 96


def test_the_pipeline_refuses_what_the_network_was_not_trained_for(pytorch, load, pipe, exports):
  for options, message in (
    ({"class_labels": 11}, r"classes are 0\.\.9, and 10 for none; got 11"),
    ({"class_labels": [1.7]}, "needed are whole numbers"),
    ({"class_labels": []}, r"x0 has shape \(0, 1, 8, 8\).*x0: latents"),
    ({"guidance_scale": [1, 2]}, r"w has shape \(2,\); .*w: guidance_scale - 1"),
    ({"guidance_scale": 0.5}, "w is negative"),
    ({"guidance_scale": "much"}, "guidance_scale is a str that is no numbers"),
    ({"num_inference_steps": 50}, "steps=50 is no schedule"),
    ({"latents": np.zeros((1, 8, 8, 1))}, r"x0 has shape \(1, 8, 8, 1\)"),
    ({"generator": [pytorch.Generator()] * 2}, "2 generators are given for 1 images"),
    ({"output_type": "jpeg"}, "output_type='jpeg' is unknown; known are pil, np, pt, latent"),
  ):
    with pytest.raises(ValueError, match=message):
      pipe(**{"class_labels": 1, **options})
  with pytest.raises(FloatingPointError, match="not finite"):
    pipe(1, latents=np.full((1, 1, 8, 8), np.nan))
  with pytest.raises(ValueError, match=r"learnt the fixed guidance w=0\.5 in its long steps"):
    load(exports / "sm")(1, guidance_scale=2.5)


def test_of_a_repository_the_files_that_diffusers_asks_for_suffice(
  diffusers, load, exports, tmp_path, monkeypatch
):
  """The hub, of which diffusers downloads some files only: none that the code would import."""
  from diffusers.pipelines import pipeline_utils
  from diffusers.utils import dynamic_modules_utils
  from huggingface_hub.utils import filter_repo_objects

  folder, snapshot = exports / "ism", tmp_path / "snapshot"
  names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]

  def download(repository, name, **_):
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    return shutil.copy(folder / name, snapshot / name)

  def download_all(repository, allow_patterns, ignore_patterns, **_):
    patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
    for name in filter_repo_objects(names, **patterns):
      download(repository, name)
    return str(snapshot)

  siblings = [types.SimpleNamespace(rfilename=name) for name in names]
  about = lambda *_, **__: types.SimpleNamespace(siblings=siblings, sha="0" * 40)
  for module in (pipeline_utils, dynamic_modules_utils):
    monkeypatch.setattr(module, "model_info", about)
    monkeypatch.setattr(module, "hf_hub_download", download)
  monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, **__: "0" * 40)
  monkeypatch.setattr(pipeline_utils, "snapshot_download", download_all)
  assert load("someone/digits")(3).images[0].size == (8, 8)
  assert not (snapshot / "ism_pytorch.py").exists()  # nor was it needed


def test_a_fixed_guidance_that_float32_rounds_is_met(load, tmp_path):
  config = tiny_config("sm")
  config.objective.fixed_w = config.sample.w = config.monitor.w = 0.3
  config.evaluation.w = (0.3,)
  write(tmp_path / "out", config)
  for scale in (None, 1.3):
    assert load(tmp_path / "out")(3, guidance_scale=scale).images[0].size == (8, 8)


@pytest.mark.parametrize("name", ["ism", "sm", "latents"])
def test_the_cards_program_runs(pytorch, diffusers, exports, monkeypatch, name):
  monkeypatch.chdir(exports / name)
  text = pathlib.Path("README.md").read_text()
  scope = {}
  exec(text.split("```python\n")[1].partition("```")[0], scope)
  sizes = {"latents": (64, 64)}
  assert [image.size for image in scope["images"]] == [sizes.get(name, (8, 8))] * 2

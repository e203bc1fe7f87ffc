"""Judging checkpoints and files of images, on a network at random weights."""

import dataclasses
import functools
import json
import logging
import pathlib
import types

from examples import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from ism_jax import experiment, generate, protocol, restore, steps
from ism_jax.data import samples
from ism_jax.evaluation import evaluate, monitor, scores, sweep
from ism_jax.evaluation import reference as references
from ism_jax.metrics import moments
from ism_jax.runtime import checkpoints, files, sharding

IMAGES = 120


def config_of(**evaluation):
  config = tiny_config()
  config.ema.others = (0.9,)
  config.evaluation.update(
    {"num_images": IMAGES, "batch_size": 50, "steps": (1, 2), "w": (0.0, 0.5)} | evaluation
  )
  return config


@pytest.fixture(scope="module")
def mesh():
  return sharding.data_mesh(jax.devices()[:2])


@pytest.fixture(scope="module")
def parameters(mesh):
  exp = experiment.parse(config_of())
  state = steps.init_function(exp, mesh)(steps.base_keys(0).init)
  leaves, tree = jax.tree.flatten(state.ema)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
  return state.replace(ema=jax.tree.unflatten(tree, noisy))


@pytest.fixture
def workdir(parameters, tmp_path):
  with checkpoints.open_manager(str(tmp_path / "run"), keep=1) as manager:
    checkpoints.save(manager, 4, parameters, {}, files.as_dict(config_of()))
  return str(tmp_path / "run")


def without_speed(report):
  return report | {
    "results": [{k: v for k, v in r.items() if k != "images_per_second"} for r in report["results"]]
  }


def test_an_interrupted_evaluation_ends_as_one_that_was_not(workdir, mesh, monkeypatch):
  devices = list(mesh.devices.flat)
  whole = evaluate.evaluate(config_of(), workdir, devices)
  settings, draw = [], generate.batches

  def watched(*args, **kwargs):
    if len(settings) == 2:
      raise KeyboardInterrupt
    settings.append((len(kwargs["schedule"]), kwargs["w"]))
    return draw(*args, **kwargs)

  monkeypatch.setattr(generate, "batches", watched)
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate(config_of(), workdir, devices)
  finished, settings[:] = list(settings), ["one"]
  with pytest.raises(KeyboardInterrupt):  # of another evaluation: nothing is taken over
    evaluate.evaluate(config_of(rounding="truncate"), workdir, devices)
  assert settings == ["one", (1, 0.0)]
  monkeypatch.setattr(generate, "batches", draw)
  evaluate.evaluate(config_of(rounding="truncate", steps=(1,), w=(0.0,)), workdir, devices)

  settings.clear()
  monkeypatch.setattr(generate, "batches", watched)
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate(config_of(), workdir, devices)
  assert settings == finished == [(1, 0.0), (1, 0.5)]
  settings.clear()
  again = evaluate.evaluate(config_of(), workdir, devices)
  assert settings == [(2, 0.0), (2, 0.5)]
  assert without_speed(again) == without_speed(whole)


def test_samples_in_a_file_are_judged_as_those_of_the_checkpoint(workdir, mesh, tmp_path):
  config = config_of(save_samples=True, steps=(1,), w=(0.5,))
  times = lambda: {p: p.stat().st_mtime_ns for p in pathlib.Path(workdir).rglob("*")}
  before, out = times(), str(tmp_path / "ours")
  ours = evaluate.evaluate(config, workdir, list(mesh.devices.flat), out=out)
  path = f"{out}/samples_steps1_w0.5_seed0.npz"
  assert json.loads(pathlib.Path(out, "evaluation.json").read_text())["step"] == ours["step"]
  assert times() == before  # a workdir may be read-only
  theirs = evaluate.evaluate_samples(config, str(tmp_path / "other"), path)
  assert theirs["sha256"] == samples.open(path).protocol()["sha256"]
  (a,), (b,) = ours["results"], theirs["results"]
  for metric, value in a["scores"]["classifier"].items():
    np.testing.assert_allclose(b["scores"]["classifier"][metric], value, rtol=1e-4, err_msg=metric)
  np.testing.assert_allclose(b["spectrum"], a["spectrum"])
  assert "| samples |" in (tmp_path / "other" / "evaluation.md").read_text()

  folder = tmp_path / "folder"
  folder.mkdir()
  with np.load(path) as saved:
    for i, image in enumerate(saved["arr_0"]):
      Image.fromarray(image[..., 0]).save(folder / f"{i:05d}.png")
  (folder / "cut.png").write_bytes((folder / "00000.png").read_bytes()[:-60])
  in_folder = evaluate.evaluate_samples(config, str(tmp_path / "other"), str(folder))
  assert list(in_folder["unreadable"]) == ["cut.png"]
  assert in_folder["num_images"] == theirs["num_images"]
  for metric in ("frechet_distance", "precision", "recall"):
    values = (r["results"][0]["scores"]["classifier"][metric] for r in (in_folder, theirs))
    np.testing.assert_allclose(*values, rtol=1e-4)
  assert "samples (1 more could not be read)" in (tmp_path / "other/evaluation.md").read_text()

  config.sample.update({"num_images": IMAGES, "steps": "1", "w": 0.5, "batch_size": 40})
  generate.write_samples(config, workdir, str(tmp_path / "x.npz"), list(mesh.devices.flat))
  assert times() == before
  with np.load(tmp_path / "x.npz") as sampled, np.load(path) as saved:
    # Other batches sum in another order, and may round to the next level.
    difference = np.abs(np.int32(sampled["arr_0"]) - saved["arr_0"])
    assert difference.max() <= 1 and difference.mean() < 1e-3
    np.testing.assert_array_equal(sampled["arr_1"], saved["arr_1"])


@pytest.mark.parametrize(
  "content", [b"[]", b"{", b"\xff", b"{}", b'{"fingerprint": {}, "results": [{"steps": "1"}]}']
)
def test_what_an_interrupted_evaluation_left_stops_no_other(tmp_path, content, caplog):
  path = tmp_path / "evaluation_partial.json"
  path.write_bytes(content)
  assert evaluate._read_partial(str(path), {}) == {}
  assert f"{path} is damaged, or another file: " in caplog.text
  assert "Beginning anew." in caplog.text
  path.unlink()
  path.mkdir()
  assert evaluate._read_partial(str(path), {}) == {} and "a folder, and no regular" in caplog.text


def test_the_tally_of_batches_is_the_score_of_all_samples(workdir, mesh):
  """The padded and the last, smaller batch count neither twice nor never."""
  config = config_of(steps=(1,), w=(0.5,), save_samples=True)
  report = evaluate.evaluate(config, workdir, list(mesh.devices.flat))
  with np.load(f"{workdir}/samples_steps1_w0.5_seed0.npz") as archive:
    images, labels = archive["arr_0"][..., :1], archive["arr_1"]
  assert len(images) == IMAGES
  reference = references.Reference(experiment.parse(config), mesh)
  (result,) = report["results"]
  for metric, value in reference.score(images, labels)["classifier"].items():
    np.testing.assert_allclose(result["scores"]["classifier"][metric], value, rtol=1e-4)


def test_uniform_labels_are_drawn_and_balanced_ones_are_not():
  balanced, uniform = (
    generate.class_labels(experiment.parse(config_of(labels=kind)), 1000, seed=3)
    for kind in ("balanced", "uniform")
  )
  assert set(np.bincount(balanced)) == {100}
  counts = np.bincount(uniform, minlength=10)
  assert 60 < counts.min() < counts.max() < 140 and len(set(counts)) > 3
  other = generate.class_labels(experiment.parse(config_of(labels="uniform")), 1000, seed=4)
  assert (uniform != other).any()


def test_labels_of_the_data_are_as_frequent_as_its_classes():
  exp = experiment.parse(config_of(labels="data"))
  counts = [600, 0, *[50] * 8]
  labels = generate.class_labels(exp, 10_000, seed=3, counts=counts)
  np.testing.assert_allclose(np.bincount(labels, minlength=10) / 10, counts, atol=30)
  with pytest.raises(ValueError, match=r"labels='data', and neither .* set it to balanced or"):
    generate.class_labels(exp, 1)


def test_truncation_is_half_a_level_darker_than_rounding():
  x = jnp.linspace(-1, 1, 10_001)
  nearest, truncated = (np.asarray(generate.to_uint8(x, r), float) for r in protocol.ROUNDINGS)
  levels = 127.5 * (np.asarray(x, float) + 1)
  assert np.abs(nearest - levels).max() < 0.501 and 0.49 < (levels - truncated).mean() < 0.51
  assert truncated.max() == 255


@pytest.mark.parametrize(
  ("evaluation", "message"),
  [
    ({"networks": "vgg"}, "'vgg' is unknown; known are classifier, random, inception, dinov2"),
    ({"networks": "random,random"}, "names a network twice"),
    ({"rounding": "floor"}, "known are nearest, truncate"),
    ({"labels": "all"}, "known are balanced, uniform, data"),
    ({"networks": "inception,dinov2", "reference": "a.npz"}, "no NETWORK=FILE"),
    ({"networks": "inception,dinov2", "reference": "inception=a"}, "no file for dinov2; add dino"),
    ({"networks": "classifier", "reference": "a.npz"}, "classifier is made of the dataset"),
    ({"networks": "random", "weights": "a.pth"}, "random is made of the dataset"),
  ],
)
def test_a_wrong_protocol_is_an_error_before_anything_is_sampled(evaluation, message):
  with pytest.raises(ValueError, match=message):
    experiment.parse(config_of(**evaluation))


def test_an_autoencoder_of_another_scale_than_the_training_is_refused(mesh):
  config = config_of()
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4})
  cfg = experiment.parse(config).data
  generate.pixels_function(cfg, mesh)
  for factors in ({"vae_scale": 0.13025}, {"vae_shift": 0.5}):
    other = dataclasses.replace(cfg, **factors)
    with pytest.raises(ValueError, match=r"factor=0\.18215 and .*=0\.0, but .* of the training"):
      generate.pixels_function(other, mesh)


def test_latents_are_not_decoded_by_other_weights_under_the_same_name():
  config = config_of()
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4})
  trained = restore.Trained(experiment.parse(config), {}, 4, "ema", {})
  generate.check_decoder(trained)  # of an older checkpoint, which does not say
  encoded = {"vae_sha256": generate.load_vae("random-small").sha256}
  generate.check_decoder(dataclasses.replace(trained, dataset=encoded))
  with pytest.raises(ValueError, match=r"'random-small' has weights of .* of 0123\.\.\.: name"):
    generate.check_decoder(dataclasses.replace(trained, dataset={"vae_sha256": "0123"}))


def test_latents_without_a_reference_say_how_to_make_one(mesh):
  config = config_of(networks="inception", weights="random", enlarge=1)
  config.data.update({"name": "latents", "vae": "random-small", "channels": 4, "image_size": 32})
  with pytest.raises(ValueError, match=r"ism_jax statistics .*--config\.evaluation\.reference="):
    references.Reference(experiment.parse(config), mesh)


def test_too_few_samples_for_a_covariance_are_a_warning_before_sampling(mesh, caplog):
  with caplog.at_level(logging.WARNING):
    references.Reference(experiment.parse(config_of(num_images=50)), mesh)
  assert "50 samples do not determine the covariance of 64 features" in caplog.text


@pytest.mark.parametrize(
  ("name", "split"), [("classifier", "train"), ("random", "train"), ("classifier", "train[1000:]")]
)
def test_real_images_are_at_about_one_floor_whatever_their_number(mesh, name, split):
  """Of the reference, and where it is another split, of the images trained on."""
  exp = experiment.parse(config_of(networks=name, reference_split=split))
  reference = references.Reference(exp, mesh)
  images, labels = reference.images.training
  rng = np.random.default_rng(1)
  times_floor = lambda rows: reference.score(images[rows], labels[rows])[name]["times_floor"]
  # More features than the classifier's take longer.
  for count in (100, 200, 500, len(images)) if name == "classifier" else (500,):
    assert reference.floor(name, count)["count"] == count
    drawn = rng.integers(len(images), size=count)
    assert times_floor(drawn) == pytest.approx(1, abs=0.3), count
  if split == "train":
    # 200 different digits are a ninth of this reference, and a little nearer than drawn ones.
    chosen = rng.permutation(len(images))[:200]
    assert times_floor(chosen) == pytest.approx(1 - 200 / len(images), abs=0.3)
  assert reference.floor(name, 200) is reference.floor(name, 200)


def test_a_row_of_another_number_of_images_says_so(mesh, tmp_path):
  images = np.random.default_rng(0).integers(256, size=(70, 8, 8, 1), dtype=np.uint8)
  np.savez(tmp_path / "a.npz", arr_0=images)
  report = evaluate.evaluate_samples(config_of(), str(tmp_path), str(tmp_path / "a.npz"))
  (network,) = report["networks"]
  assert network["floor"]["count"] == 70 and report["yardsticks"]["noise"]["num_images"] == 1797
  text = (tmp_path / "evaluation.md").read_text()
  assert "| noise (1797 images) |" in text and "Floor: the Fréchet distance of 70 images" in text
  assert "compare only with those of as many samples" in text


def test_too_few_images_for_a_metric_are_an_error_before_anything_is_drawn(
  workdir, mesh, tmp_path, monkeypatch
):
  forbidden = lambda *_, **__: pytest.fail("images were drawn")
  monkeypatch.setattr(generate, "batches", forbidden)
  message = r"evaluation\.num_images=3 is too few: precision and recall by classifier needs at leas"
  for judge in (
    evaluate.check,
    lambda config: evaluate.evaluate(config, workdir, list(mesh.devices.flat)),
  ):
    with pytest.raises(ValueError, match=message):
      judge(config_of(num_images=3))
  np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
  with pytest.raises(ValueError, match=r"few\.npz with 3 images is too few"):
    evaluate.evaluate_samples(config_of(), str(tmp_path), str(tmp_path / "few.npz"))
  config = config_of()
  config.monitor.update({"every": 4, "num_images": 1, "score": True})
  with pytest.raises(
    ValueError, match=r"monitor\.num_images=1 is too few: a covariance by classif"
  ):
    monitor.Monitor(experiment.parse(config), mesh, str(tmp_path))


@pytest.mark.parametrize(
  ("name", "kept", "count", "message"),
  [
    ("inception", None, 9, "the Inception Score by inception needs at least 10 images"),
    ("dinov2", None, 1, "a covariance by dinov2 needs at least 2 images"),
    ("dinov2", 3, 50, "has the features of 3 images, and precision and recall need 4.*=0 for none"),
  ],
)
def test_each_metric_has_its_least_number_of_images(name, kept, count, message):
  """The number above it is enough for `Tally.scores`, and the one below is not."""
  rng = np.random.default_rng(0)
  kept = None if kept is None else rng.random((kept, 2))
  real = scores.Statistics(moments.feature_statistics(rng.random((9, 2))), kept=kept)
  network = types.SimpleNamespace(name=name, held_out_accuracy=None)

  def score(count):
    keep, has_logits = 0 if kept is None else count, name == "inception"
    tally = scores.Tally(network, count, keep=keep, inception_score=has_logits)
    tally.add({"features": rng.random((count, 2)), "logits": rng.random((count, 3))})
    return tally.scores(real, labelled=False)

  with pytest.raises(ValueError, match=message):
    scores.check_count("num_images", count, network, real)
  with pytest.raises(ValueError):
    score(count)
  if kept is None:
    scores.check_count("num_images", count + 1, network, real)
    assert score(count + 1)["frechet_distance"] >= 0


def test_an_evaluation_of_other_images_refuses_what_cannot_be_compared(mesh, tmp_path):
  np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 16, 16, 1), np.uint8))
  with pytest.raises(ValueError, match=r"have shape \(16, 16, 1\), those of the dataset \(8, 8, 1"):
    evaluate.evaluate_samples(config_of(), str(tmp_path), str(tmp_path / "large.npz"))
  np.savez(tmp_path / "c.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8), arr_1=np.arange(8, 12))
  with pytest.raises(ValueError, match="run from 8 to 11; the dataset's are 0 to 9"):
    evaluate.evaluate_samples(config_of(), str(tmp_path), str(tmp_path / "c.npz"))
  assert not (tmp_path / "evaluation.json").exists()


def test_a_sweep_judges_the_best_guidance_again_on_another_seed(workdir, mesh, tmp_path):
  config, out = config_of(seeds=(0, 2)), tmp_path / "sweep"
  run = functools.partial(sweep.sweep, config, workdir, str(out), first=80, trees=("all",))
  result = run()
  assert result["first"] == {"num_images": 80, "seeds": [1]}  # which the full protocol lacks
  assert result["again"] == {"num_images": IMAGES, "seeds": [0, 2]}
  tried = {
    (tree, d["steps"], d["w"]): d["distance"] for tree, each in result["all"].items() for d in each
  }
  assert len(tried) == 8 and list(result["all"]) == ["ema", "ema:0.9"]
  for best in result["best"]:
    of_steps = {key: d for key, d in tried.items() if key[1] == best["steps"]}
    chosen = min(of_steps, key=of_steps.get)
    assert (best["parameters"], best["steps"], best["w"]) == chosen
    assert best["first"] == of_steps[chosen]
    folder = out / f"best-{best['parameters'].replace(':', '-')}"
    again = [
      r["scores"]["classifier"]["times_floor"]
      for r in json.loads((folder / "evaluation.json").read_text())["results"]
      if r["steps"] == best["steps"]
    ]
    assert len(again) == 2 and best["again"] == pytest.approx(np.mean(again))
    assert best["sd"] == pytest.approx(np.std(again, ddof=1))
  assert [best["steps"] for best in result["best"]] == [1, 2]
  figures = {"sweep_ema.png", "sweep_ema-0.9.png"}
  assert {p.name for p in out.glob("sweep*")} >= {"sweep.md", "sweep.json", *figures}
  # All that is there is not made again, but what another protocol asks is.
  times = {p: p.stat().st_mtime_ns for p in out.glob("*/evaluation.json")}
  assert run() == result
  assert {p: p.stat().st_mtime_ns for p in times} == times

"""The reference that a folder of images makes of itself: held-out images, neighbours, copies."""

import dataclasses
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from configs import images as images_config
from ism_jax import data, experiment
from ism_jax.evaluation import evaluate, figures
from ism_jax.evaluation import reference as references
from ism_jax.metrics import features
from ism_jax.runtime import sharding

SIZE = (8, 9)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Where folders of images are prepared."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("prepared")))
    yield


def experiment_of(folder, **evaluation):
  config = images_config.get_config("quick")
  config.data.update({"dir": str(folder), "image_size": SIZE, "held_out": 0.3, "num_threads": 0})
  config.evaluation.update(evaluation)
  return experiment.parse(data.resolve(config))


def write(folder, counts: dict[str, int]):
  """Images of noise in class folders; "" is the folder itself."""
  rng = np.random.default_rng(0)
  for name, count in counts.items():
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / name / f"{i}.png")
  return folder


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory):
  return write(tmp_path_factory.mktemp("images"), {"a": 60, "b": 20})


@pytest.fixture(scope="module")
def mesh():
  return sharding.data_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def reference(folder, mesh):
  return references.Reference(experiment_of(folder, networks="random"), mesh)


def test_samples_are_compared_with_images_that_were_not_trained_on(reference):
  trained, held_out = reference.images.training[0], reference.images.reference
  assert len(trained) + len(held_out) == 80 and len(held_out) == 24
  rows = lambda images: set(map(bytes, images))
  assert not rows(trained) & rows(held_out)
  assert reference.sources["random"] == {"split": "test", "images": 24}


def test_copies_are_nearer_than_held_out_images_and_these_are_as_near_as_themselves(reference):
  def copying(images):
    labels = np.zeros(len(images), int)
    return reference.judge(features.in_batches(images), len(images), labels)["copying"]

  assert copying(reference.images.training[0]) == {"pixels": 1.0, "random": 1.0}
  assert copying(reference.images.reference) == pytest.approx({"pixels": 0.5, "random": 0.5})
  far = np.where(reference.images.reference > 127, 255, 0).astype(np.uint8)
  assert copying(far)["pixels"] < 0.05


def test_the_nearest_images_of_a_copy_begin_with_its_original(reference, tmp_path):
  copies = reference.images.training[0][[3, 40, 5]]
  nearest = reference.neighbours(copies)
  assert list(nearest) == ["pixels", "random"]
  for distances, images in nearest.values():
    assert distances.shape == (3, 3) and images.shape == (3, 3, *SIZE, 3)
    np.testing.assert_array_equal(images[:, 0], copies)
    assert (distances[:, 0] < 1e-4).all() and (np.diff(distances) > 0).all()
  figures.neighbours(copies, nearest, 4, str(tmp_path / "nearest.png"))
  with Image.open(tmp_path / "nearest.png") as picture:
    shown = np.asarray(picture)
  # The row below the samples has their originals.
  enlarged = copies[0].repeat(8, 0).repeat(8, 1)
  places = [
    (y, x)
    for y in range(shown.shape[0] - 63)
    for x in range(shown.shape[1] - 71)
    if (shown[y, x] == enlarged[0, 0]).all() and (shown[y : y + 64, x : x + 72] == enlarged).all()
  ]
  assert len(places) == 3 and len({x for _, x in places}) == 1


def test_one_class_has_no_classifier(prepared, tmp_path, mesh, caplog):
  write(tmp_path / "flat", {"": 30})
  flat = lambda networks: references.Reference(
    experiment_of(tmp_path / "flat", networks=networks), mesh
  )
  assert [n.name for n in flat("classifier,random").networks] == ["random"]
  assert "There is one class, of which there is no classifier: it is left out." in caplog.text
  with pytest.raises(ValueError, match=r"networks='classifier', and there is one class.* random"):
    flat("classifier")


def test_three_images_are_judged_by_themselves_with_a_warning(prepared, tmp_path, mesh, caplog):
  write(tmp_path / "few", {"": 3})
  reference = references.Reference(experiment_of(tmp_path / "few", networks="random"), mesh)
  assert "too few to compare with" in caplog.text and not reference.images.held_out
  reference.check_enough("evaluation.num_images=100", 100)
  noise = np.random.default_rng(5).integers(0, 256, (20, *SIZE, 3), np.uint8)
  result = reference.judge([noise], 20, np.zeros(20, int))
  assert result["scores"]["random"]["times_floor"] > 1 and "copying" not in result


def test_what_a_published_network_sees_in_the_reference_is_kept(
  folder, mesh, monkeypatch, reference, caplog
):
  (network,) = reference.networks
  other = dataclasses.replace(network, name="inception", sha256="ab" * 32)
  monkeypatch.setattr(features, "published", lambda name, weights: other)
  exp = experiment_of(folder, networks="inception")
  first = references.Reference(exp, mesh)
  (path,) = pathlib.Path(first.images.statistics_dir).iterdir()
  seen, see = [], features.of_batches
  monkeypatch.setattr(features, "of_batches", lambda *a: seen.append(a) or see(*a))
  again = references.Reference(exp, mesh)
  assert not seen
  for kind in ("mean", "covariance"):
    values = (getattr(r.statistics["inception"].features, kind) for r in (first, again))
    np.testing.assert_array_equal(*values)
  path.write_bytes(path.read_bytes()[:1000])
  references.Reference(exp, mesh)
  assert seen and "are no use" in caplog.text and path.stat().st_size > 1000


def test_results_that_cannot_be_written_name_the_flag(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"cannot be written .*name a folder that can, by --out=FOLDER"):
    evaluate.check_writable(str(tmp_path / "file" / "run"))

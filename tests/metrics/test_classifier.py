"""The judge on handwritten digits: what it knows, what it sees, and its cache."""

import dataclasses
import functools
import logging
import os

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ism_jax.metrics import classifier as judges
from ism_jax.metrics import distances, moments


@pytest.fixture(scope="module")
def digits():
  data = load_digits()
  images = np.round(data.data * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
  return images, data.target


@pytest.fixture(scope="module")
def judge(digits):
  return judges.train_judge(*digits, num_classes=10)


@pytest.fixture
def count_trainings(monkeypatch, judge):
  """Puts the judge of this module in the place of training, and counts."""
  calls = []

  def train(images, labels, *, num_classes):
    calls.append(len(images))
    return judge

  monkeypatch.setattr(judges, "train_judge", train)
  return calls


def frechet(judge, a, b):
  a, b = (moments.feature_statistics(judges.judge_features(judge, x)[0]) for x in (a, b))
  return distances.frechet_distance(a, b)


def add_noise(images, deviation):
  noise = np.random.default_rng(3).normal(0, deviation, images.shape)
  return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def test_the_split_holds_out_a_fifth_of_every_class(digits):
  _, labels = digits
  train, held_out = judges.stratified_split(labels, seed=0)
  assert sorted([*train, *held_out]) == list(range(len(labels)))
  for label in range(10):
    share = np.mean(np.isin(np.flatnonzero(labels == label), held_out))
    assert abs(share - 0.2) < 0.005
  assert not np.array_equal(held_out, judges.stratified_split(labels, seed=1)[1])


def test_the_judge_knows_digits_better_than_a_linear_model(digits, judge):
  images, labels = digits
  train, held_out = judges.stratified_split(labels, seed=0)
  x = images.reshape(len(images), -1) / 255
  linear = LogisticRegression(max_iter=2000).fit(x[train], labels[train])
  assert judge.held_out_accuracy >= 0.98
  assert judge.held_out_accuracy > linear.score(x[held_out], labels[held_out])


def test_on_random_labels_the_held_out_accuracy_is_chance(digits):
  # A judge that had seen the held-out images would know their labels by heart. 360 of them: chance
  # is 0.10 with a standard deviation of 0.016.
  images, _ = digits
  labels = np.random.default_rng(0).integers(0, 10, len(images))
  judge = judges.train_judge(images, labels, num_classes=10)
  train, held_out = judges.stratified_split(labels, seed=0)
  right = judges.judge_features(judge, images)[1].argmax(axis=1) == labels
  assert right[train].mean() > 0.2
  assert right[held_out].mean() < 0.17
  assert judge.held_out_accuracy == right[held_out].mean()


def test_the_same_seed_trains_the_same_judge(digits, judge):
  again = judges.train_judge(*digits, num_classes=10, seed=0)
  jax.tree.map(np.testing.assert_array_equal, judge.params, again.params)
  assert judge.held_out_accuracy == again.held_out_accuracy


def numpy_gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_conv(x, layer):
  """3x3 cross-correlation of x [H, W, C], zeros outside."""
  kernel, bias = np.float64(layer["kernel"]), np.float64(layer["bias"])
  out = [
    sum(
      scipy.signal.correlate2d(x[..., c], kernel[..., c, o], mode="same")
      for c in range(x.shape[-1])
    )
    for o in range(kernel.shape[-1])
  ]
  return np.stack(out, axis=-1) + bias


def test_features_and_probabilities_are_those_of_a_numpy_network(digits, judge):
  images = digits[0][[0, 700]]
  features, probabilities = judges.judge_features(judge, images)
  params = judge.params
  for image, feature, probability in zip(images, features, probabilities, strict=True):
    x = numpy_gelu(numpy_conv(np.float64(image) / 127.5 - 1, params["Conv_0"]))
    # Stride 2 on an even size: the windows start at pixel 0, so their centres are the odd ones.
    x = numpy_gelu(numpy_conv(x, params["Conv_1"])[1::2, 1::2])
    x = numpy_gelu(x.reshape(-1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    np.testing.assert_allclose(feature, x, atol=1e-4)
    logits = x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(probability, expected, atol=1e-5)


def test_features_of_an_image_do_not_depend_on_its_batch_and_compile_once(digits, judge):
  images = digits[0][:300]
  judges._forward.clear_cache()
  features, probabilities = judges.judge_features(judge, images)
  for i in (0, 255, 256, 299):
    f, p = judges.judge_features(judge, images[i : i + 1])
    np.testing.assert_allclose(f[0], features[i], atol=1e-5)
    np.testing.assert_allclose(p[0], probabilities[i], atol=1e-6)
  assert judges._forward._cache_size() == 1
  assert judges.judge_features(judge, images[:0])[0].shape == (0, judges.NUM_FEATURES)


def test_the_features_have_a_full_covariance_and_no_dead_unit(digits, judge):
  features, _ = judges.judge_features(judge, digits[0])
  deviations = features.std(axis=0)
  assert deviations.min() > 0.1 * np.median(deviations)
  eigenvalues = np.linalg.eigvalsh(moments.feature_statistics(features).covariance)
  assert len(eigenvalues) == 64
  assert eigenvalues[0] > 1e-4 * eigenvalues[-1]


def test_the_distance_orders_images_by_their_quality(digits, judge):
  images, labels = digits
  mean, deviation = distances.bootstrap_floor(judges.judge_features(judge, images)[0], 0, 10)
  mild, strong = (frechet(judge, add_noise(images, s), images) for s in (32, 64))
  class_means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
  collapsed = frechet(judge, np.round(class_means).astype(np.uint8)[labels], images)
  pure = np.random.default_rng(4).integers(0, 256, images.shape, dtype=np.uint8)
  noise = frechet(judge, pure, images)
  assert mean + 5 * deviation < mild < strong / 2
  assert strong < collapsed < noise


def test_the_distance_sees_a_missing_class(digits, judge):
  images, labels = digits
  mean, deviation = distances.bootstrap_floor(judges.judge_features(judge, images)[0], 0, 10)
  for label in range(10):
    assert frechet(judge, images[labels != label], images) > mean + 5 * deviation


def test_a_cached_judge_sees_the_same_bits(digits, judge, tmp_path, count_trainings):
  fresh = judges.load_judge(*digits, num_classes=10, cache_dir=tmp_path / "new")
  cached = judges.load_judge(*digits, num_classes=10, cache_dir=tmp_path / "new")
  assert len(count_trainings) == 1
  assert len(os.listdir(tmp_path / "new")) == 1
  assert cached is not fresh
  for name in ("held_out_accuracy", "image_shape", "num_classes"):
    assert getattr(cached, name) == getattr(judge, name)
  for a, b in zip(*(judges.judge_features(j, digits[0]) for j in (judge, cached)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_another_data_set_or_version_never_gets_this_judge(
  digits, tmp_path, count_trainings, monkeypatch
):
  images, labels = digits
  other_images, other_labels = images.copy(), labels.copy()
  other_images[5, 0, 0, 0] ^= 1
  other_labels[5] = (labels[5] + 1) % 10
  judges.load_judge(images, labels, num_classes=10, cache_dir=tmp_path)
  judges.load_judge(other_images, labels, num_classes=10, cache_dir=tmp_path)
  judges.load_judge(images, other_labels, num_classes=10, cache_dir=tmp_path)
  judges.load_judge(images, labels, num_classes=11, cache_dir=tmp_path)
  monkeypatch.setattr(judges, "VERSION", judges.VERSION + 1)
  judges.load_judge(images, labels, num_classes=10, cache_dir=tmp_path)
  assert len(count_trainings) == 5
  assert len(os.listdir(tmp_path)) == 5


def digest_of(path):
  with np.load(path) as file:
    return str(file["digest"])


def test_a_judge_of_other_images_under_this_name_is_not_taken(
  digits, judge, tmp_path, count_trainings, caplog
):
  images, labels = digits
  judges.load_judge(images, labels, num_classes=10, cache_dir=tmp_path)
  (path,) = tmp_path.iterdir()
  params = jax.tree.map(np.zeros_like, judge.params)
  judges._write(path, dataclasses.replace(judge, params=params), digest="that of other images")
  again = judges.load_judge(images, labels, num_classes=10, cache_dir=tmp_path)
  assert len(count_trainings) == 2 and "it is that of other images" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, again.params, judge.params)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_a_damaged_cache_is_reported_and_replaced(
  digits, judge, tmp_path, count_trainings, caplog, damage
):
  def load():
    return judges.load_judge(*digits, num_classes=10, cache_dir=tmp_path)

  load()
  (path,) = tmp_path.iterdir()
  content = bytearray(path.read_bytes())
  if damage == "flipped":
    content[len(content) // 2] ^= 1
  path.write_bytes({"empty": b"", "truncated": content[:-1000]}.get(damage, content))
  if damage == "foreign":
    params = dict(judge.params, Dense_0={"kernel": np.zeros((7, 64)), "bias": np.zeros(64)})
    judges._write(path, dataclasses.replace(judge, params=params), digest_of(path))

  with caplog.at_level(logging.WARNING, logger="absl"):
    again = load()
  assert len(count_trainings) == 2
  assert path.name in caplog.text and "damaged" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, again.params, judge.params)
  load()
  assert len(count_trainings) == 2


def test_a_write_that_fails_leaves_nothing_behind_and_stops_no_run(
  digits, judge, tmp_path, count_trainings, monkeypatch, caplog
):
  def full_disk(file, **arrays):
    file.write(b"half a file")
    raise OSError("No space left on device")

  monkeypatch.setattr(np, "savez", full_disk)
  load = functools.partial(judges.load_judge, *digits, num_classes=10)
  loaded = load(cache_dir=tmp_path)
  assert not os.listdir(tmp_path)
  assert "could not be kept (No space left on device)" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, loaded.params, judge.params)
  (tmp_path / "file").touch()
  load(cache_dir=tmp_path / "file" / "judges")  # a folder that nobody can make, be he root
  assert "file/judges" in caplog.text and "next run trains it again" in caplog.text


def test_input_that_does_not_fit_is_an_error_that_says_what_does(digits, judge):
  images, labels = digits
  with pytest.raises(ValueError, match="float32 images"):
    judges.judge_features(judge, images.astype(np.float32))
  with pytest.raises(ValueError, match=r"needs uint8 of shape \[N, \*\(8, 8, 1\)\]"):
    judges.judge_features(judge, images[:, :7])
  with pytest.raises(ValueError, match="0 to 9; num_classes=9 allows 0 to 8"):
    judges.train_judge(images, labels, num_classes=9)
  with pytest.raises(ValueError, match="one integer each"):
    judges.train_judge(images, labels[:-1], num_classes=10)
  with pytest.raises(ValueError, match="10 images leave none to hold out"):
    judges.train_judge(images[:10], labels[:10], num_classes=10)


def test_random_features_see_blur_and_are_the_same_for_ever(digits):
  images = digits[0]
  see = functools.partial(jax.jit(judges.random_features), judges.random_params(images.shape[1:]))
  features = np.asarray(see(images))
  assert features.shape == (len(images), 224)
  # Features are up to 1; a mean that cancels to near 0 keeps the rounding of its terms.
  np.testing.assert_allclose(see(images[5:6]), features[5:6], rtol=1e-5, atol=1e-5)
  # A value of the first version: numbers measured with it stay comparable.
  np.testing.assert_allclose(features.mean(), 0.40209, rtol=1e-4)
  scale = features.std(0)
  statistics = moments.feature_statistics(features / scale)
  distance = lambda other: distances.frechet_distance(
    moments.feature_statistics(see(other) / scale), statistics
  )
  blurred = scipy.ndimage.uniform_filter(images, (0, 2, 2, 0))
  floor, _ = distances.bootstrap_floor(features / scale, seed=0, repeats=5)
  assert distance(blurred) > 5 * floor

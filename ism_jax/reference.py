"""What samples are judged against: real images, their features, and yardsticks beside the numbers.

Axes: N images, H/W size, C channels, F features.
"""

import os

import numpy as np

from ism_jax import data, generate, metrics, spectra
from ism_jax import judge as judge_lib
from ism_jax.experiment import Experiment

FLOOR_REPEATS = 20
NEIGHBOURS = 512  # samples whose nearest real image is searched, among all


class Reference:
  """Real images, the features of `evaluation.features`, and a judge of the classes.

  Attributes:
    held_out: whether the reference is another split than the one trained on. Then the floor is the
      distance of training images to the reference; else that of a bootstrap resample of it.
    floor, floor_sd: Fréchet distance, mean and standard deviation of `FLOOR_REPEATS` draws.
  """

  def __init__(self, exp: Experiment):
    split = exp.evaluation.reference_split
    self.held_out = split != "train"
    training_images, training_labels = data.all_images(data.load_source(exp.data))
    self.images = training_images
    if self.held_out:
      self.images, _ = data.all_images(data.load_source(exp.data, split))
    self.judge = judge_lib.load_judge(
      training_images,
      training_labels,
      num_classes=exp.data.num_classes,
      cache_dir=os.path.join(data.directory(exp.data), "judges"),
    )
    self._random_features = exp.evaluation.features == "random"
    if self._random_features:
      self._scale = judge_lib.random_features(self.images).std(0)
      self.features_are = "the features of a fixed network at random weights"
    else:
      self.features_are = "64 features of a classifier trained on 80 % of the training images"
    features = self.features(self.images)
    self.statistics = metrics.feature_statistics(features)
    self.floor_is = (
      f"{exp.evaluation.num_images} training images"
      if self.held_out
      else "a bootstrap resample of the real images"
    )
    self.floor, self.floor_sd = self._floor(exp, features, training_images)
    self.spectrum = spectra.radial_power(self.images)
    self.bands = spectra.band_energies(self.images)
    self._training_flat = training_images.reshape(len(training_images), -1) / 127.5
    self._training = training_images, training_labels
    self._num_images = exp.evaluation.num_images

  def features(self, images) -> np.ndarray:
    """Features [N, F] of uint8 [N, H, W, C]."""
    if self._random_features:
      return judge_lib.random_features(images) / self._scale
    return judge_lib.judge_features(self.judge, images)[0]

  def _floor(self, exp, features, training_images):
    if not self.held_out:
      return metrics.bootstrap_floor(features, seed=0, repeats=FLOOR_REPEATS)
    rng, count = np.random.default_rng(0), exp.evaluation.num_images
    training_features = self.features(training_images)
    distances = []
    for _ in range(FLOOR_REPEATS):
      chosen = training_features[rng.integers(len(training_features), size=count)]
      distances.append(
        metrics.frechet_distance(metrics.feature_statistics(chosen), self.statistics)
      )
    return float(np.mean(distances)), float(np.std(distances, ddof=1))

  def score(self, images, labels) -> dict[str, float]:
    """The numbers of a set of images meant to show `labels`."""
    statistics = metrics.feature_statistics(self.features(images))
    distance = metrics.frechet_distance(statistics, self.statistics)
    _, probabilities = judge_lib.judge_features(self.judge, images)
    return {
      "frechet_distance": distance,
      "times_floor": distance / self.floor,
      "accuracy": float(np.mean(probabilities.argmax(1) == labels)),
    }

  def describe(self, images) -> dict:
    """How near images are to those trained on, and their frequencies."""
    flat = images[:NEIGHBOURS].reshape(len(images[:NEIGHBOURS]), -1) / 127.5
    return {
      "nearest_neighbour": metrics.nearest_neighbour_distance(flat, self._training_flat),
      "spectrum": spectra.radial_power(images).tolist(),
      "bands": spectra.band_energies(images).tolist(),
    }

  def yardsticks(self) -> dict[str, dict]:
    """Scores of real images and of bad ones."""
    rng = np.random.default_rng(0)
    images, labels = self._training
    if self.held_out:  # as many as there are samples; otherwise the reference itself
      chosen = rng.permutation(len(images))[: self._num_images]
      images, labels = images[chosen], labels[chosen]
    class_means = np.stack([
        images[labels == c].mean(0) for c in range(self.judge.num_classes)
    ])  # fmt: skip
    coarse = images.reshape(len(images), images.shape[1] // 2, 2, images.shape[2] // 2, 2, -1)
    coarse = coarse.mean((2, 4)).repeat(2, 1).repeat(2, 2)
    noise = np.asarray(generate.to_uint8(rng.standard_normal(images.shape)))
    sets = {
      "training images" if self.held_out else "real images": images,
      "at half resolution": np.uint8(coarse.round()),
      "class means": np.uint8(class_means.round())[labels],
      "noise": noise,
    }
    found = {name: self.score(i, labels) | self.describe(i) for name, i in sets.items()}
    # Among those trained on, a real image is its own neighbour.
    next(iter(found.values()))["nearest_neighbour"] = metrics.nearest_neighbour_distance(
      self._training_flat[:NEIGHBOURS], self._training_flat, exclude_self=True
    )
    return found

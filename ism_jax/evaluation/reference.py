"""What samples are judged against: real images as feature networks see them.

Either the dataset's own images, or files of statistics: those of `python -m ism_jax statistics`,
ADM's, jax-fid's or MeanFlow's, as they are. With the images at hand there is more: a floor and
yardsticks beside the distances, frequencies, and how near samples are to what was trained on.

Axes: N images, H/W size, C channels, F features, S spatial features, K kept features.
"""

import hashlib
import io
import json
import os

from absl import logging
import jax
import numpy as np

from ism_jax import data, generate
from ism_jax.data import samples
from ism_jax.evaluation import scores
from ism_jax.experiment import Experiment
from ism_jax.metrics import distances, features, spectra
from ism_jax.metrics.features import Network
from ism_jax.metrics.moments import FeatureStatistics, finite_rows
from ism_jax.protocol import OF_THE_DATASET, PUBLISHED
from ism_jax.runtime import arrays, files

FLOOR_REPEATS = 20
NEIGHBOURS = 512  # samples whose nearest real image is searched, among all
PICTURED = 3  # nearest real images of a sample that are shown
LARGEST = 2**29  # bytes of the images of a split that are judged with: eight times that in memory
KEPT = 50_000  # the most real images whose features statistics hold
_MOMENTS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))  # ours, ADM's and jax-fid's; MeanFlow's
PIXELS = "pixels"  # where distances are measured, beside the networks
_SPATIAL_MOMENTS = ("mu_s", "sigma_s")  # ours and ADM's
_IMAGES = "arr_0"  # ADM's
_FEATURES, _PROTOCOL, _COUNT = "features", "protocol", "count"  # ours


def write(path: str, statistics: scores.Statistics, protocol: dict) -> None:
  """Writes statistics as an npz that other tools read too: mu [F], sigma [F, F], float64.

  Beside them mu_s and sigma_s of the spatial features, the kept features [K, F], the count of
  images, and how they were made, as JSON.
  """
  moments = lambda names, s: dict(zip(names, (s.mean, s.covariance), strict=True))
  arrays = moments(_MOMENTS[0], statistics.features)
  if statistics.spatial:
    arrays |= moments(_SPATIAL_MOMENTS, statistics.spatial)
  if statistics.kept is not None:
    arrays[_FEATURES] = np.float32(statistics.kept)
  arrays |= {_COUNT: np.int64(statistics.features.count), _PROTOCOL: json.dumps(protocol)}
  archive = io.BytesIO()
  np.savez(archive, **arrays)
  files.write_whole(path, archive.getvalue())


def read_protocol(path: str) -> dict:
  """How a file of statistics was made, as `write` recorded it; {} of others'."""
  held = _headers(path)
  return _protocol(path, held)


def _headers(path) -> dict[str, arrays.Header]:
  try:
    return arrays.headers(path)
  except ValueError as error:
    raise ValueError(
      f"{path} is no npz file of statistics, or damaged ({error}). Make it again."
    ) from error


def _protocol(path, held: dict[str, arrays.Header]) -> dict:
  array = held.get(_PROTOCOL)
  if array is None:
    return {}
  if array.shape or array.dtype.kind != "U":
    raise ValueError(f"{_PROTOCOL} of {path} is {array.dtype} {array.shape}, and no text.")
  return files.parse_json(str(arrays.read(path, array)), f"{_PROTOCOL} of {path}", {})


def read(path: str, network: Network, mesh) -> tuple[scores.Statistics, dict]:
  """(statistics, {"file", "sha256", perhaps "protocol"}) that this project or another wrote.

  Of ADM's file the images (arr_0) are seen by the network, for precision, recall and KID.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or holds other keys or the features of another network.
  """
  if not os.path.exists(path):
    raise FileNotFoundError(
      f"there is no file of reference statistics {path}; make one with python -m "
      "ism_jax statistics, or download that of ADM."
    )
  held = _headers(path)
  names = next((names for names in _MOMENTS if all(n in held for n in names)), None)
  if names is None:
    raise ValueError(
      f"{path} holds {', '.join(sorted(held))}; needed are "
      f"{' or '.join(' and '.join(names) for names in _MOMENTS)}, a mean and a covariance. "
      "python -m ism_jax statistics makes such a file."
    )
  protocol = _protocol(path, held)
  made_with = (protocol.get("network", network.name), protocol.get("weights", network.sha256))
  if made_with != (network.name, network.sha256):
    raise ValueError(
      f"{path} was made with {made_with[0]}, weights {made_with[1][:12]}; this evaluation uses "
      f"{network.name}, weights {network.sha256[:12]}: make it again, or pass those weights."
    )
  sizes = output_sizes(network, (64, 64, 3))

  def numbers(name):
    if held[name].dtype.kind not in "fiu":
      raise ValueError(f"{name} of {path} is {held[name].dtype}, and numbers are needed.")
    return arrays.read(path, held[name])

  count = 0
  if _COUNT in held:
    if held[_COUNT].shape:
      raise ValueError(f"{_COUNT} of {path} has shape {held[_COUNT].shape}, and is no number.")
    count = int(numbers(_COUNT))

  def moments_of(names, size):
    shapes = [held[name].shape for name in names]
    if shapes != [(size,), (size, size)]:
      raise ValueError(
        f"{names[0]} of {path} has shape {shapes[0]} and {names[1]} {shapes[1]}; "
        f"{network.name} has {size} features: needed are [{size}] and [{size}, {size}]. Make it "
        f"with {network.name}."
      )
    mean, covariance = (numbers(name).astype(np.float64) for name in names)
    try:
      if not covariance.any():
        raise ValueError("the covariance is zero, as of a single image.")
      return FeatureStatistics(mean, covariance, count)
    except ValueError as error:
      raise ValueError(
        f"{names[0]} and {names[1]} of {path} are no mean and covariance: {error} Use python -m "
        "ism_jax statistics, or download the file anew."
      ) from error

  moments, spatial = moments_of(names, sizes["features"]), None
  if "spatial" in sizes and all(name in held for name in _SPATIAL_MOMENTS):
    spatial = moments_of(_SPATIAL_MOMENTS, sizes["spatial"])
  single, images = None, held.get(_IMAGES)
  if kept := held.get(_FEATURES):
    rows = max(count, KEPT)
    if len(kept.shape) != 2 or kept.shape[1] != sizes["features"] or kept.shape[0] > rows:
      raise ValueError(
        f"{_FEATURES} of {path} have shape {kept.shape}; {network.name} has {sizes['features']} "
        f"features, of at most {rows} images: make it again with python -m ism_jax statistics."
      )
    single = numbers(_FEATURES)
  elif images and len(images.shape) == 4 and images.dtype == np.uint8:
    logging.info("%s sees the %d images of %s.", network.name, images.shape[0], path)
    batches = samples.array_batches(path, images, features.BATCH)
    seen = features.of_batches((network,), mesh, batches)
    single = np.concatenate([outputs[network.name]["features"] for _, outputs in seen])
  if single is not None:
    single = finite_rows(single, f"{_FEATURES} of {path}")
  source = {"file": path, "sha256": files.sha256(path)}
  source |= {"protocol": protocol} if protocol else {}
  return scores.Statistics(moments, spatial, single), source


def output_sizes(network: Network, image_shape) -> dict[str, int]:
  """How many numbers of each kind a network gives for an image [H, W, C]."""
  image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
  outputs = jax.eval_shape(network.apply, network.params, image)
  return {name: output.shape[-1] for name, output in outputs.items()}


class Reference:
  """What samples of an experiment are judged against.

  Attributes:
    networks: those of `evaluation.networks`, in that order.
    statistics: {network: of the real images}.
    sources: {network: where they are from}.
    images: `DatasetImages`, or None where the reference is files.
  """

  def __init__(self, exp: Experiment, mesh, num_images: int | None = None):
    """Reads or makes it.

    Args:
      exp: the experiment.
      mesh: of devices that see the images.
      num_images: of the samples that are to be judged, default `evaluation.num_images`.
    """
    self._mesh, self._floors, self._training, ev = mesh, {}, {}, exp.evaluation
    self._held_out_distances = {}
    reference_files, weights = ev.reference_files(), ev.weight_files()
    if not reference_files and exp.data.vae:
      raise ValueError(
        "evaluation.reference is empty, and latents hold no images to compare with: make "
        f"statistics with python -m ism_jax statistics --images=IMAGES --networks={ev.networks} "
        "--out=DIR, or download ADM's, and pass --config.evaluation.reference=FILE."
      )
    self.images = real = None if reference_files else DatasetImages(exp)
    load = {
      "classifier": lambda: features.classifier(
        *real.training, num_classes=exp.data.num_classes, cache_dir=real.cache_dir
      ),
      "random": lambda: features.random(real.reference, mesh),
    }
    self.networks = tuple(
      load[name]() if name in load else features.published(name, weights.get(name, ""))
      for name in _networks_of(exp)
    )
    for network in self.networks:
      if network.held_out_accuracy is not None:
        logging.info("The features are %s.", network.what)
        guess = np.bincount(real.training[1]).max() / len(real.training[1])
        if network.held_out_accuracy <= guess:
          logging.warning(
            f"The classifier is right on {network.held_out_accuracy:.3f} of the images it was not "
            f"trained on, and the most frequent class is {guess:.3f} of all: it tells no classes "
            "apart, and its numbers mean little. evaluation.networks=random needs no classes."
          )
    if reference_files:
      contents = {n.name: read(reference_files[n.name], n, mesh) for n in self.networks}
      self.statistics = {name: statistics for name, (statistics, _) in contents.items()}
      self.sources = {name: source for name, (_, source) in contents.items()}
    else:
      self.statistics = _statistics_of(self.networks, real, mesh)
      source = {"split": real.split, "images": len(real.reference)}
      self.sources = dict.fromkeys(self.statistics, source)
    self._warn_of_count(num_images or ev.num_images)

  @property
  def is_grey(self) -> bool:
    """Whether the real images are at hand, and have one channel."""
    return self.images is not None and self.images.reference.shape[-1] == 1

  def floor(self, name: str, count: int) -> dict | None:
    """The Fréchet distance to the reference that `count` real images have by chance.

    They are drawn with replacement from those trained on: of the reference itself, a bootstrap
    resample, or where the reference is another split, images that are not in it. Distances of
    `count` samples are measured in this unit and in no other: by chance alone those of fewer are
    larger.

    Args:
      name: of the network.
      count: of images.
    Returns:
      {"mean", "sd", "count", "is"} of `FLOOR_REPEATS` draws; None for a network that is not made of
      the dataset, or that sees no difference between its images.
    """
    if not self.images or name not in OF_THE_DATASET:
      return None
    if (name, count) not in self._floors:
      self._floors[name, count] = self._draw_floor(name, count)
    return self._floors[name, count]

  def _draw_floor(self, name, count):
    real = self.statistics[name]
    few = real.kept is None
    drawn_from = self.training(name) if self.images.held_out or few else real.kept
    mean, sd = distances.bootstrap_floor(
      drawn_from, seed=0, repeats=FLOOR_REPEATS, count=count, real=real.features
    )
    if mean <= 1e-12 * np.trace(real.features.covariance):
      logging.warning("To %s all real images are alike: its distances have no floor.", name)
      return None
    what = "training images" if self.images.held_out else "images drawn from the reference"
    return {"mean": mean, "sd": sd, "count": count, "is": f"{count} {what}"}

  def training(self, space: str) -> np.ndarray:
    """The images trained on, as a network sees them, or as `PIXELS`: [N, F]."""
    if space == PIXELS:
      return self.images.flat
    if space not in self._training:
      (network,) = (n for n in self.networks if n.name == space)
      seen = features.of_images(network, self._mesh, self.images.training[0])
      self._training[space] = finite_rows(seen, f"features of {space}")
    return self._training[space]

  def copying(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """{space: `distances.share_nearer`} of samples [N, F], where images are held out."""
    to_training = lambda a, space: distances.nearest(a, self.training(space), 1)[0][:, 0]
    shares = {}
    for space, generated in rows.items():
      if space not in self._held_out_distances:
        if space == PIXELS:
          real = _flat(_spread(self.images.reference))
        else:
          real = _spread(self.statistics[space].kept)
        self._held_out_distances[space] = to_training(real, space)
      distance = to_training(finite_rows(generated, f"samples in {space}"), space)
      shares[space] = distances.share_nearer(distance, self._held_out_distances[space])
    return shares

  def neighbours(self, images) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{space: (distances [N, k], images uint8 [N, k, H, W, C])} of the nearest training images.

    The spaces are those of pixels and of the first network.

    Args:
      images: uint8 [N, H, W, C].
    """
    network, (real, _) = self.networks[0], self.images.training
    seen = {
      PIXELS: _flat(images),
      network.name: features.of_images(network, self._mesh, images),
    }
    nearest = {
      space: distances.nearest(rows, self.training(space), min(PICTURED, len(real)))
      for space, rows in seen.items()
    }
    return {space: (distance, real[rows]) for space, (distance, rows) in nearest.items()}

  def _warn_of_count(self, num_images: int) -> None:
    """Warns of distances that would mean little, after hours of sampling."""
    for name, real in self.statistics.items():
      if 0 < real.features.count <= len(real.features.mean):
        logging.warning(
          f"The reference of {name} is of {real.features.count} images, which do not determine the "
          f"covariance of its {len(real.features.mean)} features: make it of more"
          + (" (a larger data.held_out, or more images)." if self.images else ".")
        )
      if num_images <= (size := len(real.features.mean)):
        logging.warning(
          f"{num_images} samples do not determine the covariance of {size} features of {name}: the "
          "Fréchet distance comes out too large. 50,000 samples are usual."
        )

  def check_enough(self, what: str, count: int, *, brief: bool = False) -> None:
    """Raises ValueError if so few images cannot be judged; see `scores.check_count`."""
    for network in self.networks:
      scores.check_count(what, count, network, self.statistics[network.name], brief=brief)

  def check_images(self, path: str, image_shape, labels) -> None:
    """Raises if images [H, W, C] of these labels [N] cannot be judged against this reference."""
    if self.images and image_shape != self.images.reference.shape[1:]:
      raise ValueError(
        f"the images of {path} have shape {image_shape}, those of the dataset "
        f"{self.images.reference.shape[1:]}: resize them, or pass files of evaluation.reference."
      )
    classes = self.images.num_classes if self.images else None
    if classes and labels is not None and not 0 <= labels.min() <= labels.max() < classes:
      raise ValueError(
        f"the labels of {path} run from {labels.min()} to {labels.max()}; the dataset's are 0 to "
        f"{classes - 1}: write them as those."
      )

  def score(self, images, labels) -> dict[str, dict]:
    """{network: {metric: value}}, brief, of host images uint8 [N, H, W, C] of `labels` [N]."""
    return self.judge(features.in_batches(images), len(images), labels, brief=True)["scores"]

  def judge(self, batches, total: int, labels, brief: bool = False, unreadable=()) -> dict:
    """`Judging.result` of host batches, uint8 [b, H, W, C], all of one size but the last.

    Args:
      total: of images.
      labels: [total], or None.
      unreadable: of the total, those that the batches turn out to lack; then without labels.
      brief: see `Judging`.
    """
    judging, start = Judging(self, total, brief), 0
    for images, outputs in features.of_batches(self.networks, self._mesh, batches):
      stop = start + len(images)
      judging.add(outputs, images, None if labels is None else labels[start:stop])
      start = stop
    judging.leave_out(len(unreadable))
    return judging.result()

  def yardsticks(self, num_images: int) -> dict[str, dict]:
    """`Judging.result` of real images and of bad ones, with their number as "num_images".

    None where there are no images; as many as the samples that they stand beside, see
    `DatasetImages.yardsticks`.
    """
    if not self.images:
      return {}
    results = {
      name: self.judge(features.in_batches(images), len(images), labels)
      | {"num_images": len(images)}
      for name, (images, labels) in self.images.yardsticks(num_images).items()
    }
    # Among those trained on, a real image would be its nearest neighbour itself.
    real = next(iter(results.values()))
    real["nearest_neighbour"] = distances.nearest_neighbour_distance(
      self.images.flat[:NEIGHBOURS], self.images.flat, exclude_self=True
    )
    return results


class Judging:
  """What is added up of `total` samples, batch by batch, until they can be scored.

  Brief, without frequencies, and without what compares single images: nearest neighbours, KID,
  precision and recall.
  """

  def __init__(self, reference: Reference, total: int, brief: bool = False):
    self._reference, self._labelled = reference, True
    self._images = None if brief else reference.images
    self._tallies = {
      network.name: scores.Tally(
        network,
        total,
        keep=0 if brief or reference.statistics[network.name].kept is None else total,
        inception_score=network.name == "inception",
      )
      for network in reference.networks
    }
    self._first, self._added, self._spectrum, self._bands = [], 0, 0.0, 0.0

  def add(self, outputs: dict, images, labels) -> None:
    """Adds samples uint8 [B, H, W, C], which are fetched only if they are described.

    Args:
      outputs: of `features.extractor`, whose rows behind the labels or images are padding.
      labels: [b], b <= B, or None for samples without.
    """
    count = len(images) if labels is None else len(labels)
    self._labelled &= labels is not None
    for name, tally in self._tallies.items():
      tally.add({k: np.asarray(a)[:count] for k, a in outputs[name].items()}, labels)
    if self._images:
      images = np.asarray(images)[:count]
      self._first.append(images[: max(0, NEIGHBOURS - self._added)])
      self._spectrum += count * spectra.radial_power(images)
      self._bands += count * spectra.band_energies(images)
    self._added += count

  def leave_out(self, count: int) -> None:
    """Says that so many of the total could not be read, and will not be added."""
    for tally in self._tallies.values():
      tally.leave_out(count)

  def result(self) -> dict:
    """{"scores": {network: {metric: value}}}, and of described samples their "nearest_neighbour"
    (mean distance of the first ones to the training images), where images are held out "copying"
    (see `Reference.copying`), "spectrum" and "bands".
    """
    result = {"scores": {}}
    for name, tally in self._tallies.items():
      values = tally.scores(self._reference.statistics[name], labelled=self._labelled)
      if floor := self._reference.floor(name, self._added):
        values["times_floor"] = values["frechet_distance"] / floor["mean"]
      result["scores"][name] = values
    if self._images:
      first = _flat(np.concatenate(self._first))
      result["nearest_neighbour"] = distances.nearest_neighbour_distance(first, self._images.flat)
      if self._images.held_out:
        name = self._reference.networks[0].name
        features_of_all = self._tallies[name].statistics().kept  # in their order
        rows = {PIXELS: first, name: features_of_all[:NEIGHBOURS]}
        result["copying"] = self._reference.copying(rows)
      result["spectrum"] = (self._spectrum / self._added).tolist()
      result["bands"] = (self._bands / self._added).tolist()
    return result


class DatasetImages:
  """The dataset's own images: those trained on, and those compared with.

  Of a split that would take more than `LARGEST` bytes, images that are evenly spread over it.

  Attributes:
    training: (uint8 [N, H, W, C], labels [N]).
    reference: uint8 [N, H, W, C], of `evaluation.reference_split`.
    split: the name of that: "train" where too few are held out.
    held_out: whether that is another split than the one trained on.
    spectrum, bands: of the reference, see `spectra`.
    flat: float64 [N, H W C], the training images.
    cache_dir, statistics_dir: of judges, and of what published networks see.
  """

  def __init__(self, exp: Experiment):
    self.split = exp.evaluation.reference_split
    self.training = data.all_images(data.load_source(exp.data), LARGEST)
    self.reference = self.training[0]
    if self.split != "train":
      source = data.load_source(exp.data, self.split)
      if len(source) > scores.NEIGHBOURHOOD:
        self.reference, _ = data.all_images(source, LARGEST)
      else:
        logging.warning(
          f"{len(source)} images are in the split {self.split!r}, too few to compare with: samples "
          "are compared with those trained on, to which copies are nearest. Have more images, or a "
          "larger data.held_out."
        )
        self.split = "train"
    self.held_out = self.split != "train"
    folder = data.directory(exp.data)
    self.cache_dir = os.path.join(folder, "judges")
    self.statistics_dir = os.path.join(folder, "statistics")
    self.spectrum = spectra.radial_power(self.reference)
    self.bands = spectra.band_energies(self.reference)
    self.num_classes = exp.data.num_classes
    self.flat = _flat(self.training[0])

  def yardsticks(self, num_images: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (images, labels)}: real images first, then bad ones.

    They are the reference itself, or of another split `num_images`, as far as there are.
    """
    rng = np.random.default_rng(0)
    images, labels = self.training
    if self.held_out:
      chosen = rng.permutation(len(images))[:num_images]
      images, labels = images[chosen], labels[chosen]
    classes, label = np.unique(labels, return_inverse=True)
    class_means = np.stack([images[labels == c].mean(0) for c in classes])
    n, h, w, _ = images.shape
    even = images[:, : h // 2 * 2, : w // 2 * 2]  # the others' last row or column stays
    means = even.reshape(n, h // 2, 2, w // 2, 2, -1).mean((2, 4)).repeat(2, 1).repeat(2, 2)
    coarse = images.astype(np.float64)
    coarse[:, : h // 2 * 2, : w // 2 * 2] = means
    noise = np.asarray(generate.to_uint8(rng.standard_normal(images.shape)))
    return {
      "training images" if self.held_out else "real images": (images, labels),
      "at half resolution": (np.uint8(coarse.round()), labels),
      "class means": (np.uint8(class_means.round())[label], labels),
      "noise": (noise, labels),
    }


def _networks_of(exp: Experiment) -> tuple[str, ...]:
  """Those of `evaluation.networks`; of one class without its classifier, which is said."""
  names = exp.evaluation.network_names()
  if exp.data.num_classes > 1 or "classifier" not in names:
    return names
  if others := tuple(name for name in names if name != "classifier"):
    logging.warning("There is one class, of which there is no classifier: it is left out.")
    return others
  raise ValueError(
    f"evaluation.networks={exp.evaluation.networks!r}, and there is one class, of which there is "
    "no classifier: set it to random, or inception or dinov2."
  )


def _statistics_of(networks, real: "DatasetImages", mesh) -> dict[str, scores.Statistics]:
  """{network: what it sees in the reference}; of published ones, kept beside the dataset."""
  digest = hashlib.sha256(repr(real.reference.shape).encode() + real.reference.tobytes())
  digest, statistics, files_of = digest.hexdigest(), {}, {}
  for network in networks:
    if network.name in PUBLISHED:
      protocol = {"network": network.name, "weights": network.sha256, "images": digest}
      name = f"{network.name}-{digest[:16]}-{network.sha256[:16]}.npz"
      path = os.path.join(real.statistics_dir, name)
      files_of[network.name] = path, protocol
      try:
        statistics[network.name] = _read_kept(path, protocol, network, mesh)
      except FileNotFoundError:
        pass
      except Exception as error:  # a cache may never stop a run
        logging.warning("The kept statistics %s are no use (%s): making them anew.", path, error)
  # Of fewer, precision and recall would have no neighbours.
  keep = KEPT if len(real.reference) > scores.NEIGHBOURHOOD else 0
  missing = tuple(n for n in networks if n.name not in statistics)
  tallies = {n.name: scores.Tally(n, len(real.reference), keep=keep) for n in missing}
  seen = features.of_batches(missing, mesh, features.in_batches(real.reference)) if missing else ()
  for _, outputs in seen:
    for name, tally in tallies.items():
      tally.add(outputs[name])
  for name, tally in tallies.items():
    statistics[name] = tally.statistics()
    if name in files_of and jax.process_index() == 0:
      path, protocol = files_of[name]
      try:
        write(path, statistics[name], protocol)
      except OSError as error:  # as of a folder that others share
        logging.warning("The statistics could not be kept (%s).", error)
  return statistics


def _read_kept(path: str, protocol: dict, network: Network, mesh) -> scores.Statistics:
  statistics, source = read(path, network, mesh)
  if source.get("protocol") != protocol:
    raise ValueError("it is of other images")
  return statistics


def _spread(rows):
  """`NEIGHBOURS` of the rows, evenly spread: images are in the order of their classes."""
  return rows[np.linspace(0, len(rows) - 1, min(NEIGHBOURS, len(rows))).round().astype(int)]


def _flat(images):
  return data.to_unit_range(images, np.float64).reshape(len(images), -1)

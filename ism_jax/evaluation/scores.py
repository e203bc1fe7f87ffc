"""Numbers of a set of images, from what feature networks see in them, in one pass.

Features are added batch by batch. Moments and sums of them remain; the features themselves only
where a metric compares single samples (KID, precision and recall).

Axes: N images, B batch, F features, S spatial features, K kept features.
"""

import dataclasses

import numpy as np

from ism_jax.metrics import distances, moments
from ism_jax.metrics.features import Network
from ism_jax.protocol import PUBLISHED

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1_000
INCEPTION_SPLITS = 10
NEIGHBOURHOOD = 3  # k of precision and recall


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """What a network sees in a set of images.

  Attributes:
    features: moments.
    spatial: moments of the spatial features, where the network has them.
    kept: float32 [K, F], features of single images, or None.
  """

  features: moments.FeatureStatistics
  spatial: moments.FeatureStatistics | None = None
  kept: np.ndarray | None = None


def check_count(
  what: str, count: int, network: Network, real: Statistics, *, brief: bool = False
) -> None:
  """Raises ValueError where there are too few images for a metric, which `Tally` finds at the end.

  Args:
    what: says how many there are, for the message: "evaluation.num_images=3".
    count: of the samples.
    real: what they are compared with.
    brief: as `reference.Judging`.
  """
  needed = {"a covariance": 2}
  if network.name == "inception":
    needed["the Inception Score"] = INCEPTION_SPLITS
  if real.kept is not None and not brief:
    needed["precision and recall"] = NEIGHBOURHOOD + 1
    if len(real.kept) <= NEIGHBOURHOOD:
      raise ValueError(
        f"the reference of {network.name} has the features of {len(real.kept)} images, and "
        f"precision and recall need {NEIGHBOURHOOD + 1}: make it of more images or with more "
        "--keep_features, or with --keep_features=0 for none of them."
      )
  metric, least = max(needed.items(), key=lambda item: item[1])
  if count < least:
    raise ValueError(
      f"{what} is too few: {metric} by {network.name} needs at least {least} images. Take more; "
      "50,000 are usual."
    )


class Tally:
  """What is added up of one network's outputs for `total` images.

  Args:
    keep: how many images' features stay, evenly spread.
    inception_score: whether it is wanted; the network needs logits.
  """

  def __init__(self, network: Network, total: int, *, keep: int = 0, inception_score: bool = False):
    self._network, self._total, self._added = network, total, 0
    self._features, self._spatial, self._score = moments.Moments(), None, None
    self._keep = np.linspace(0, total - 1, min(keep, total)).round().astype(int)
    self._kept, self._right = [], 0
    if inception_score:
      self._score = moments.InceptionScore(total, INCEPTION_SPLITS)

  def add(self, outputs: dict[str, np.ndarray], labels=None) -> None:
    """Adds the outputs [B, ...] of the next images, of these classes [B] if they have any."""
    features = outputs["features"]
    self._features.update(features)
    if "spatial" in outputs:
      self._spatial = self._spatial or moments.Moments()
      self._spatial.update(outputs["spatial"])
    chosen = self._keep[np.searchsorted(self._keep, self._added) :] - self._added
    self._kept.append(features[chosen[chosen < len(features)]])
    if self._score:
      self._score.update(outputs["logits"])
    if self._network.held_out_accuracy is not None and labels is not None:
      self._right += np.count_nonzero(outputs["logits"].argmax(1) == labels)
    self._added += len(features)

  def leave_out(self, count: int) -> None:
    """Says that so many of the total could not be read, and will not be added."""
    self._total -= count
    if self._score:
      self._score.leave_out(count)

  def statistics(self) -> Statistics:
    """Of all that was added."""
    if self._added != self._total:
      raise ValueError(f"{self._added} images were added of {self._total}.")
    return Statistics(
      features=self._features.statistics(),
      spatial=self._spatial and self._spatial.statistics(),
      kept=np.concatenate(self._kept) if len(self._keep) else None,
    )

  def scores(self, real: Statistics, *, labelled: bool) -> dict[str, float]:
    """The metrics that the network, the reference and the labels, if any were added, allow.

    "frechet_distance" (FID, FD-DINOv2), and where there is what they need
    "spatial_frechet_distance" (sFID), "inception_score", "kid", "precision", "recall" and
    "accuracy". Beside means over splits or subsets is their deviation, with "_sd" in its name.
    """
    generated = self.statistics()
    distance = distances.frechet_distance
    values = {"frechet_distance": distance(generated.features, real.features)}
    if generated.spatial and real.spatial:
      values["spatial_frechet_distance"] = distance(generated.spatial, real.spatial)
    if self._score:
      values["inception_score"], values["inception_score_sd"] = self._score.result()
    if generated.kept is not None and real.kept is not None:
      if self._network.name in PUBLISHED:
        # An unbiased estimate: smaller subsets change its spread, not its mean.
        size = min(KID_SUBSET_SIZE, len(generated.kept), len(real.kept))
        values["kid"], values["kid_sd"] = distances.kernel_distance(
          generated.kept, real.kept, subsets=KID_SUBSETS, subset_size=size
        )
      values["precision"], values["recall"] = distances.precision_recall(
        real.kept, generated.kept, k=NEIGHBOURHOOD
      )
    if self._network.held_out_accuracy is not None and labelled:
      values["accuracy"] = self._right / self._total
    return values

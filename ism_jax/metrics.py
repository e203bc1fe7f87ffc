"""Distances between sets of images, measured on their features.

The Fréchet distance (Heusel et al. 2017) compares the first two moments of two feature sets; the
nearest-neighbour distance tells copies of the training set from new images. A Fréchet distance
means little without the value that chance alone gives at the same sample size: `bootstrap_floor`.

Everything is float64 NumPy on the host.
Axes: N, M samples, F (or D) features.
"""

import dataclasses
import warnings

import numpy as np

# Entries of one block of pairwise distances: 2^22 float64 are 32 MiB.
_BLOCK_ENTRIES = 2**22


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
  """Mean [F] and unbiased (ddof=1) covariance [F, F] of `count` feature vectors."""

  mean: np.ndarray
  covariance: np.ndarray
  count: int

  def __post_init__(self):
    if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape:
      raise ValueError(
        f"mean has shape {self.mean.shape} and covariance {self.covariance.shape}; "
        "needed are [F] and [F, F]."
      )


def feature_statistics(features):
  """Moments of features [N, F], in float64.

  With N <= F the covariance is singular: the Fréchet distance is still defined, but it is biased
  upwards so much that it compares with no published value. That is a warning, not an error.

  Raises:
    ValueError: fewer than two rows, or rows that hold NaN or infinity.
  """
  features = _finite_matrix(features, "features")
  count, size = features.shape
  if count < 2:
    raise ValueError(f"a covariance needs at least 2 feature rows; got {count}.")
  if count <= size:
    warnings.warn(
      f"{count} samples do not determine the covariance of {size} features "
      f"(rank at most {count - 1}); use more than {size} samples.",
      stacklevel=2,
    )
  mean = features.mean(axis=0)
  centred = features - mean
  return FeatureStatistics(mean, centred.T @ centred / (count - 1), count)


def frechet_distance(a, b):
  """Squared 2-Wasserstein distance of Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}).

  S_a S_b has the eigenvalues of S_a^{1/2} S_b S_a^{1/2}, which is symmetric and positive
  semi-definite, so the trace of its root is the sum of the roots of its eigenvalues. Singular
  covariances need no offset on the diagonal.

  Args:
    a, b: FeatureStatistics over the same F.
  Returns:
    float, not negative.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      f"a has {a.mean.size} features and b has {b.mean.size}; both need those of one network."
    )
  root_a = _root(a.covariance)
  eigenvalues = np.linalg.eigvalsh(_symmetric(root_a @ b.covariance @ root_a))
  # Rounding leaves the zeros of a singular matrix slightly negative.
  trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
  traces = np.trace(a.covariance) + np.trace(b.covariance)
  distance = np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_of_root
  # The difference of equal traces can round to below zero.
  return float(max(distance, 0.0))


def nearest_neighbour_distance(a, b, exclude_self=False):
  """Mean over the rows of a of the Euclidean distance to the nearest row of b.

  Memory stays bounded: distances are computed in blocks of rows of a.

  Args:
    a, b: [N, D] and [M, D].
    exclude_self: a is the first rows of b, in the same order, and row i must not find itself.
  Returns:
    float.
  """
  a, b = _finite_matrix(a, "a"), _finite_matrix(b, "b")
  if a.shape[1] != b.shape[1]:
    raise ValueError(
      f"rows of a have {a.shape[1]} entries, rows of b {b.shape[1]}; both need the same."
    )
  if exclude_self and len(a) > len(b):
    raise ValueError(
      f"exclude_self needs a to be the first rows of b; got shapes {a.shape} and {b.shape}."
    )
  if not len(a) or len(b) <= exclude_self:
    raise ValueError(
      f"{len(a)} rows have no neighbours among {len(b)} (exclude_self={exclude_self}); add rows."
    )

  b_norms = np.sum(b**2, axis=1)
  rows = max(1, _BLOCK_ENTRIES // len(b))
  total = 0.0
  for start in range(0, len(a), rows):
    block = a[start : start + rows]
    # |a - b|^2 up to |a|^2, which does not move the minimum.
    ranks = b_norms - 2 * block @ b.T
    if exclude_self:
      index = np.arange(len(block))
      ranks[index, start + index] = np.inf
    # The expanded square cancels for close rows, so it only picks the neighbour; the distance is
    # taken from the difference, and an exact copy is at exactly 0.
    total += np.linalg.norm(block - b[ranks.argmin(axis=1)], axis=1).sum()
  return float(total / len(a))


def bootstrap_floor(features, seed, repeats):
  """Mean and standard deviation of the Fréchet distance of a resample to all the features.

  A resample has N rows drawn with replacement. A generator whose N samples score no worse than this
  cannot be told from the data by this distance.

  Args:
    features: [N, F].
    seed: whatever `numpy.random.default_rng` takes.
    repeats: number of resamples, at least 2.
  Returns:
    (mean, standard deviation), floats.
  """
  if repeats < 2:
    raise ValueError(f"repeats={repeats} gives no standard deviation; use at least 2.")
  features = _finite_matrix(features, "features")
  rng = np.random.default_rng(seed)
  everything = feature_statistics(features)
  distances = []
  for _ in range(repeats):
    resample = features[rng.integers(len(features), size=len(features))]
    distances.append(frechet_distance(everything, feature_statistics(resample)))
  return float(np.mean(distances)), float(np.std(distances, ddof=1))


def _finite_matrix(x, name):
  """x as float64 [N, D]; a ValueError says how many rows are not finite."""
  x = np.asarray(x, np.float64)
  if x.ndim != 2:
    raise ValueError(f"{name} has shape {x.shape}; needed is one row per sample, [N, D].")
  bad = np.count_nonzero(~np.isfinite(x).all(axis=1))
  if bad:
    raise ValueError(
      f"{bad} of {len(x)} rows of {name} hold NaN or infinity; look at the samples they come from."
    )
  return x


def _symmetric(matrix):
  return (matrix + matrix.T) / 2


def _root(covariance):
  """Symmetric square root of a positive semi-definite matrix."""
  values, vectors = np.linalg.eigh(_symmetric(covariance))
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

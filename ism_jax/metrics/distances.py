"""Distances between sets of images, from what a feature network sees in them.

- Fréchet distance (Heusel et al. 2017; FID, sFID, FD-DINOv2): the first two moments of two sets.
  It means little without the value that chance alone gives at the same sample size:
  `bootstrap_floor`.
- Kernel distance (Bińkowski et al. 2018; KID): all moments up to the third.
- Precision and recall (Kynkäänniemi et al. 2019): which samples lie among real ones, and of how
  many real ones the samples are neighbours.
- Nearest-neighbour distance, and the share of samples that are nearer to a training image than
  held-out images are (Meehan et al. 2020): tell copies of the training set from new images.

Axes: N, M samples, F (or D) features.
"""

import numpy as np
import scipy.linalg

from ism_jax.metrics.moments import Moments, feature_statistics, finite_rows

# Rows and columns of one tile of pairwise distances in `precision_recall`.
_TILE = 4096
# Rounding moves a squared distance that is computed from products by up to 5 eps of the sum of the
# squared norms (measured, 2048 features in float32). Distances closer than this are ties.
_TIE = 16
# Rows of a resample that are in memory at once.
_RESAMPLED_ROWS = 65_536


def frechet_distance(a, b):
  """Squared 2-Wasserstein distance of Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}).

  With S_a = L L^T, the eigenvalues of S_a S_b other than 0 are those of L^T S_b L, which is
  symmetric and positive semi-definite, so the trace of the root is the sum of the roots of its
  eigenvalues. L has as many columns as S_a has rank: singular covariances need no offset on the
  diagonal, and their zeros do not become roots of rounding errors.

  It is biased: by chance alone sets of fewer samples are farther away, about in inverse proportion
  to their number. Distances compare only between equal numbers of samples.

  Args:
    a, b: FeatureStatistics over the same F.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      f"a has {a.mean.size} features and b has {b.mean.size}; both need those of one network."
    )
  pairs = (_factor(a.covariance), b.covariance), (_factor(b.covariance), a.covariance)
  factor, other = min(pairs, key=lambda pair: pair[0].shape[1])
  product = factor.T @ other @ factor
  eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
  # Rounding leaves the zeros of a singular matrix slightly negative.
  trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
  traces = np.trace(a.covariance) + np.trace(b.covariance)
  with np.errstate(over="ignore"):
    distance = np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_of_root
  if not np.isfinite(distance):
    raise ValueError(
      f"the Fréchet distance is {distance}: means are up to {_largest(a.mean, b.mean)} and "
      f"covariances up to {_largest(a.covariance, b.covariance)}. Look at the images and at the "
      "weights of the network."
    )
  # The difference of equal traces can round to below zero.
  return float(max(distance, 0.0))


def _largest(*arrays) -> str:
  return f"{max(np.abs(array).max() for array in arrays):.3g}"


def kernel_distance(
  generated, real, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
  """Unbiased squared MMD with the kernel (x . y / F + 1)^3, on random subsets.

  It is unbiased at any sample size, so equal distributions give values on both sides of zero. The
  subsets are those that torch-fidelity draws with this seed.

  Args:
    generated, real: [N, F] and [M, F].
    subset_size: samples in a subset, drawn without replacement.
  Returns:
    (mean, standard deviation (ddof=0) over subsets). The standard error of the mean is smaller, but
    not by sqrt(subsets): subsets overlap.
  """
  generated, real = _two_sets(generated, real)
  fewest = min(len(generated), len(real))
  if not 2 <= subset_size <= fewest:
    raise ValueError(
      f"subsets of {subset_size} cannot be drawn from {len(generated)} generated and {len(real)} "
      f"real samples; set subset_size to 2..{fewest}, or add samples."
    )
  if subsets < 1:
    raise ValueError(f"subsets={subsets}: there must be at least one.")
  rng = np.random.RandomState(seed)
  distances = []
  for _ in range(subsets):
    x = generated[rng.choice(len(generated), subset_size, replace=False)].astype(np.float64)
    y = real[rng.choice(len(real), subset_size, replace=False)].astype(np.float64)
    within = 0.0
    for z in (x, y):
      kernel = _cubic_kernel(z, z)
      within += (kernel.sum() - np.trace(kernel)) / (subset_size * (subset_size - 1))
    distances.append(within - 2 * _cubic_kernel(x, y).mean())
  return float(np.mean(distances)), float(np.std(distances))


def precision_recall(real, generated, k: int = 3) -> tuple[float, float]:
  """Improved precision and recall.

  Around each sample of a set lies a ball whose radius is the distance to its k-th nearest neighbour
  in that set. Precision is the share of generated samples inside a ball of a real one, recall the
  share of real samples inside a ball of a generated one.

  Work and memory: (N^2 + M^2) / 2 + N M distances in tiles of `_TILE` x `_TILE`, in float32 unless
  features are float64; beyond the features about 250 MB for 2048 features, whatever N and M. Both
  sets are centred first, which moves no distance, so that a common offset does not cancel.
  Distances are compared squared; those that differ by less than 16 eps of the squared norms of
  their centred ends (2e-6 in float32) are ties, and on the surface is inside. So copies are inside,
  even those of a sample that has k copies and a radius of 0.

  Args:
    real, generated: [N, F] and [M, F].
    k: the neighbour, not counting the sample itself; 3 in the paper.
  Returns:
    (precision, recall), in 0..1.
  """
  generated, real = _two_sets(generated, real)
  fewest = min(len(generated), len(real))
  if not 1 <= k < fewest:
    raise ValueError(
      f"k={k}, but {len(generated)} generated and {len(real)} real samples have 1..{fewest - 1} "
      "neighbours; add samples or set a smaller k."
    )
  dtype = np.result_type(real, generated, np.float32)
  centre = real.mean(axis=0, dtype=np.float64).astype(dtype)
  real_radii, generated_radii = (_squared_radii(x, centre, k) for x in (real, generated))
  closer = dtype.type(1 - _TIE * np.finfo(dtype).eps)
  precise, recalled = np.zeros(len(generated), bool), np.zeros(len(real), bool)
  for rows, x, x_norms in _tiles(generated, centre):
    for columns, y, y_norms in _tiles(real, centre):
      distances = _squared_distances(x, closer * x_norms, y, closer * y_norms)
      precise[rows] |= (distances <= real_radii[columns]).any(axis=1)
      recalled[columns] |= (distances <= generated_radii[rows, None]).any(axis=0)
  return float(precise.mean()), float(recalled.mean())


def nearest_neighbour_distance(a, b, exclude_self=False):
  """Mean over the rows of a of the Euclidean distance to the nearest row of b.

  Memory stays bounded: scikit-learn computes distances in blocks.

  Args:
    a, b: [N, D] and [M, D].
    exclude_self: a is the first rows of b, in the same order, and row i must not find itself.
  """
  a, b = (finite_rows(np.asarray(x, np.float64), name) for x, name in ((a, "a"), (b, "b")))
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
  # Of the row itself and another one, the other is the farther, or as near.
  distances, _ = nearest(a, b, 1 + exclude_self)
  return float(distances.max(axis=1).mean())


def nearest(a, b, k: int) -> tuple[np.ndarray, np.ndarray]:
  """(Euclidean distances, rows of b), [N, k] each, of the k <= M nearest rows of b, nearest first.

  Args:
    a, b: [N, D] and [M, D], finite.
  """
  from sklearn.neighbors import NearestNeighbors  # slow to import

  rows = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(b).kneighbors(a)[1]
  # The search expands the square, which cancels for close rows: it only picks the neighbours. Their
  # distance is taken from the difference, and an exact copy is at exactly 0.
  distances = np.stack([np.linalg.norm(a - b[index], axis=1) for index in rows.T], axis=1)
  order = np.argsort(distances, axis=1, kind="stable")
  return np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)


def share_nearer(samples, held_out) -> float:
  """Share of pairs (sample, held-out image) of which the sample is nearer to a training image.

  The statistic of Meehan et al. (2020, arXiv:2004.05675), Mann and Whitney's U over the number of
  pairs, of one cell: 1/2 where samples are as near as images that were not trained on; 1 of copies;
  0 of samples that are far from all images.

  Args:
    samples, held_out: [N] and [M], distances to the nearest training image; ties count half.
  """
  samples, held_out = np.asarray(samples), np.sort(held_out)
  farther = [np.searchsorted(held_out, samples, side) for side in ("left", "right")]
  return float(1 - np.mean(farther) / len(held_out))


def bootstrap_floor(features, seed, repeats, count=None, real=None):
  """Mean and standard deviation of the Fréchet distance of a resample to all the features [N, F].

  A resample has rows drawn with replacement. A generator whose samples, as many, score no worse
  than this cannot be told from the data by this distance. A set of another count needs the floor of
  its count, which is about in inverse proportion to it. Of that floor, `count` of the features
  themselves, each once, come to 1 - count / N; of the same source but not among them, to
  1 + count / N, since the features themselves are there by chance too.

  Args:
    repeats: number of resamples, at least 2.
    count: rows of a resample, default N.
    real: FeatureStatistics that are compared with, default those of all the features.
  """
  if repeats < 2:
    raise ValueError(f"repeats={repeats} gives no standard deviation; use at least 2.")
  features = finite_rows(np.asarray(features, np.float64), "features")
  rng = np.random.default_rng(seed)
  real = real or feature_statistics(features)
  distances = []
  for _ in range(repeats):
    resample, rows = Moments(), rng.integers(len(features), size=count or len(features))
    for start in range(0, len(rows), _RESAMPLED_ROWS):
      resample.update(features[rows[start : start + _RESAMPLED_ROWS]])
    distances.append(frechet_distance(resample.statistics(), real))
  return float(np.mean(distances)), float(np.std(distances, ddof=1))


def _two_sets(generated, real):
  generated, real = finite_rows(generated, "generated"), finite_rows(real, "real")
  if generated.shape[1] != real.shape[1]:
    raise ValueError(
      f"generated has {generated.shape[1]} features and real has {real.shape[1]}; both need those "
      "of one network."
    )
  return generated, real


def _factor(covariance):
  """L [F, rank] with L L^T = covariance, positive semi-definite, by Cholesky with pivots."""
  # What is left of the diagonal once it is below F eps of its largest entry is rounding.
  factor, pivots, rank, info = scipy.linalg.lapack.dpstrf((covariance + covariance.T) / 2, lower=1)
  assert info >= 0, f"dpstrf refused argument {-info}"
  unpivoted = np.empty((len(covariance), rank))
  unpivoted[pivots - 1] = np.tril(factor)[:, :rank]
  return unpivoted


def _cubic_kernel(x, y):
  """(x . y / F + 1)^3 of all pairs of rows."""
  k = x @ y.T / x.shape[1] + 1
  return k * k * k


def _tiles(x, centre, first=0):
  """Yields (slice, x[slice] - centre, its squared norms), from row `first` on."""
  for start in range(first, len(x), _TILE):
    rows = slice(start, min(start + _TILE, len(x)))
    centred = x[rows] - centre
    norms = np.einsum("nf,nf->n", centred, centred, dtype=np.float64)
    yield rows, centred, norms.astype(centre.dtype)


def _squared_distances(x, x_norms, y, y_norms):
  """|x|^2 + |y|^2 - 2 x . y of all pairs of rows: as fast as a product of matrices."""
  distances = x @ (-2 * y).T
  distances += x_norms[:, None]
  distances += y_norms
  return distances


def _squared_radii(x, centre, k):
  """[N]: squared distance of each row of x to its k-th nearest other row."""
  nearest = np.full((len(x), k), np.inf, centre.dtype)
  for rows, a, a_norms in _tiles(x, centre):
    for columns, b, b_norms in _tiles(x, centre, first=rows.start):
      distances = _squared_distances(a, a_norms, b, b_norms)
      if columns == rows:
        np.fill_diagonal(distances, np.inf)
      else:
        # Of the symmetric matrix only tiles on and above the diagonal are computed.
        nearest[columns] = _smallest(distances.T.copy(), nearest[columns])
      nearest[rows] = _smallest(distances, nearest[rows])
  return nearest.max(axis=1)


def _smallest(distances, known):
  """The k smallest of each row of distances and known [N, k] together; overwrites distances."""
  k = known.shape[1]
  smallest, index = [known], np.arange(len(distances))
  # k searches for a minimum: ten times faster than a partial sort, for the few that k is.
  for _ in range(min(k, distances.shape[1])):
    column = distances.argmin(axis=1)
    smallest.append(distances[index, column][:, None])
    distances[index, column] = np.inf
  return np.sort(np.concatenate(smallest, axis=1), axis=1)[:, :k]

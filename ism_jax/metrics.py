"""Distances between sets of images, and scores of one, from what a feature network sees in them.

- Fréchet distance (Heusel et al. 2017; FID, sFID, FD-DINOv2): the first two moments of two sets.
  It means little without the value that chance alone gives at the same sample size:
  `bootstrap_floor`.
- Inception Score (Salimans et al. 2016): how sure and how varied a classifier's answers are.
- Kernel distance (Bińkowski et al. 2018; KID): all moments up to the third.
- Precision and recall (Kynkäänniemi et al. 2019): which samples lie among real ones, and of how
  many real ones the samples are neighbours.
- Nearest-neighbour distance: tells copies of the training set from new images.

Moments and sums are float64 NumPy on the host. `Moments` and `InceptionScore` are fed batch by
batch and keep nothing of single samples.
Axes: N, M samples, B batch, F (or D) features, C classes.
"""

import dataclasses
import warnings

import numpy as np
import scipy.linalg
import scipy.special

# Entries of one block of pairwise distances: 2^22 float64 are 32 MiB.
_BLOCK_ENTRIES = 2**22
# Rows that are centred at once; of 2048 features they are 64 MiB in float64.
_BLOCK_ROWS = 4096
# Rows and columns of one tile of pairwise distances in `precision_recall`.
_TILE = 4096
# Rounding moves a squared distance that is computed from products by up to 5 eps of the sum of the
# squared norms (measured, 2048 features in float32). Distances closer than this are ties.
_TIE = 16


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
    if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
      raise ValueError("mean or covariance holds NaN or infinity; make the statistics again.")


class Moments:
  """Mean and covariance of features that come in batches, as exact as of all of them at once.

  Moments of parts are merged as by Chan et al. (1979): nothing cancels, however far the mean is
  from zero. With 2048 features it is 32 MiB.
  """

  def __init__(self):
    self._count = 0
    self._mean = np.zeros(0)
    # Sum of (x - mean) (x - mean)^T; only its lower triangle is kept up to date.
    self._scatter = np.zeros((0, 0))

  def update(self, features) -> None:
    """Adds feature vectors [B, F].

    Raises:
      ValueError: rows that hold NaN or infinity, or another F than before; nothing was added then.
    """
    features = _finite_rows(features, "features")
    for start in range(0, len(features), _BLOCK_ROWS):
      block = features[start : start + _BLOCK_ROWS]
      mean = block.mean(axis=0, dtype=np.float64)
      self._add(len(block), mean, np.subtract(block, mean, dtype=np.float64))

  def merge(self, other: "Moments") -> None:
    """Adds what another one was given, on another process for example."""
    if other._count:
      self._add(other._count, other._mean, np.zeros((0, other._mean.size)))
      self._scatter += other._scatter

  def _add(self, count, mean, centred):
    if not self._count:
      self._mean = np.zeros(mean.size)
      self._scatter = np.zeros((mean.size, mean.size))
    if mean.size != self._mean.size:
      raise ValueError(
        f"features have {mean.size} entries, those before them {self._mean.size}; both need those "
        "of one network."
      )
    total, step = self._count + count, mean - self._mean
    # The distance between the two means is one more centred row.
    rows = np.concatenate([centred, np.sqrt(self._count * count / total) * step[None]])
    self._mean = self._mean + count / total * step
    self._count = total
    # A transpose is a matrix in BLAS's own order, which it adds to in place: its upper triangle is
    # our lower one. That is five times faster than `+= rows.T @ rows` for small batches.
    self._scatter = scipy.linalg.blas.dsyrk(
      1.0, rows.T, beta=1.0, c=self._scatter.T, overwrite_c=True
    ).T

  def statistics(self) -> FeatureStatistics:
    """Of everything that was added.

    With N <= F the covariance is singular: the Fréchet distance is still defined, but it is biased
    upwards so much that it compares with no published value. That is a warning, not an error.

    Raises:
      ValueError: fewer than two rows.
    """
    if self._count < 2:
      raise ValueError(f"a covariance needs at least 2 feature rows; got {self._count}.")
    if self._count <= self._mean.size:
      warnings.warn(
        f"{self._count} samples do not determine the covariance of {self._mean.size} features "
        f"(rank at most {self._count - 1}); use more than {self._mean.size} samples.",
        stacklevel=2,
      )
    lower = np.tril(self._scatter) / (self._count - 1)
    covariance = lower + np.tril(lower, -1).T
    return FeatureStatistics(self._mean.copy(), covariance, self._count)


def feature_statistics(features) -> FeatureStatistics:
  """`Moments.statistics` of features [N, F].

  Raises:
    ValueError: fewer than two rows, or rows that hold NaN or infinity.
  """
  moments = Moments()
  moments.update(features)
  return moments.statistics()


def frechet_distance(a, b):
  """Squared 2-Wasserstein distance of Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}).

  With S_a = L L^T, the eigenvalues of S_a S_b other than 0 are those of L^T S_b L, which is
  symmetric and positive semi-definite, so the trace of the root is the sum of the roots of its
  eigenvalues. L has as many columns as S_a has rank: singular covariances need no offset on the
  diagonal, and their zeros do not become roots of rounding errors.

  Args:
    a, b: FeatureStatistics over the same F.
  Returns:
    float, not negative.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      f"a has {a.mean.size} features and b has {b.mean.size}; both need those of one network."
    )
  factor_a, factor_b = _factor(a.covariance), _factor(b.covariance)
  factor, other = factor_a, b.covariance
  if factor_b.shape[1] < factor_a.shape[1]:
    factor, other = factor_b, a.covariance
  eigenvalues = np.linalg.eigvalsh(_symmetric(factor.T @ other @ factor))
  # Rounding leaves the zeros of a singular matrix slightly negative.
  trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
  traces = np.trace(a.covariance) + np.trace(b.covariance)
  distance = np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_of_root
  # The difference of equal traces can round to below zero.
  return float(max(distance, 0.0))


class InceptionScore:
  """exp of the mean of KL(p(c|x) || p(c)), of a classifier's p(c|x), in equal parts of the samples.

  Each part has its own p(c), and the score is biased downwards where parts are small: it compares
  only between equal numbers of samples. Samples are dealt to the parts by a permutation, so that
  images in order of their classes do not make parts of few classes; with the default seed it is the
  permutation of torch-fidelity.

  Args:
    total: samples that will be added.
    splits: parts.
    seed: of the permutation; None deals contiguous parts, as ADM's evaluator does.
  """

  def __init__(self, total: int, splits: int = 10, seed: int | None = 2020):
    if not 1 <= splits <= total:
      raise ValueError(f"{total} samples do not fill {splits} splits; add samples.")
    order = np.arange(total) if seed is None else np.random.RandomState(seed).permutation(total)
    ends = np.arange(1, splits + 1) * total // splits
    self._split_of = np.empty(total, int)
    self._split_of[order] = np.searchsorted(ends, np.arange(total), side="right")
    self._added = np.zeros(total, bool)
    self._sums = np.zeros((splits, 0))  # of p(c|x)
    self._negative_entropies = np.zeros(splits)  # sums of sum_c p(c|x) log p(c|x)

  def update(self, logits, indices=None) -> None:
    """Adds samples.

    Args:
      logits: [B, C]. For the published score, of the Inception of 2015 without its bias.
      indices: [B], which of the `total` samples they are; None: those after the ones added so far.
    Raises:
      ValueError: rows that hold NaN or infinity, another C than before, or samples that were added
        before or that are none of the `total`; nothing was added then.
    """
    logits = _finite_rows(logits, "logits").astype(np.float64)
    if indices is None:
      first = np.count_nonzero(self._added)
      indices = np.arange(first, first + len(logits))
    indices = np.asarray(indices)
    if np.any((indices < 0) | (indices >= len(self._added))):
      raise ValueError(
        f"samples {indices.min()} to {indices.max()} were added of {len(self._added)}; make the "
        "score with their total."
      )
    if np.any(self._added[indices]) or len(np.unique(indices)) != len(logits):
      raise ValueError(f"some of samples {indices.min()} to {indices.max()} were added twice.")
    if not self._added.any():
      self._sums = np.zeros((len(self._sums), logits.shape[1]))
    if logits.shape[1] != self._sums.shape[1]:
      raise ValueError(f"logits have {logits.shape[1]} classes, before {self._sums.shape[1]}.")
    log_p = scipy.special.log_softmax(logits, axis=1)
    p = np.exp(log_p)
    split = self._split_of[indices]
    self._sums += (split == np.arange(len(self._sums))[:, None]) @ p
    self._negative_entropies += np.bincount(
      split, np.sum(p * log_p, axis=1), minlength=len(self._sums)
    )
    self._added[indices] = True

  def result(self) -> tuple[float, float]:
    """Mean and standard deviation (ddof=0) of the scores of the parts."""
    if not self._added.all():
      raise ValueError(
        f"{np.count_nonzero(self._added)} samples were added of {len(self._added)}; add the others."
      )
    counts = np.bincount(self._split_of)
    marginal = self._sums / counts[:, None]
    # A class that no sample could be has no logarithm, and counts for nothing.
    scores = np.exp(
      self._negative_entropies / counts - scipy.special.xlogy(marginal, marginal).sum(axis=1)
    )
    return float(scores.mean()), float(scores.std())


def kernel_distance(
  generated, real, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
  """Unbiased squared MMD with the kernel (x . y / F + 1)^3, on random subsets.

  It is unbiased at any sample size, so equal distributions give values on both sides of zero. The
  subsets are those that torch-fidelity draws with this seed.

  Args:
    generated, real: [N, F] and [M, F].
    subsets: how many subsets of each.
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


def _finite_rows(x, name):
  """x [N, D] as it is; a ValueError says how many rows are not finite."""
  x = np.asarray(x)
  if x.ndim != 2:
    raise ValueError(f"{name} has shape {x.shape}; needed is one row per sample, [N, D].")
  # NaN and infinity both reach the extremes of a row, which take no memory as `isfinite(x)` does.
  bad = len(x) and np.count_nonzero(~(np.isfinite(x.min(axis=1)) & np.isfinite(x.max(axis=1))))
  if bad:
    raise ValueError(
      f"{bad} of {len(x)} rows of {name} hold NaN or infinity; look at the samples they come from."
    )
  return x


def _finite_matrix(x, name):
  """As `_finite_rows`, in float64."""
  return _finite_rows(np.asarray(x, np.float64), name)


def _two_sets(generated, real):
  generated, real = _finite_rows(generated, "generated"), _finite_rows(real, "real")
  if generated.shape[1] != real.shape[1]:
    raise ValueError(
      f"generated has {generated.shape[1]} features and real has {real.shape[1]}; both need those "
      "of one network."
    )
  return generated, real


def _symmetric(matrix):
  return (matrix + matrix.T) / 2


def _factor(covariance):
  """L [F, rank] with L L^T = covariance, positive semi-definite, by Cholesky with pivots."""
  # What is left of the diagonal once it is below F eps of its largest entry is rounding.
  factor, pivots, rank, info = scipy.linalg.lapack.dpstrf(_symmetric(covariance), lower=1)
  if info < 0:
    raise AssertionError(f"dpstrf refused argument {-info}")
  unpivoted = np.empty((len(covariance), rank))
  unpivoted[pivots - 1] = np.tril(factor)[:, :rank]
  return unpivoted


def _cubic_kernel(x, y):
  """(x . y / F + 1)^3 of all pairs of rows."""
  k = x @ y.T
  k /= x.shape[1]
  k += 1
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
  found, index = [known], np.arange(len(distances))
  # k searches for a minimum: ten times faster than a partial sort, for the few that k is.
  for _ in range(min(k, distances.shape[1])):
    column = distances.argmin(axis=1)
    found.append(distances[index, column][:, None])
    distances[index, column] = np.inf
  return np.sort(np.concatenate(found, axis=1), axis=1)[:, :k]

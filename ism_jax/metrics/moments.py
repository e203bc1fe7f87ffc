"""What is added up of features and logits, batch by batch: moments, and the Inception Score.

Nothing of single samples stays in memory. Moments and sums are float64 NumPy on the host.

The Inception Score (Salimans et al. 2016) says how sure and how varied a classifier's answers are.
Axes: N samples, B batch, F features, C classes.
"""

import dataclasses
import warnings

import numpy as np
import scipy.linalg
import scipy.special

# Rows that are centred at once; of 2048 features they are 64 MiB in float64.
_BLOCK_ROWS = 4096
_SCORE_SEED = 2020  # torch-fidelity's
# Of the largest variance (or entry): what rounding may do to a covariance. One of 2048 features in
# float32 has eigenvalues down to -5e-6 of it, and in float64 far nearer to zero.
_ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
  """Mean [F] and unbiased (ddof=1) covariance [F, F] of `count` feature vectors.

  A covariance may be singular, and off by rounding in float32; what is none is a ValueError.
  """

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
    if fault := _covariance_fault(self.mean, self.covariance):
      raise ValueError(f"{fault}: make the statistics again.")


def _covariance_fault(mean, covariance) -> str:
  """What keeps finite moments from being those of feature vectors; "" where nothing does."""
  variances, largest = np.diagonal(covariance), np.abs(covariance).max()
  with np.errstate(over="ignore"):
    if not np.isfinite(np.sum(mean**2) + (largest * len(mean)) ** 2):
      largest = max(largest, np.abs(mean).max())
      return f"mean or covariance goes to {largest:.3g}, whose square is not finite"
  asymmetry = np.abs(covariance - covariance.T)
  if asymmetry.max() > _ROUNDING * largest:
    i, j = np.unravel_index(asymmetry.argmax(), asymmetry.shape)
    return (
      f"the covariance is not symmetric, with {covariance[i, j]:.6g} at [{i}, {j}] and "
      f"{covariance[j, i]:.6g} at [{j}, {i}]"
    )
  shift = _ROUNDING * variances.max()
  if variances.min() < -shift:
    return f"the variance of feature {variances.argmin()} is negative, {variances.min():.6g}"
  # With a little more variance there is a Cholesky factor, unless an eigenvalue is far below zero.
  # That takes a tenth of the time of the eigenvalues.
  shifted = covariance + shift * np.eye(len(mean))
  if scipy.linalg.lapack.dpotrf(shifted, lower=1)[1] if shift > 0 else largest > 0:
    smallest, *_, greatest = np.linalg.eigvalsh((covariance + covariance.T) / 2)
    return f"the covariance has eigenvalues from {smallest:.6g} to {greatest:.6g}, some below 0"
  return ""


class Moments:
  """Mean and covariance of features that come in batches, as exact as of all of them at once.

  Moments of parts are merged as by Chan et al. (1979): nothing cancels, however far the mean is
  from zero. With 2048 features it is 32 MiB.
  """

  def __init__(self):
    self._count = 0
    self._mean = np.zeros(0)
    # Sum of (x - mean) (x - mean)^T; only its lower triangle is up to date.
    self._scatter = np.zeros((0, 0))

  def update(self, features) -> None:
    """Adds feature vectors [B, F]; a ValueError for rows that do not fit adds nothing."""
    features = finite_rows(features, "features")
    size = features.shape[1]
    if not self._count:
      self._mean, self._scatter = np.zeros(size), np.zeros((size, size))
    if size != self._mean.size:
      raise ValueError(
        f"features have {size} entries, those before them {self._mean.size}; both need those of "
        "one network."
      )
    for start in range(0, len(features), _BLOCK_ROWS):
      block = features[start : start + _BLOCK_ROWS]
      mean = block.mean(axis=0, dtype=np.float64)
      total, step = self._count + len(block), mean - self._mean
      # The distance between the two means is one more centred row.
      between = np.sqrt(self._count * len(block) / total) * step[None]
      rows = np.concatenate([np.subtract(block, mean, dtype=np.float64), between])
      self._mean = self._mean + len(block) / total * step
      self._count = total
      # A transpose is a matrix in BLAS's own order, which it adds to in place: its upper triangle
      # is our lower one. That is five times faster than `+= rows.T @ rows` for small batches.
      place = {"c": self._scatter.T, "overwrite_c": True}
      self._scatter = scipy.linalg.blas.dsyrk(1.0, rows.T, beta=1.0, **place).T

  def statistics(self) -> FeatureStatistics:
    """Of everything that was added.

    With N <= F the covariance is singular: the Fréchet distance is still defined, but it is biased
    upwards so much that it compares with no published value. That is a warning; fewer than two rows
    are a ValueError.
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
  """`Moments.statistics` of features [N, F]."""
  moments = Moments()
  moments.update(features)
  return moments.statistics()


class InceptionScore:
  """exp of the mean of KL(p(c|x) || p(c)), of a classifier's p(c|x), in equal parts of the samples.

  Each part has its own p(c), and the score is biased downwards where parts are small: it compares
  only between equal numbers of samples. The `total` samples are dealt to the parts by
  torch-fidelity's permutation, so that images in order of their classes do not make parts of few
  classes.
  """

  def __init__(self, total: int, splits: int = 10):
    if not 1 <= splits <= total:
      raise ValueError(f"{total} samples do not fill {splits} splits; add samples.")
    order = np.random.RandomState(_SCORE_SEED).permutation(total)
    ends = np.arange(1, splits + 1) * total // splits
    self._split_of = np.empty(total, int)
    self._split_of[order] = np.searchsorted(ends, np.arange(total), side="right")
    self._added, self._total = 0, total
    self._sums = np.zeros((splits, 0))  # of p(c|x)
    self._negative_entropies = np.zeros(splits)  # sums of sum_c p(c|x) log p(c|x)

  def update(self, logits) -> None:
    """Adds the next samples' logits [B, C]; a ValueError for rows that do not fit adds nothing.

    For the published score they are those of the Inception of 2015 without its bias.
    """
    logits = finite_rows(logits, "logits").astype(np.float64)
    stop = self._added + len(logits)
    if stop > self._total:
      raise ValueError(
        f"{stop} samples were added of {self._total}; make the score with their total."
      )
    if not self._added:
      self._sums = np.zeros((len(self._sums), logits.shape[1]))
    if logits.shape[1] != self._sums.shape[1]:
      raise ValueError(f"logits have {logits.shape[1]} classes, before {self._sums.shape[1]}.")
    log_p = scipy.special.log_softmax(logits, axis=1)
    p = np.exp(log_p)
    split = self._split_of[self._added : stop]
    self._sums += (split == np.arange(len(self._sums))[:, None]) @ p
    negative = np.sum(p * log_p, axis=1)
    self._negative_entropies += np.bincount(split, negative, minlength=len(self._sums))
    self._added = stop

  def leave_out(self, count: int) -> None:
    """Says that so many of the total will not be added: the last ones dealt, in effect."""
    self._total -= count
    self._split_of = self._split_of[: self._total]

  def result(self) -> tuple[float, float]:
    """Mean and standard deviation (ddof=0) of the scores of the parts."""
    if self._added < self._total:
      raise ValueError(f"{self._added} samples were added of {self._total}; add the others.")
    counts = np.bincount(self._split_of, minlength=len(self._sums))
    if not counts.all():
      raise ValueError(f"{self._total} samples do not fill {len(counts)} splits; add samples.")
    marginal = self._sums / counts[:, None]
    # A class that no sample could be has no logarithm, and counts for nothing.
    entropy = -scipy.special.xlogy(marginal, marginal).sum(axis=1)
    scores = np.exp(self._negative_entropies / counts + entropy)
    return float(scores.mean()), float(scores.std())


def finite_rows(x, name):
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

"""The distances against closed forms, SciPy's matrix square root and its k-d tree."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

from ism_jax import metrics


@pytest.fixture
def rng():
  return np.random.default_rng(7)


def gaussian(mean, covariance):
  """Exact moments, as if of infinitely many samples."""
  return metrics.FeatureStatistics(np.asarray(mean, float), np.asarray(covariance, float), 10**9)


def random_covariance(rng, size):
  factor = rng.normal(size=(size, 2 * size))
  return factor @ factor.T / (2 * size)


def random_rotation(rng, size):
  return np.linalg.qr(rng.normal(size=(size, size)))[0]


def test_statistics_are_those_of_numpy_in_float64(rng):
  # A mean far from zero: float32 arithmetic would lose the covariance.
  features = (1000 + rng.normal(size=(200, 5))).astype(np.float32)
  statistics = metrics.feature_statistics(features)
  features = features.astype(np.float64)
  np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-14)
  np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-9)
  assert statistics.count == 200


def test_too_few_samples_for_a_covariance_are_a_warning_with_both_numbers(rng):
  with pytest.warns(UserWarning, match=r"\b8 samples.*\b8 features"):
    singular = metrics.feature_statistics(rng.normal(size=(8, 8)))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    regular = metrics.feature_statistics(rng.normal(size=(9, 8)))
  assert np.linalg.matrix_rank(singular.covariance) == 7
  assert np.linalg.matrix_rank(regular.covariance) == 8


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_an_error_with_their_number(rng, bad):
  features = rng.normal(size=(50, 4))
  features[[3, 3, 17, 40], [0, 1, 2, 3]] = bad
  with pytest.raises(ValueError, match="3 of 50 rows of features"):
    metrics.feature_statistics(features)
  with pytest.raises(ValueError, match="3 of 50 rows of b"):
    metrics.nearest_neighbour_distance(np.zeros((2, 4)), features)


def test_one_row_has_no_covariance():
  with pytest.raises(ValueError, match="at least 2 feature rows; got 1"):
    metrics.feature_statistics(np.zeros((1, 3)))


def test_frechet_distance_is_that_of_scipys_matrix_square_root(rng):
  s_a, s_b = random_covariance(rng, 12), 3 * random_covariance(rng, 12)
  m_a, m_b = rng.normal(size=12), rng.normal(size=12)
  root = scipy.linalg.sqrtm(s_a @ s_b).real
  expected = np.sum((m_a - m_b) ** 2) + np.trace(s_a + s_b - 2 * root)
  distance = metrics.frechet_distance(gaussian(m_a, s_a), gaussian(m_b, s_b))
  np.testing.assert_allclose(distance, expected, rtol=1e-9)


def test_frechet_distance_in_one_dimension_is_that_of_mean_and_standard_deviation():
  distance = metrics.frechet_distance(gaussian([1.0], [[4.0]]), gaussian([-2.0], [[0.25]]))
  np.testing.assert_allclose(distance, (1 + 2) ** 2 + (2 - 0.5) ** 2, rtol=1e-13)


def test_frechet_distance_of_commuting_covariances_compares_standard_deviations(rng):
  basis = random_rotation(rng, 6)
  l_a, l_b = rng.uniform(0.1, 5, 6), rng.uniform(0.1, 5, 6)
  a = gaussian(np.zeros(6), (basis * l_a) @ basis.T)
  b = gaussian(np.zeros(6), (basis * l_b) @ basis.T)
  expected = np.sum((np.sqrt(l_a) - np.sqrt(l_b)) ** 2)
  np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 2])
def test_frechet_distance_of_two_lines_has_its_closed_form(rng, angle):
  # Rank one in 16 dimensions: tr (S_a S_b)^{1/2} = |u . v| sqrt(l_a l_b).
  e0, e1 = random_rotation(rng, 16)[:2]
  u, v = e0, np.cos(angle) * e0 + np.sin(angle) * e1
  a, b = gaussian(e1, 4 * np.outer(u, u)), gaussian(np.zeros(16), 9 * np.outer(v, v))
  expected = 1 + 4 + 9 - 2 * 6 * np.cos(angle)
  np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-6)


def test_frechet_distance_with_more_features_than_samples_is_that_of_their_span(rng):
  # 10 samples span a few of 40 dimensions; turning them there from a small space changes nothing.
  x_a, x_b = rng.normal(size=(10, 4)), 2 * rng.normal(size=(10, 4)) + 1
  embedding = random_rotation(rng, 40)[:4]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    a, b, wide_a, wide_b = map(
      metrics.feature_statistics, (x_a, x_b, x_a @ embedding, x_b @ embedding)
    )
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
  np.testing.assert_allclose(metrics.frechet_distance(wide_a, wide_b), expected, rtol=1e-6)
  assert metrics.frechet_distance(wide_a, wide_a) < 1e-6


def test_frechet_distance_never_rounds_to_below_zero(rng):
  for _ in range(20):
    a = gaussian(np.zeros(8), random_covariance(rng, 8))
    assert 0 <= metrics.frechet_distance(a, a) < 1e-12


def test_statistics_of_different_networks_are_an_error_with_both_sizes():
  with pytest.raises(ValueError, match="a has 3 features and b has 4"):
    metrics.frechet_distance(gaussian(np.zeros(3), np.eye(3)), gaussian(np.zeros(4), np.eye(4)))
  with pytest.raises(ValueError, match=r"\(3,\).*\(4, 4\)"):
    gaussian(np.zeros(3), np.eye(4))


@pytest.mark.parametrize("entries", [1, 5 * 130, 2**22])
def test_nearest_neighbours_are_those_of_a_kd_tree(rng, monkeypatch, entries):
  monkeypatch.setattr(metrics, "_BLOCK_ENTRIES", entries)
  a, b = rng.normal(size=(47, 3)), rng.normal(size=(130, 3))
  expected = scipy.spatial.cKDTree(b).query(a)[0].mean()
  np.testing.assert_allclose(metrics.nearest_neighbour_distance(a, b), expected, rtol=1e-12)


@pytest.mark.parametrize("entries", [1, 5 * 130, 2**22])
def test_a_set_within_itself_has_the_kd_trees_second_neighbours(rng, monkeypatch, entries):
  monkeypatch.setattr(metrics, "_BLOCK_ENTRIES", entries)
  x = rng.normal(size=(130, 3))
  expected = scipy.spatial.cKDTree(x).query(x, k=2)[0][:, 1].mean()
  distance = metrics.nearest_neighbour_distance(x, x, exclude_self=True)
  np.testing.assert_allclose(distance, expected, rtol=1e-12)


def test_the_first_rows_of_a_set_find_others_than_themselves(rng):
  x = rng.normal(size=(60, 3))
  distances = scipy.spatial.distance.cdist(x[:7], x)
  distances[np.arange(7), np.arange(7)] = np.inf
  found = metrics.nearest_neighbour_distance(x[:7], x, exclude_self=True)
  np.testing.assert_allclose(found, distances.min(1).mean(), rtol=1e-12)


def test_copies_are_at_distance_exactly_zero_far_from_the_origin(rng):
  x = 1e6 + rng.normal(size=(60, 30))
  assert metrics.nearest_neighbour_distance(x[10:20], x) == 0.0
  # A copy within the set is a neighbour, even where a row must not find itself.
  assert metrics.nearest_neighbour_distance(*2 * [np.repeat(x, 2, axis=0)], exclude_self=True) == 0


def test_neighbours_that_cannot_be_are_errors():
  x = np.zeros((4, 2))
  with pytest.raises(ValueError, match="2 entries, rows of b 3"):
    metrics.nearest_neighbour_distance(x, np.zeros((4, 3)))
  with pytest.raises(ValueError, match="first rows of b"):
    metrics.nearest_neighbour_distance(x, np.zeros((3, 2)), exclude_self=True)
  with pytest.raises(ValueError, match="no neighbours among 1"):
    metrics.nearest_neighbour_distance(x[:1], x[:1], exclude_self=True)


def test_the_floor_of_a_gaussian_is_three_halves_of_its_variance_over_n(rng):
  # In one dimension the distance is dm^2 + ds^2 with dm ~ N(0, s^2/n) and ds ~ N(0, s^2/2n):
  # mean 3/2 s^2/n, standard deviation sqrt(2 + 1/2) s^2/n.
  n, sigma = 2000, 3.0
  features = sigma * rng.normal(size=(n, 1))
  mean, deviation = metrics.bootstrap_floor(features, seed=0, repeats=1000)
  np.testing.assert_allclose(mean * n / sigma**2, 1.5, rtol=0.15)
  np.testing.assert_allclose(deviation * n / sigma**2, np.sqrt(2.5), rtol=0.2)


def test_the_floor_repeats_with_its_seed_and_only_with_it(rng):
  features = rng.normal(size=(100, 3))
  first = metrics.bootstrap_floor(features, 1, 3)
  assert metrics.bootstrap_floor(features, 1, 3) == first
  assert metrics.bootstrap_floor(features, 2, 3) != first
  with pytest.raises(ValueError, match="repeats=1"):
    metrics.bootstrap_floor(features, 1, 1)

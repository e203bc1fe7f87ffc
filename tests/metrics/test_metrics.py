"""The metrics against closed forms, SciPy, sums written as loops, and torch-fidelity."""

import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import scipy.stats

from ism_jax.metrics import distances, moments


@pytest.fixture
def rng():
  return np.random.default_rng(7)


def gaussian(mean, covariance):
  """Exact moments, as if of infinitely many samples."""
  return moments.FeatureStatistics(np.asarray(mean, float), np.asarray(covariance, float), 10**9)


def random_covariance(rng, size):
  factor = rng.normal(size=(size, 2 * size))
  return factor @ factor.T / (2 * size)


def random_rotation(rng, size):
  return np.linalg.qr(rng.normal(size=(size, size)))[0]


def test_statistics_are_those_of_numpy_in_float64(rng):
  # A mean far from zero: float32 arithmetic would lose the covariance.
  features = (1000 + rng.normal(size=(200, 5))).astype(np.float32)
  statistics = moments.feature_statistics(features)
  features = features.astype(np.float64)
  np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-14)
  np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-9)
  assert statistics.count == 200


def test_too_few_samples_for_a_covariance_are_a_warning_with_both_numbers(rng):
  with pytest.warns(UserWarning, match=r"\b8 samples.*\b8 features"):
    singular = moments.feature_statistics(rng.normal(size=(8, 8)))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    regular = moments.feature_statistics(rng.normal(size=(9, 8)))
  assert np.linalg.matrix_rank(singular.covariance) == 7
  assert np.linalg.matrix_rank(regular.covariance) == 8


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_an_error_with_their_number(rng, bad):
  features = rng.normal(size=(50, 4))
  features[[3, 3, 17, 40], [0, 1, 2, 3]] = bad
  with pytest.raises(ValueError, match="3 of 50 rows of features"):
    moments.feature_statistics(features)
  with pytest.raises(ValueError, match="3 of 50 rows of b"):
    distances.nearest_neighbour_distance(np.zeros((2, 4)), features)


def test_one_row_has_no_covariance():
  with pytest.raises(ValueError, match="at least 2 feature rows; got 1"):
    moments.feature_statistics(np.zeros((1, 3)))


def test_frechet_distance_is_that_of_scipys_matrix_square_root(rng):
  s_a, s_b = random_covariance(rng, 12), 3 * random_covariance(rng, 12)
  m_a, m_b = rng.normal(size=12), rng.normal(size=12)
  root = scipy.linalg.sqrtm(s_a @ s_b).real
  expected = np.sum((m_a - m_b) ** 2) + np.trace(s_a + s_b - 2 * root)
  distance = distances.frechet_distance(gaussian(m_a, s_a), gaussian(m_b, s_b))
  np.testing.assert_allclose(distance, expected, rtol=1e-9)


def test_frechet_distance_in_one_dimension_is_that_of_mean_and_standard_deviation():
  distance = distances.frechet_distance(gaussian([1.0], [[4.0]]), gaussian([-2.0], [[0.25]]))
  np.testing.assert_allclose(distance, (1 + 2) ** 2 + (2 - 0.5) ** 2, rtol=1e-13)


def test_frechet_distance_of_commuting_covariances_compares_standard_deviations(rng):
  basis = random_rotation(rng, 6)
  l_a, l_b = rng.uniform(0.1, 5, 6), rng.uniform(0.1, 5, 6)
  a = gaussian(np.zeros(6), (basis * l_a) @ basis.T)
  b = gaussian(np.zeros(6), (basis * l_b) @ basis.T)
  expected = np.sum((np.sqrt(l_a) - np.sqrt(l_b)) ** 2)
  np.testing.assert_allclose(distances.frechet_distance(a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 2])
def test_frechet_distance_of_two_lines_has_its_closed_form(rng, angle):
  # Rank one in 16 dimensions: tr (S_a S_b)^{1/2} = |u . v| sqrt(l_a l_b).
  e0, e1 = random_rotation(rng, 16)[:2]
  u, v = e0, np.cos(angle) * e0 + np.sin(angle) * e1
  a, b = gaussian(e1, 4 * np.outer(u, u)), gaussian(np.zeros(16), 9 * np.outer(v, v))
  expected = 1 + 4 + 9 - 2 * 6 * np.cos(angle)
  np.testing.assert_allclose(distances.frechet_distance(a, b), expected, rtol=1e-6)


def test_frechet_distance_with_more_features_than_samples_is_that_of_their_span(rng):
  # 10 samples span a few of 40 dimensions; turning them there from a small space changes nothing.
  x_a, x_b = rng.normal(size=(10, 4)), 2 * rng.normal(size=(10, 4)) + 1
  embedding = random_rotation(rng, 40)[:4]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    a, b, wide_a, wide_b = map(
      moments.feature_statistics, (x_a, x_b, x_a @ embedding, x_b @ embedding)
    )
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
  np.testing.assert_allclose(distances.frechet_distance(wide_a, wide_b), expected, rtol=1e-6)
  assert distances.frechet_distance(wide_a, wide_a) < 1e-6


def test_frechet_distance_never_rounds_to_below_zero(rng):
  for _ in range(20):
    a = gaussian(np.zeros(8), random_covariance(rng, 8))
    assert 0 <= distances.frechet_distance(a, a) < 1e-12


def test_statistics_of_different_networks_are_an_error_with_both_sizes():
  with pytest.raises(ValueError, match="a has 3 features and b has 4"):
    distances.frechet_distance(gaussian(np.zeros(3), np.eye(3)), gaussian(np.zeros(4), np.eye(4)))
  with pytest.raises(ValueError, match=r"\(3,\).*\(4, 4\)"):
    gaussian(np.zeros(3), np.eye(4))


@pytest.mark.parametrize("samples", [(20, 30), (30, 20), (20, 150), (150, 20), (150, 200)])
def test_frechet_distance_of_samples_is_that_of_the_nuclear_norm_of_their_product(rng, samples):
  # With S = X^T X of centred rows X, tr (S_a S_b)^{1/2} is the sum of the singular values of
  # X_a X_b^T: no root of a covariance is taken, so directions without variance cost no precision.
  mixing = rng.normal(size=(60, 60)) * np.logspace(0, -4, 60)
  sets = [rng.normal(size=(n, 60)) @ mixing + i for i, n in enumerate(samples)]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    distance = distances.frechet_distance(*map(moments.feature_statistics, sets))
  x_a, x_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in sets)
  means = np.sum((sets[0].mean(0) - sets[1].mean(0)) ** 2)
  nuclear = np.linalg.norm(x_a @ x_b.T, "nuc")
  expected = means + np.sum(x_a**2) + np.sum(x_b**2) - 2 * nuclear
  np.testing.assert_allclose(distance, expected, rtol=1e-11)


def test_a_set_of_one_image_has_a_frechet_distance(rng):
  one, s = gaussian(np.ones(5), np.zeros((5, 5))), random_covariance(rng, 5)
  for pair in ((one, gaussian(np.zeros(5), s)), (gaussian(np.zeros(5), s), one)):
    np.testing.assert_allclose(distances.frechet_distance(*pair), 5 + np.trace(s), rtol=1e-12)
  assert distances.frechet_distance(one, one) == 0.0


def test_statistics_that_are_not_finite_are_an_error():
  with pytest.raises(ValueError, match="NaN or infinity"):
    gaussian(np.zeros(2), [[1.0, np.nan], [np.nan, 1.0]])


NO_COVARIANCE = {
  "goes to 1e.300, whose square is not finite": np.diag([1.0, 1e300, 1.0]),
  r"not symmetric, with 0\.5 at \[0, 2\] and 0 at \[2, 0\]": [[1, 0, 0.5], [0, 1, 0], [0, 0, 1.0]],
  "variance of feature 1 is negative, -0.01": np.diag([1.0, -0.01, 1.0]),
  "variance of feature 2 is negative, -4": np.diag([-3.0, -3.0, -4.0]),
  "has eigenvalues from -1 to 3, some below 0": [[1.0, 2, 0], [2, 1, 0], [0, 0, 1]],
  "has eigenvalues from -1 to 1, some below 0": [[0.0, 1, 0], [1, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize("message", NO_COVARIANCE)
def test_what_is_no_covariance_is_an_error_that_says_why(message):
  with pytest.raises(ValueError, match=message):
    gaussian(np.zeros(3), NO_COVARIANCE[message])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_what_rounding_to_float32_does_to_a_singular_covariance_is_no_error(rng, scale):
  a, b = (np.maximum(rng.normal(size=(30, 200)), 0) * np.logspace(0, -3, 200) for _ in "ab")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    exact = [moments.feature_statistics(x) for x in (a, b)]
  rounded = [np.float64(np.float32(s.covariance)) for s in exact]
  assert min(np.linalg.eigvalsh(rounded[0])) < 0
  rounded = [gaussian(s.mean * scale, c * scale**2) for s, c in zip(exact, rounded, strict=True)]
  expected = scale**2 * distances.frechet_distance(*exact)
  np.testing.assert_allclose(distances.frechet_distance(*rounded), expected, rtol=1e-3)


def test_a_distance_that_is_not_finite_is_an_error_that_says_why():
  a, b = (gaussian([x], [[1.0]]) for x in (1.2e154, -1.2e154))
  with pytest.raises(ValueError, match=r"distance is inf: means are up to 1\.2e\+154 and covari"):
    distances.frechet_distance(a, b)


def moments_of(*batches):
  added = moments.Moments()
  for batch in batches:
    added.update(batch)
  return added


def test_moments_of_batches_are_those_of_everything_at_once(rng):
  features = rng.gamma(0.5, size=(5000, 40)) @ rng.normal(size=(40, 40)) + 100
  statistics = moments_of(*np.split(features, [1, 64, 65, 1000, 1000, 1507])).statistics()
  expected = np.cov(features, rowvar=False)
  assert statistics.count == 5000
  np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
  np.testing.assert_allclose(
    statistics.covariance, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max()
  )
  np.testing.assert_array_equal(statistics.covariance, statistics.covariance.T)


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_a_mean_that_is_far_from_zero_does_not_cancel_the_covariance(rng, monkeypatch, rows):
  monkeypatch.setattr(moments, "_BLOCK_ROWS", rows)
  # Multiples of 1/32 up to 2^20 are exact in float32, the offset too; its square needs 40 bits.
  features = np.round(rng.normal(size=(300, 6)) * 32) / 32
  far = (features + 2.0**18).astype(np.float32)
  expected = np.cov(features, rowvar=False)
  covariance = moments.feature_statistics(far).covariance
  np.testing.assert_allclose(covariance, expected, rtol=1e-10, atol=1e-10)


def test_a_batch_that_cannot_be_added_leaves_the_moments_as_they_were(rng):
  features = rng.normal(size=(30, 4))
  added, bad = moments_of(features), np.where(np.arange(8)[:, None] < 3, -np.inf, features[:8])
  with pytest.raises(ValueError, match="3 of 8 rows of features"):
    added.update(bad)
  with pytest.raises(ValueError, match="features have 5 entries, those before them 4"):
    added.update(np.zeros((2, 5)))
  with pytest.raises(ValueError, match=r"features has shape \(4,\)"):
    added.update(np.zeros(4))
  statistics = added.statistics()
  np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-12)
  with pytest.raises(ValueError, match="got 0"):
    moments.Moments().statistics()


def inception_score_by_loops(logits, parts):
  """Of the rows of each part, as the formula is written."""
  scores = []
  for part in parts:
    p = scipy.special.softmax(logits[part].astype(np.float64), axis=1)
    divergences = [np.sum(row * np.log(row / p.mean(0))) for row in p]
    scores.append(np.exp(np.mean(divergences)))
  return np.mean(scores), np.std(scores)


def test_inception_score_is_that_of_its_formula_on_the_same_parts(rng):
  logits = (3 * rng.normal(size=(103, 12))).astype(np.float32)
  order = np.random.RandomState(2020).permutation(103)
  # Part i of n has the places from i N // n to (i + 1) N // n of the order.
  parts = [order[i * 103 // 4 : (i + 1) * 103 // 4] for i in range(4)]
  score = moments.InceptionScore(103, splits=4)
  for batch in np.split(logits, [1, 50, 50, 99]):
    score.update(batch)
  np.testing.assert_allclose(score.result(), inception_score_by_loops(logits, parts), rtol=1e-12)


def test_samples_that_cannot_be_read_are_in_no_part_of_an_inception_score(rng):
  logits, score = rng.normal(size=(100, 12)), moments.InceptionScore(103, splits=4)
  order = np.random.RandomState(2020).permutation(103)
  parts = [order[i * 103 // 4 : (i + 1) * 103 // 4] for i in range(4)]
  score.update(logits)
  score.leave_out(3)
  expected = inception_score_by_loops(logits, [part[part < 100] for part in parts])
  np.testing.assert_allclose(score.result(), expected, rtol=1e-12)


def test_inception_score_of_sure_answers_is_the_number_of_classes():
  # So sure that other classes have probability 0 in float64, and class 7 is never seen.
  logits = 1e4 * np.eye(8)[np.repeat(np.arange(7), 10)]
  score = moments.InceptionScore(70, splits=1)
  score.update(logits)
  np.testing.assert_allclose(score.result(), (7, 0), rtol=1e-12)
  # In the order of their classes, contiguous parts would have one class each, and a score of 1.
  score = moments.InceptionScore(70, splits=7)
  score.update(logits)
  assert score.result()[0] > 3


def test_samples_that_an_inception_score_cannot_use_are_errors(rng):
  with pytest.raises(ValueError, match="9 samples do not fill 10 splits"):
    moments.InceptionScore(9)
  score = moments.InceptionScore(20, 2)
  score.update(np.zeros((12, 3)))
  with pytest.raises(ValueError, match="12 samples were added of 20"):
    score.result()
  with pytest.raises(ValueError, match="21 samples were added of 20"):
    score.update(np.zeros((9, 3)))
  with pytest.raises(ValueError, match="4 classes, before 3"):
    score.update(np.zeros((8, 4)))
  with pytest.raises(ValueError, match="1 of 2 rows of logits"):
    score.update([[0.0, 1, 2], [0, np.nan, 2]])
  score.update(np.zeros((8, 3)))
  np.testing.assert_allclose(score.result(), (1, 0), atol=1e-12)


def kernel_distance_by_loops(x, y):
  """Unbiased squared MMD of the cubic kernel, pair by pair."""
  n, m, kernel = len(x), len(y), lambda a, b: (np.dot(a, b) / len(a) + 1) ** 3
  xx = [kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j]
  yy = [kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j]
  return np.mean(xx) + np.mean(yy) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_is_that_of_all_pairs_of_its_subsets(rng):
  x, y = rng.normal(size=(30, 6)), rng.gamma(1, size=(25, 6)).astype(np.float32)
  draws = np.random.RandomState(3)
  expected = []
  for _ in range(4):
    i, j = draws.choice(30, 9, replace=False), draws.choice(25, 9, replace=False)
    expected.append(kernel_distance_by_loops(x[i], y[j].astype(np.float64)))
  computed = distances.kernel_distance(x, y, subsets=4, subset_size=9, seed=3)
  np.testing.assert_allclose(computed, (np.mean(expected), np.std(expected)), rtol=1e-10)


def test_kernel_distance_of_one_distribution_is_zero_on_average(rng):
  # Independent pairs of sets: the mean is 0 to its standard error, where a biased estimate would be
  # above it by 2 E[k(x, x) - k(x, y)] / 20, about 1.
  computed = [
    distances.kernel_distance(*rng.normal(size=(2, 20, 4)), subsets=1, subset_size=20)[0]
    for _ in range(400)
  ]
  assert abs(np.mean(computed)) < 4 * np.std(computed) / 20 < 0.1
  assert min(computed) < 0 < max(computed)


def test_subsets_that_cannot_be_drawn_are_errors(rng):
  x = rng.normal(size=(40, 3))
  with pytest.raises(ValueError, match=r"subsets of 1000 .* 40 generated and 30 .* to 2\.\.30"):
    distances.kernel_distance(x, x[:30])
  with pytest.raises(ValueError, match="subsets=0"):
    distances.kernel_distance(x, x, subsets=0, subset_size=5)


def precision_recall_by_loops(real, generated, k):
  """Ball by ball, from distances that are differences."""
  real, generated = np.float64(real), np.float64(generated)

  def share(points, centres):
    radii = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
    return np.mean([np.any(np.linalg.norm(centres - p, axis=1) <= radii) for p in points])

  return share(generated, real), share(real, generated)


@pytest.mark.parametrize("tile", [7, 64, 4096])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_and_recall_are_those_of_the_balls_one_by_one(rng, monkeypatch, tile, k, dtype):
  monkeypatch.setattr(distances, "_TILE", tile)
  mixing = rng.normal(size=(6, 20))
  real = (rng.normal(size=(90, 6)) @ mixing + 50).astype(dtype)
  generated = (0.8 * rng.normal(size=(64, 6)) @ mixing + 50.5).astype(dtype)
  computed = distances.precision_recall(real, generated, k)
  expected = precision_recall_by_loops(real, generated, k)
  assert min(expected) > 0 and max(expected) < 1 and expected[0] != expected[1]
  assert computed == pytest.approx(expected, abs=1e-12)


def test_precision_asks_for_the_samples_and_recall_for_the_data(rng):
  real, far = rng.normal(size=(300, 2)), 100 + rng.normal(size=(300, 2))
  # Samples of one of the data's two modes are all precise, and recall half of the data.
  both = np.concatenate([real, far])
  precision, recall = distances.precision_recall(both, real + 1e-3)
  assert precision > 0.99 and 0.45 < recall < 0.51
  assert distances.precision_recall(real, far) == (0.0, 0.0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_copies_are_inside_even_balls_of_radius_zero(rng, monkeypatch, offset):
  # Each row five times: its third neighbour is a copy.
  real = np.repeat(rng.normal(size=(20, 300)) + offset, 5, axis=0).astype(np.float32)
  assert distances.precision_recall(real, real) == (1.0, 1.0)
  others = real + np.float32(0.1)
  assert distances.precision_recall(real, others) == (0.0, 0.0)
  # A generator of a single image that is one of the data's.
  single = np.repeat(real[:1], 50, axis=0)
  assert distances.precision_recall(real, single) == (1.0, 0.05)
  assert distances.precision_recall(single, single) == (1.0, 1.0)
  # A tile of one row is a product with a vector, which BLAS rounds in another order.
  monkeypatch.setattr(distances, "_TILE", 64)
  for first in range(10):
    assert distances.precision_recall(real, real[first : first + 65])[0] == 1.0


def test_a_point_on_the_surface_of_a_ball_is_inside():
  real = np.array([[0.0], [1], [2], [3]])
  # Radii for k=1 are 1 everywhere, so 4 is on the surface of the last ball and 4.001 outside.
  assert distances.precision_recall(real, np.array([[4.0], [4.001], [-1]]), k=1)[
    0
  ] == pytest.approx(2 / 3)


def test_precision_and_recall_need_memory_for_tiles_only(rng, monkeypatch):
  monkeypatch.setattr(distances, "_TILE", 64)
  real, generated = rng.normal(size=(2, 1500, 8)).astype(np.float32)
  tracemalloc.start()
  distances.precision_recall(real, generated)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1e6, "a matrix of all pairs is 9e6 bytes"


def test_samples_without_enough_neighbours_are_errors(rng):
  x = rng.normal(size=(8, 3))
  for k in (0, 5):
    with pytest.raises(ValueError, match=rf"k={k}, but 8 generated and 5 real .* 1\.\.4 "):
      distances.precision_recall(x[:5], x, k)
  with pytest.raises(ValueError, match="2 of 8 rows of generated"):
    distances.precision_recall(x, np.where(np.arange(8)[:, None] < 2, np.nan, x))
  for distance in (distances.precision_recall, distances.kernel_distance):
    with pytest.raises(ValueError, match=r"generated has \d features and real has \d"):
      distance(x, x[:, :2])


def test_nearest_neighbours_are_those_of_a_kd_tree(rng):
  a, b = rng.normal(size=(47, 3)), rng.normal(size=(130, 3))
  expected = scipy.spatial.cKDTree(b).query(a)[0].mean()
  np.testing.assert_allclose(distances.nearest_neighbour_distance(a, b), expected, rtol=1e-12)


def test_a_set_within_itself_has_the_kd_trees_second_neighbours(rng):
  x = rng.normal(size=(130, 3))
  expected = scipy.spatial.cKDTree(x).query(x, k=2)[0][:, 1].mean()
  distance = distances.nearest_neighbour_distance(x, x, exclude_self=True)
  np.testing.assert_allclose(distance, expected, rtol=1e-12)


def test_the_first_rows_of_a_set_find_others_than_themselves(rng):
  x = rng.normal(size=(60, 3))
  pairwise = scipy.spatial.distance.cdist(x[:7], x)
  pairwise[np.arange(7), np.arange(7)] = np.inf
  computed = distances.nearest_neighbour_distance(x[:7], x, exclude_self=True)
  np.testing.assert_allclose(computed, pairwise.min(1).mean(), rtol=1e-12)


def test_copies_are_at_distance_exactly_zero_far_from_the_origin(rng):
  x = 1e6 + rng.normal(size=(60, 30))
  assert distances.nearest_neighbour_distance(x[10:20], x) == 0.0
  # A copy within the set is a neighbour, even where a row must not find itself.
  assert (
    distances.nearest_neighbour_distance(*2 * [np.repeat(x, 2, axis=0)], exclude_self=True) == 0
  )


def test_neighbours_that_cannot_be_are_errors():
  x = np.zeros((4, 2))
  with pytest.raises(ValueError, match="2 entries, rows of b 3"):
    distances.nearest_neighbour_distance(x, np.zeros((4, 3)))
  with pytest.raises(ValueError, match="first rows of b"):
    distances.nearest_neighbour_distance(x, np.zeros((3, 2)), exclude_self=True)
  with pytest.raises(ValueError, match="no neighbours among 1"):
    distances.nearest_neighbour_distance(x[:1], x[:1], exclude_self=True)


def test_the_floor_of_a_gaussian_is_three_halves_of_its_variance_over_n(rng):
  # In one dimension the distance is dm^2 + ds^2 with dm ~ N(0, s^2/n) and ds ~ N(0, s^2/2n):
  # mean 3/2 s^2/n, standard deviation sqrt(2 + 1/2) s^2/n.
  n, sigma = 2000, 3.0
  features = sigma * rng.normal(size=(n, 1))
  mean, deviation = distances.bootstrap_floor(features, seed=0, repeats=1000)
  np.testing.assert_allclose(mean * n / sigma**2, 1.5, rtol=0.15)
  np.testing.assert_allclose(deviation * n / sigma**2, np.sqrt(2.5), rtol=0.2)


def test_real_rows_are_at_about_one_floor_of_their_own_number(rng):
  """Each once, at 1 - n/N, to the spread of the mean of 100 draws; in floors of all, at N/n - 1."""
  real = rng.normal(size=(1000, 3))
  statistics = moments.feature_statistics(real)
  for n in (100, 300, 1000):
    floor, _ = distances.bootstrap_floor(real, seed=0, repeats=200, count=n)
    drawn = [moments.feature_statistics(rng.permutation(real)[:n]) for _ in range(100)]
    mean = np.mean([distances.frechet_distance(s, statistics) for s in drawn])
    assert mean / floor == pytest.approx(1 - n / 1000, abs=0.15)


def test_the_floor_repeats_with_its_seed_and_only_with_it(rng):
  features = rng.normal(size=(100, 3))
  first = distances.bootstrap_floor(features, 1, 3)
  assert distances.bootstrap_floor(features, 1, 3) == first
  assert distances.bootstrap_floor(features, 2, 3) != first
  with pytest.raises(ValueError, match="repeats=1"):
    distances.bootstrap_floor(features, 1, 1)


@pytest.fixture
def inception_like(rng):
  """Features as an Inception has them: 0 or above, correlated, of sets that differ a little."""
  mixing = rng.normal(size=(24, 192)) / 5
  generated, real = (
    np.maximum(rng.normal(size=(n, 24)) @ mixing * scale + 0.2 * rng.normal(size=(n, 192)), 0)
    for n, scale in ((1200, 1.0), (1100, 1.05))
  )
  return generated.astype(np.float32), real.astype(np.float32)


@pytest.mark.slow
def test_the_distances_are_those_of_torch_fidelity(pytorch, inception_like):
  import torch_fidelity as fidelity

  generated, real = inception_like
  tensors = [pytorch.from_numpy(x) for x in inception_like]

  statistics = [fidelity.metric_fid.fid_features_to_statistics(x) for x in tensors]
  expected = fidelity.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
  distance = distances.frechet_distance(*map(moments.feature_statistics, inception_like))
  # Its means are float32.
  np.testing.assert_allclose(distance, expected["frechet_inception_distance"], rtol=1e-5)

  expected = fidelity.metric_kid.kid_features_to_metric(*tensors, kid_subsets=8, verbose=False)
  expected = [expected[f"kernel_inception_distance_{k}"] for k in ("mean", "std")]
  # Its kernels, which are about 1, are float32.
  computed = distances.kernel_distance(generated, real, subsets=8)
  np.testing.assert_allclose(computed, expected, atol=1e-6)
  assert expected[0] > 1e-4

  expected = fidelity.metric_prc.prc_features_to_metric(*tensors, verbose=False)
  expected = expected["precision"], expected["recall"]
  assert min(expected) > 0.2 and max(expected) < 0.98 and abs(np.diff(expected)) > 0.01
  computed = distances.precision_recall(real, generated)
  np.testing.assert_allclose(computed, expected, atol=1e-6)


@pytest.mark.slow
def test_inception_score_is_that_of_torch_fidelity(pytorch, rng):
  import torch_fidelity as fidelity

  # Classes in order, and some samples less sure than others.
  logits = 6 * np.eye(100)[np.repeat(np.arange(100), 13)] * rng.uniform(size=(1300, 1))
  logits = (logits + rng.normal(size=(1300, 100))).astype(np.float32)
  expected = fidelity.metric_isc.isc_features_to_metric(pytorch.from_numpy(logits), shuffle=True)
  score = moments.InceptionScore(1300)
  for batch in np.split(logits, 5):
    score.update(batch)
  expected = [expected[f"inception_score_{k}"] for k in ("mean", "std")]
  np.testing.assert_allclose(score.result(), expected, rtol=1e-12)


def test_the_share_of_nearer_samples_is_mann_and_whitneys():
  rng = np.random.default_rng(0)
  samples, held_out = rng.integers(0, 9, 40), rng.integers(2, 12, 25)  # with ties
  u = scipy.stats.mannwhitneyu(held_out, samples).statistic
  assert distances.share_nearer(samples, held_out) == pytest.approx(u / (40 * 25), abs=1e-12)


def test_the_nearest_rows_come_in_the_order_of_their_distances():
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((7, 3)), rng.standard_normal((20, 3))
  every = np.linalg.norm(a[:, None] - b, axis=-1)
  nearest, rows = distances.nearest(a, b, 4)
  np.testing.assert_array_equal(rows, np.argsort(every, axis=1)[:, :4])
  np.testing.assert_allclose(nearest, np.sort(every, axis=1)[:, :4], rtol=1e-12)

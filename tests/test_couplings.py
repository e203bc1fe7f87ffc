import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from sklearn import datasets

from ism_jax import couplings

OT = couplings.CouplingConfig(
  coupling="ot",
  pool_size=1,
  epsilon=0.05,
  pairing="permutation",
  class_penalty=0.0,
  max_iterations=500,
  threshold=1e-3,
  momentum=1.5,
)
N = 512


@pytest.fixture(scope="module")
def pool():
  """Real images, their labels, and noises."""
  digits = datasets.load_digits()
  x1 = (digits.data[:N] / 8 - 1).astype(np.float32)
  x0 = np.asarray(jax.random.normal(jax.random.key(3), x1.shape))
  return x0, x1, digits.target[:N].astype(np.int32)


def pair(pool, cfg, key=0):
  x0, x1, c = pool
  paired = jax.jit(lambda *a: couplings.pair(*a, cfg, 10))
  x0, info = paired(x0, x1, c, jax.random.key(key))
  return np.asarray(x0), {name: float(value) for name, value in info.items()}


def fraction_of_gain(cost, mean_cost):
  """Of the way from random pairs to SciPy's optimal ones."""
  rows, columns = scipy.optimize.linear_sum_assignment(cost)
  return (cost.mean() - mean_cost) / (cost.mean() - cost[rows, columns].mean())


def which(x0, pool):
  """The number of each noise."""
  match = np.all(x0[:, None] == pool[0][None], axis=-1)
  np.testing.assert_array_equal(match.sum(1), 1)
  return match.argmax(1)


def test_the_dot_product_cost_is_the_squared_distance_up_to_rows_and_columns(pool):
  x0, x1, _ = pool
  dot = np.asarray(couplings.transport_cost(x1, x0), np.float64)
  squared = ((x1[:, None] - x0[None]) ** 2).sum(-1) / 2
  centre = lambda a: a - a.mean(0) - a.mean(1, keepdims=True) + a.mean()
  np.testing.assert_allclose(centre(dot), centre(squared), atol=1e-3)
  np.testing.assert_allclose(couplings.centred_deviation(dot), centre(squared).std(), rtol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_the_soft_plan_attains_99_percent_of_the_optimal_gain(pool, penalty):
  x0, x1, c = pool
  dot = couplings.transport_cost(x1, x0)
  deviation = couplings.centred_deviation(dot)
  cost = dot + couplings.crossing_penalty(jnp.asarray(c), penalty * deviation)
  log_plan, _, converged, _ = couplings.sinkhorn_plan(cost, OT, deviation)
  plan = np.exp(np.asarray(log_plan, np.float64))
  assert converged
  np.testing.assert_allclose(plan.sum(), 1, atol=2e-3)
  assert abs(plan.sum(0) * N - 1).mean() < 2e-3
  assert abs(plan.sum(1) * N - 1).mean() < 2e-3
  cost = np.asarray(cost, np.float64)
  assert fraction_of_gain(cost, (plan * cost).sum() / plan.sum()) >= 0.99


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_the_permutation_uses_every_noise_once_and_attains_95_percent_of_the_gain(pool, penalty):
  x0, info = pair(pool, dataclasses.replace(OT, class_penalty=penalty))
  pairs = which(x0, pool)
  np.testing.assert_array_equal(np.sort(pairs), np.arange(N))
  cost = -pool[1].astype(np.float64) @ pool[0].T.astype(np.float64)
  double_centred = cost - cost.mean(0) - cost.mean(1, keepdims=True) + cost.mean()
  cost += penalty * double_centred.std() * (pool[2][:, None] != pool[2][None])
  exact = fraction_of_gain(cost, cost[np.arange(N), pairs].mean())
  assert exact >= 0.95
  # What is logged without an assignment solver never overstates, and is close.
  assert exact - 0.02 < info["attained_gain"] <= exact + 1e-3


def test_a_class_penalty_keeps_the_noise_of_each_class_centred(pool):
  plain, info_plain = pair(pool, OT)
  _, info_aware = pair(pool, dataclasses.replace(OT, class_penalty=5.0))
  _, info_independent = pair(pool, dataclasses.replace(OT, coupling="independent"))
  assert info_plain["class_shift"] > 5 * abs(info_aware["class_shift"])
  assert abs(info_independent["class_shift"]) < 5e-3
  # The logged shift against NumPy.
  c, expected = pool[2], []
  for k in range(10):
    x = plain[c == k]
    expected.append((np.sum(x.mean(0) ** 2) - 64 / len(x)) / 64)
  np.testing.assert_allclose(info_plain["class_shift"], np.mean(expected), rtol=1e-4)


def test_a_permutation_leaves_mean_and_variance_of_the_noise_as_they_were(pool):
  x0, _ = pair(pool, OT)
  np.testing.assert_allclose(x0.mean(0), pool[0].mean(0), atol=1e-6)
  np.testing.assert_allclose(x0.var(0), pool[0].var(0), rtol=1e-5)


def test_row_sampling_draws_each_noise_from_its_images_row(pool):
  """Over many draws, how often each noise is drawn for an image is the plan's row."""
  x0, x1, _ = (a[:64] for a in pool)
  dot = couplings.transport_cost(x1, x0)
  log_plan, *_ = couplings.sinkhorn_plan(dot, OT, couplings.centred_deviation(dot))
  keys = jax.random.split(jax.random.key(5), 4000)
  draws = jax.vmap(lambda key: couplings.sample_rows(log_plan, key))(keys)
  counted = jax.nn.one_hot(draws, 64).mean(0)
  expected = jnp.exp(log_plan) / jnp.exp(log_plan).sum(1, keepdims=True)
  assert jnp.abs(counted - expected).max() < 5 * 0.5 / np.sqrt(4000)
  drawn, _ = pair(pool, dataclasses.replace(OT, pairing="rows"))
  # In expectation the drawn noises are still standard normal.
  assert abs(drawn.mean()) < 0.05 and 0.9 < drawn.var() < 1.1
  assert 0.5 * N < len(np.unique(which(drawn, pool))) < N


def test_large_epsilon_is_independence_and_small_epsilon_a_permutation(pool):
  _, loose = pair(pool, dataclasses.replace(OT, epsilon=100.0))
  _, tight = pair(pool, dataclasses.replace(OT, epsilon=0.01, max_iterations=5000))
  assert loose["entropy"] > 0.99
  assert 0 <= tight["entropy"] < 0.1


def test_a_solve_that_runs_out_of_iterations_says_so(pool):
  _, info = pair(pool, dataclasses.replace(OT, epsilon=0.005, max_iterations=20))
  assert info["converged"] == 0 and info["iterations"] == 20


def test_the_greedy_permutation_gives_a_column_to_the_best_that_asks_and_settles_ties():
  score = jnp.array([[9.0, 1.0, 0.0], [8.0, 7.0, 0.0], [0.0, 6.0, 1.0]])
  # Round 1: rows 0 and 1 ask for column 0, row 2 for column 1. Round 2: row 1 takes what is left.
  np.testing.assert_array_equal(couplings.greedy_permutation(score), [0, 2, 1])
  np.testing.assert_array_equal(
    np.sort(jax.jit(couplings.greedy_permutation)(jnp.zeros((37, 37)))), np.arange(37)
  )


@pytest.fixture
def count_rounds(monkeypatch):
  """Runs loops in Python and counts: each loop's calls of its body."""
  counts = []

  def while_loop(is_unfinished, body, carry):
    counts.append(0)
    while is_unfinished(carry):
      carry, counts[-1] = body(carry), counts[-1] + 1
    return carry

  monkeypatch.setattr(jax.lax, "while_loop", while_loop)
  return counts


def greedy_by_loops(score, rounds):
  """In so many rounds rows ask for columns; then each column that is left takes a row."""
  n = len(score)
  permutation, free_rows, free_columns = np.full(n, -1), set(range(n)), set(range(n))

  def give(row, column):
    permutation[row] = column
    free_rows.remove(row)
    free_columns.remove(column)

  for _ in range(rounds):
    asked = {}
    for row in sorted(free_rows):
      asked.setdefault(max(sorted(free_columns), key=lambda j: score[row, j]), []).append(row)
    for column, rows in asked.items():
      give(max(rows, key=lambda i: score[i, column]), column)
  for column in sorted(free_columns):
    give(max(sorted(free_rows), key=lambda i: score[i, column]), column)
  return permutation


def test_rows_that_are_alike_are_paired_in_bounded_rounds(count_rounds):
  """Half of the rows ask for the same columns in the same order, of which one gets one a round."""
  score = np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
  score[::2] = score[0]
  permutation = couplings.greedy_permutation(jnp.array(score))
  assert count_rounds[0] == couplings._ROUNDS < 50 and count_rounds[1] <= 100
  np.testing.assert_array_equal(permutation, greedy_by_loops(score, couplings._ROUNDS))
  np.testing.assert_array_equal(np.sort(permutation), np.arange(100))


def test_the_bound_on_rounds_does_not_change_ordinary_pairs(pool, count_rounds, monkeypatch):
  x0, x1, _ = pool
  dot = couplings.transport_cost(x1, x0)
  for deviations in (0.05, 1.0):
    score = -dot / (deviations * couplings.centred_deviation(dot))
    score -= jax.nn.logsumexp(score, axis=0, keepdims=True)
    bounded = couplings.greedy_permutation(score)
    with monkeypatch.context() as patch:
      patch.setattr(couplings, "_ROUNDS", N)
      np.testing.assert_array_equal(bounded, couplings.greedy_permutation(score))
  assert count_rounds[1::2] == [0] * 4 and max(count_rounds) <= couplings._ROUNDS / 2


@pytest.mark.parametrize("penalty", [0.0, 5.0])
@pytest.mark.parametrize("copies", [N, N // 2])
def test_copies_of_an_image_leave_finite_diagnostics_that_mean_something(pool, penalty, copies):
  x0, x1, c = pool
  x1 = np.where(np.arange(N)[:, None] < copies, x1[:1], x1)
  paired, info = pair((x0, x1, c), dataclasses.replace(OT, class_penalty=penalty))
  np.testing.assert_array_equal(np.sort(which(paired, pool)), np.arange(N))
  assert info["converged"] and 0 <= info["entropy"] < 1.001
  gain = info["attained_gain"]
  assert gain == 0 if copies == N and penalty == 0 else 0.9 < gain < 1.001


@pytest.mark.parametrize("pairing", couplings.PAIRINGS)
def test_images_that_are_all_alike_or_not_finite_still_end(pairing):
  """No cost to tell pairs apart, or none at all: the pairing ends, and a NaN is reported as one."""
  cfg = dataclasses.replace(OT, pairing=pairing)
  x0 = np.asarray(jax.random.normal(jax.random.key(0), (32, 4)))
  c = np.zeros(32, np.int32)
  same, info = pair((x0, np.ones((32, 4), np.float32), c), cfg)
  assert np.isfinite(same).all() and np.isfinite(list(info.values())).all()
  _, info = pair((x0, np.full((32, 4), np.nan, np.float32), c), cfg)
  assert np.isnan(info["attained_gain"])


def test_the_pairs_are_the_same_on_one_device_and_on_eight(pool):
  from ism_jax.runtime import sharding

  mesh = sharding.data_mesh()
  f = lambda *a: couplings.pair(*a, OT, 10)[0]
  rows = sharding.rows(mesh)
  on_eight = lambda *arrays: [jax.device_put(a, rows) for a in arrays]
  one, eight = jax.jit(f), jax.jit(f, out_shardings=rows)
  pairs = eight(*on_eight(*pool), jax.random.key(0))
  np.testing.assert_array_equal(one(*pool, jax.random.key(0)), pairs)
  # Which copy of an image comes first is a matter of rounding.
  x0, x1, c = pool
  copies = np.where(np.arange(N)[:, None] % 2, x1[:1], x1)
  pairs = eight(*on_eight(x0, copies, c), jax.random.key(0))
  np.testing.assert_array_equal(np.sort(which(np.asarray(pairs), pool)), np.arange(N))


@pytest.mark.parametrize(
  "change",
  [
    {"coupling": "hungarian"},
    {"pairing": "argmax"},
    {"pool_size": 0},
    {"epsilon": 0.0},
    {"class_penalty": -1.0},
  ],
)
def test_values_that_mean_nothing_are_refused(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    dataclasses.replace(OT, **change)


CLASSWISE = dataclasses.replace(
  OT, coupling="classwise", class_rounds=8, class_steps=1000, class_batch=256
)


@jax.jit
def solve_padded(x, is_image):
  g = couplings.class_duals(x, is_image, jax.random.key(1), CLASSWISE)
  settings = (3, jax.random.key(2), jax.random.key(4), x.shape[1:], CLASSWISE)
  return g, *couplings.class_seeds(x, is_image, g, *settings)


def solve_class(x, size):
  """(standardised images, g, seeds, counts, gain) of a class, whose images are padded to a size."""
  x, n = np.asarray(couplings.standardise(jnp.asarray(x))), len(x)
  padded = np.pad(x, ((0, size - n), (0, 0)))
  g, seeds, counts, gain = solve_padded(padded, np.arange(size) < n)
  return x, *(np.asarray(a[:n]) for a in (g, seeds, counts)), float(gain)


@pytest.fixture(scope="module")
def threes():
  """All images of a digit, paired."""
  digits = datasets.load_digits()
  return solve_class((digits.data[digits.target == 3] / 8 - 1).astype(np.float32), 192)


def noises_of(seeds):
  """[n, R, D] of the digit."""
  c = jnp.full(seeds.size, 3)
  noise = couplings.numbered_noise(jax.random.key(2), c, seeds.ravel(), (64,))
  return np.asarray(noise).reshape(*seeds.shape, 64)


@pytest.mark.parametrize("positions", [(-2.0, 2.0), (-3.0, -1.0, -0.5, 0.5, 4.0)])
def test_on_a_line_the_duals_split_the_noise_at_its_quantiles(positions):
  x, g, *_ = solve_class(np.float32(positions)[:, None], 8)
  n = len(positions)
  quantiles = scipy.stats.norm.ppf(np.arange(1, n) / n)
  np.testing.assert_allclose((g[:-1] - g[1:]) / np.diff(x[:, 0]), quantiles, atol=0.05)


def test_each_image_of_a_class_is_given_its_part_of_the_noise(threes):
  x, g, _, counts, _ = threes
  z = np.random.default_rng(0).standard_normal((100 * len(x), 64))
  parts = np.bincount((z @ x.T + g).argmax(1), minlength=len(x)) / 100
  assert np.mean(np.square(parts - 1)) < 0.02  # 0.01 of exact parts, by chance
  assert counts.mean() > 0.999 * CLASSWISE.class_rounds


def test_pairs_of_a_class_gain_as_much_as_an_assignment_of_as_many_noises(threes):
  x, _, seeds, _, gain = threes
  repeated = np.repeat(x, 4, axis=0)
  z = np.random.default_rng(0).standard_normal((len(repeated), 64))
  rows, columns = scipy.optimize.linear_sum_assignment(repeated @ z.T, maximize=True)
  optimal = np.sum(repeated[rows] * z[columns], axis=1).mean()
  products = np.sum(x[:, None] * noises_of(seeds), axis=2)
  assert products.mean() > 0.98 * optimal
  assert 0.98 < gain < 1.02


def test_the_noise_of_a_class_is_normal_although_each_image_has_its_own(threes):
  x, _, seeds, *_ = threes
  noise = noises_of(seeds)
  flat = noise.reshape(-1, 64)
  assert len(np.unique(flat, axis=0)) > 0.99 * len(flat)
  shift = couplings.class_shift(flat, np.full(len(flat), 3), 10)
  assert abs(shift) < 3 * np.sqrt(2 / 64) / len(flat)
  along = flat @ np.linalg.svd(x)[2][:5].T  # where the images differ most
  np.testing.assert_allclose(along.std(0), 1, atol=4 / np.sqrt(2 * len(flat)))
  assert np.sum(x * noise.mean(1), axis=1).mean() > 1  # and of an image it is not


def test_images_of_a_class_that_are_all_alike_share_its_noise():
  *_, seeds, counts, _ = solve_class(np.ones((50, 64), np.float32), 192)
  assert len(np.unique(seeds)) > 0.99 * seeds.size and counts.mean() > 0.98 * seeds.shape[1]

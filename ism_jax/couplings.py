"""Scaling optimal transport (sOT): which noise goes with which image (iSM, Sec. 4), by ott-jax.

A pool of n = K M images and n noises is paired by one entropic transport problem, then split back
into K batches of M. Only the noises move: every image appears exactly once, with its label. For
fixed marginals the dot-product cost -<x1, x0> has the same plans as the squared distance, and
potentials of far smaller magnitude.

Open in the paper: solver, cost, regularisation, pairing and how labels enter; see `CouplingConfig`.

"classwise" is not the paper's: the images of a class are paired with all of N(0, I), before
training, by semi-discrete transport (AlignFlow, arXiv:2510.15038), so that noise tells nothing
about the class.

Axes: N images or noises of the pool (rows of the cost are images, columns noises), D dimensions; of
a class, n images and R noises of each.
"""

import dataclasses
from operator import getitem
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from ott.geometry import costs, geometry, semidiscrete_pointcloud
from ott.problems.linear import linear_problem, semidiscrete_linear_problem
from ott.solvers.linear import semidiscrete, sinkhorn

from ism_jax import ranges

COUPLINGS = ("independent", "ot", "classwise")
PAIRINGS = ("permutation", "rows")
# Of `greedy_permutation`: digits, noise and photographs take up to 10, of 128 to 2,048 of them.
_ROUNDS = 32
# Of Adam on the duals, in standard deviations of the cost: it decays to 0 along a cosine.
_DUAL_RATE = 0.03
# Noises that are drawn for each that an image is to have: few images have to be filled up.
_DRAWS = 2
_DRAWN_TOGETHER = 1024  # noises, or fewer for more than 65,536 images
_SCORES = 2**26  # of images for noises that are drawn together: 256 MiB


@dataclasses.dataclass(frozen=True)
class CouplingConfig:
  """How noise and data are paired.

  Attributes:
    coupling: "independent" (as drawn), "ot" within pools, or "classwise", within classes and before
      training: of the others it only takes what begins with `class_`, but for `class_penalty`.
    pool_size: K, the batches that are paired together.
    epsilon: entropic regularisation, relative to the standard deviation of the double-centred cost.
    pairing: from the soft plan to pairs. "permutation": every noise and every image exactly once;
      "rows": each image draws a noise from its row of the plan (some noises twice, some never).
    class_penalty: cost of a pair that crosses classes, in standard deviations of the double-centred
      cost, where each noise has the class of its random initial partner. 0: labels play no part
      (the paper's), and each class then sees a skewed part of the noise.
    max_iterations: of Sinkhorn.
    threshold: of Sinkhorn: l1 error of a marginal (total mass 1). The pairs hardly gain from a
      tight one: on 60 pools of digits, 1e-3 takes 238 iterations (63 % converge, the rest stop at
      300) and attains a gain of 0.9942, and 1e-2 takes 53.5 (all converge) for 0.9927.
    momentum: over-relaxation of Sinkhorn's updates; 1 is none.
    class_rounds: R, the noises of each image, one an epoch and then from the first again.
    class_epsilon: entropic regularisation, relative to the standard deviation of the cost.
    class_steps: of Adam on the duals of a class.
    class_batch: noises in each of these steps.
  """

  coupling: Annotated[str, COUPLINGS]
  pool_size: Annotated[int, "[1, 65536]"] = dataclasses.field(metadata={"fixed": True})
  epsilon: Annotated[float, "[1e-4, 1000]"]
  pairing: Annotated[str, PAIRINGS]
  class_penalty: Annotated[float, "[0, 1000]"]
  max_iterations: Annotated[int, "[1, 1000000]"]
  threshold: Annotated[float, "(0, 1]"]
  momentum: Annotated[float, "(0, 2)"]
  class_rounds: Annotated[int, "[1, 1024]"] = 16
  class_epsilon: Annotated[float, "[1e-4, 1]"] = 0.01
  class_steps: Annotated[int, "[1, 1000000]"] = 2000
  class_batch: Annotated[int, "[1, 65536]"] = 1024

  def __post_init__(self):
    ranges.check_fields(self, "coupling")


def dot_rows(x, y):
  """<x_i, y_j> for x, y [N, D]: [N, N]."""
  return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def transport_cost(x1, x0, dot_rows=dot_rows):
  """E10: cost -<x1_i, x0_j> over the pool of K M, [N, N] for x1, x0 [N, D].

  It is half the squared distance, but for row and column terms.
  """
  return -dot_rows(x1, x0)


def centred_deviation(cost):
  """Standard deviation of the double-centred cost: row and column terms do not affect a plan."""
  centred = cost - cost.mean(0, keepdims=True) - cost.mean(1, keepdims=True) + cost.mean()
  # Never zero, not even for images that are all alike, which cost the same in any order.
  return jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(centred))), _rounding(cost))


def _rounding(cost):
  """A deviation of the cost that is rounding: 32 eps of its root mean square, and never zero."""
  eps = jnp.finfo(cost.dtype).eps
  return jnp.maximum(32 * eps * jnp.sqrt(jnp.mean(jnp.square(cost))), 1e-12)


def crossing_penalty(c, penalty):
  """[N, N]: `penalty` where image i and noise j differ in class, else 0; c [N] is both's class."""
  return penalty * (c[:, None] != c[None, :])


def sinkhorn_plan(cost, cfg: CouplingConfig, deviation):
  """E11: log P = (f_i + g_j - C_ij) / (eps * deviation), the plan between uniform marginals.

  Returns:
    (log_plan [N, N], whose exponential sums to 1; column potential g [N]; converged; iterations)
  """
  # ott mixes ranks freely; a global "raise" on rank promotion must not reach it.
  with jax.named_scope("sinkhorn"), jax.numpy_rank_promotion("allow"):
    geom = geometry.Geometry(cost_matrix=cost, epsilon=cfg.epsilon * deviation)
    solver = sinkhorn.Sinkhorn(
      lse_mode=True,
      threshold=cfg.threshold,
      max_iterations=cfg.max_iterations,
      momentum=sinkhorn.acceleration.Momentum(value=cfg.momentum),
    )
    out = solver(linear_problem.LinearProblem(geom))
  log_plan = (out.f[:, None] + out.g[None, :] - cost) / (cfg.epsilon * deviation)
  return log_plan, out.g, out.converged, out.n_iters


def greedy_permutation(score):
  """E12: a permutation [N] that follows log P [N, N]: row i is given column permutation[i].

  In rounds: each free row asks for its best free column, and a column that is asked goes to the row
  that scores it highest. Rows that are alike all ask for the same column, of which one gets it, so
  after `_ROUNDS` each column that is still free takes the best free row, one after the other: N^2
  in all instead of N^2 for every copy of an image.
  Scores that are not finite count as the worst: a solve that failed gives some permutation.
  """
  n = score.shape[0]
  rows = jnp.arange(n)
  score = jnp.nan_to_num(score, nan=-1e30, posinf=1e30, neginf=-1e30)

  def assign(carry):
    permutation, free_column, rounds = carry
    free_row = permutation < 0
    open_score = jnp.where(free_column[None, :], score, -jnp.inf)
    wish = jnp.argmax(open_score, axis=1)
    wish_score = jnp.where(free_row, jnp.max(open_score, axis=1), -jnp.inf)
    best = jnp.full(n, -jnp.inf).at[wish].max(wish_score)
    wins = free_row & (wish_score == best[wish])
    # Rows that tie for a column: the first of them gets it.
    first = jnp.full(n, n).at[wish].min(jnp.where(wins, rows, n))
    wins &= first[wish] == rows
    permutation = jnp.where(wins, wish, permutation)
    free_column = free_column.at[jnp.where(wins, wish, n)].set(False, mode="drop")
    return permutation, free_column, rounds + 1

  # Columns, not rows: where rows are split over devices, each has its part of every column.
  def take(carry):
    permutation, free_column, column = carry
    column_score = jax.lax.dynamic_index_in_dim(score, column, axis=1, keepdims=False)
    row = jnp.argmax(jnp.where(permutation < 0, column_score, -jnp.inf))
    row = jnp.where(free_column[column], row, n)
    return permutation.at[row].set(column, mode="drop"), free_column, column + 1

  is_unfinished = lambda carry: jnp.any(carry[0] < 0)
  start = (jnp.full(n, -1), jnp.full(n, True), 0)
  with jax.named_scope("greedy_permutation"):
    permutation, free_column, _ = jax.lax.while_loop(
      lambda carry: is_unfinished(carry) & (carry[2] < _ROUNDS), assign, start
    )
    return jax.lax.while_loop(is_unfinished, take, (permutation, free_column, 0))[0]


def sample_rows(log_plan, key):
  """A noise for each image [N], drawn from its row of the plan, so every image appears once."""
  return jax.random.categorical(key, log_plan, axis=1)


def attained_gain(cost, pairs, potential):
  """(C_random - C) / (C_random - C_bound): 0 for random pairs; optimal pairs have about 1.

  C_bound is the dual value of the column potential g made feasible by a c-transform, a lower bound
  on the optimal cost, so the fraction is never overstated. (A bound on the cost itself would
  forgive everything: in 4096 dimensions random pairs cost 5 % more than optimal ones.)

  Of a cost [N, N]; pairs [N] has the column of each row.
  """
  c_random = jnp.mean(cost)
  # Along rows: indexing both axes would gather rows that are split over devices.
  c_pairs = jnp.mean(jnp.take_along_axis(cost, pairs[:, None], axis=1))
  c_bound = jnp.mean(jnp.min(cost - potential[None, :], axis=1)) + jnp.mean(potential)
  return (c_random - c_pairs) / jnp.maximum(c_random - c_bound, 1e-12)


def renormalised_entropy(log_plan):
  """Entropy of the plan, 0 for a permutation and 1 for independence (arXiv:2506.05526)."""
  # No mass is above 1: where the solve ran out of iterations, its exponential may overflow.
  log_plan = jnp.minimum(log_plan, 0.0)
  entropy = -jnp.sum(jnp.where(log_plan > -80, jnp.exp(log_plan) * log_plan, 0.0))
  return entropy / jnp.log(max(2, log_plan.shape[0])) - 1


def class_shift(x0, c, num_classes: int):
  """How far the noise of a class is from zero mean, per dimension, averaged over the classes.

  mean_c (||mean of class c||^2 - D / n_c) / D, for x0 [N, D] and c [N]: expectation 0 for noise
  that is independent of the class.
  """
  one_hot = jax.nn.one_hot(c, num_classes, dtype=x0.dtype)
  n_c = one_hot.sum(0)
  means = one_hot.T @ x0 / jnp.maximum(n_c, 1)[:, None]
  shift = jnp.mean(jnp.square(means), axis=1) - 1 / jnp.maximum(n_c, 1)
  return jnp.sum(jnp.where(n_c > 0, shift, 0.0)) / jnp.sum(n_c > 0)


def pair(x0, x1, c, key, cfg: CouplingConfig, num_classes, dot_rows=dot_rows, take_rows=getitem):
  """Pairs n noises with n images.

  Args:
    x0: [N, ...] noises, in random order; with "classwise" already those of the images.
    x1: [N, ...] images.
    c: [N] int, the class of each image.
    key: for pairing="rows".
    dot_rows: the products of rows, which may lie on many devices.
    take_rows: x[indices] for x [N, ...] and indices [N], likewise.
  Returns:
    (x0 [N, ...] in the order of the images, diagnostics: a dict of scalars)
  """
  flat0, flat1 = x0.reshape(len(x0), -1), x1.reshape(len(x1), -1)
  if cfg.coupling != "ot":
    return x0, {"class_shift": class_shift(flat0, c, num_classes)}
  dot = transport_cost(flat1, flat0, dot_rows)
  deviation = centred_deviation(dot)
  # Of images that are all alike only rounding is left, on which Sinkhorn does not converge.
  dot = jnp.where(deviation == _rounding(dot), 0.0, dot)
  cost = dot + crossing_penalty(c, cfg.class_penalty * deviation)
  log_plan, g, converged, iterations = sinkhorn_plan(cost, cfg, deviation)
  permute = cfg.pairing == "permutation"
  pairs = greedy_permutation(log_plan) if permute else sample_rows(log_plan, key)
  flat0 = take_rows(flat0, pairs)
  return flat0.reshape(x0.shape), {
    "converged": converged,
    "iterations": iterations,
    "attained_gain": attained_gain(cost, pairs, g),
    "entropy": renormalised_entropy(log_plan),
    "class_shift": class_shift(flat0, c, num_classes),
  }


def numbered_noise(key, c, seeds, shape):
  """N(0, I) [N, *shape]: of class c [N] the noise of number seeds [N], whatever the others are."""
  fold_in = jax.vmap(jax.random.fold_in, (0, 0))
  keys = fold_in(jax.vmap(lambda label: jax.random.fold_in(key, label))(c), seeds)
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def standardise(x):
  """(x - mean) / deviation of the images [n, D] of a class, where <x_i, z> has deviation 1.

  Neither affects a plan: the mean is the same for each image, and of z alone.
  """
  x = x - x.mean(0)
  deviation = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(x), axis=1)))
  return x / jnp.maximum(deviation, 1e-12)


def class_duals(x, is_image, key, cfg: CouplingConfig):
  """g [n] of the semi-discrete transport between N(0, I) and the images of a class, each 1/n.

  They maximise the concave dual mean(g) - E_z eps log mean_i exp((<x_i, z> + g_i) / eps), by Adam
  with fresh noises in each step: then the plan gives each image 1/n of the noise.

  Args:
    x: [n, D] images, standardised.
    is_image: bool [n]; the others are padding, without mass.
  """
  weights = is_image / is_image.sum()
  geom = semidiscrete_pointcloud.SemidiscretePointCloud(
    jax.random.normal, x, cost_fn=costs.NegDotProduct(), epsilon=cfg.class_epsilon
  )
  solver = semidiscrete.SemidiscreteSolver(
    num_iterations=cfg.class_steps,
    batch_size=cfg.class_batch,
    optimizer=optax.adam(optax.cosine_decay_schedule(_DUAL_RATE, cfg.class_steps)),
    error_eval_every=cfg.class_steps,
    error_num_repeats=1,
    potential_ema=1.0,  # ott's is the share of the new: none of the old
  )
  problem = semidiscrete_linear_problem.SemidiscreteLinearProblem(geom, b=weights)
  with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("highest"):
    return solver(key, problem).g


def class_seeds(x, is_image, g, label, key_noise, key_ties, shape, cfg: CouplingConfig):
  """R noises for each image of a class, by their numbers, see `numbered_noise`.

  Noise z goes to an image drawn from its column of the plan, argmax_i <x_i, z> + g_i + eps G_i with
  Gumbel's G; an image takes the first R that it is given of `_DRAWS` R n, and where it is given
  fewer, then those that it lost by least.

  Args:
    x, is_image, g: as in `class_duals`.
    label: of the class.
    shape: of a noise, of D numbers.
  Returns:
    (seeds int32 [n, R], counts [n]: how many of the R it was given, attained gain: the mean of
    <x_i, z> over these pairs, divided by that of optimal ones, or rather by the dual's bound of it)
  """
  n, rounds = len(x), cfg.class_rounds
  together = max(1, min(_DRAWN_TOGETHER, _SCORES // n))
  chunks = -(-_DRAWS * rounds * n // together)

  def score_chunk(best, chunk):
    margins, seeds, products = best
    drawn = chunk * together + jnp.arange(together)
    labels = jnp.full(together, label)
    z = numbered_noise(key_noise, labels, drawn, shape).reshape(together, -1)
    product = dot_rows(x, z)
    gumbel = jax.random.gumbel(jax.random.fold_in(key_ties, chunk), product.shape)
    score = jnp.where(is_image[:, None], product + g[:, None], -jnp.inf)
    soft = score + cfg.class_epsilon * gumbel
    # Zero where the image is given the noise. Ties go to the earlier one.
    margins = jnp.concatenate([margins, soft - soft.max(0)], axis=1)
    margins, places = jax.lax.top_k(margins, rounds)
    numbers = jnp.broadcast_to(drawn, product.shape)
    take = lambda old, new: jnp.take_along_axis(jnp.concatenate([old, new], 1), places, axis=1)
    best = (margins, take(seeds, numbers), take(products, product))
    return best, jnp.mean(score.max(0))

  start = tuple(jnp.full((n, rounds), value) for value in (-jnp.inf, 0, 0.0))
  (margins, seeds, products), bounds = jax.lax.scan(score_chunk, start, jnp.arange(chunks))
  mean = lambda values: jnp.sum(jnp.where(is_image, values, 0.0)) / is_image.sum()
  gain = mean(products.mean(1)) / jnp.maximum(bounds.mean() - mean(g), 1e-12)
  return seeds, jnp.sum(margins == 0, axis=1), gain

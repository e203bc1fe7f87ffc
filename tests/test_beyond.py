"""What is not the paper's: other targets, times, jumps and weights, against closed forms."""

import dataclasses

from examples import random_params, tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from ism_jax import experiment, guidance, model, objectives, paths, sampling, wavelets

NULL = 10
ISM = experiment.parse(tiny_config())
MEAN, DEVIATION = 1.5, 0.4  # of x1; x0 is standard normal


def mean_velocity(x, t, c, d, w):
  """Of the flow from N(0, 1) to N(MEAN, DEVIATION^2): of a jump d, and at d = 0 the velocity.

  x_r = r m + sigma_r / sigma_t (x_t - t m), where sigma_t^2 = (1 - t)^2 + t^2 s^2.
  """
  sigma = lambda t: jnp.sqrt((1 - t) ** 2 + (t * DEVIATION) ** 2)
  t, d = paths.expand(t, x), paths.expand(d, x)
  end = (t + d) * MEAN + sigma(t + d) / sigma(t) * (x - t * MEAN)
  speed = (t * DEVIATION**2 - (1 - t)) / sigma(t) ** 2
  at_once = MEAN + speed * (x - t * MEAN)
  return jnp.where(d > 0, (end - x) / jnp.where(d > 0, d, 1.0), at_once)


def jumps():
  """x_t [N, 2, 2, 1], t, c, d, w [N] of many jumps."""
  t, d = (a.ravel() for a in jnp.meshgrid(jnp.linspace(0, 0.9, 7), jnp.linspace(0.1, 1, 7)))
  d = jnp.minimum(d, 1 - t)
  x = jax.random.normal(jax.random.key(0), (len(t), 2, 2, 1))
  return x, t, jnp.zeros(len(t), int), d, jnp.zeros(len(t))


def wavy(x, t, c, d, w):
  """A smooth velocity function that is no flow's."""
  t, d = paths.expand(t, x), paths.expand(d, x)
  return jnp.sin(1.3 * x + t) * jnp.exp(-d) + 0.5 * x * t


def test_meanflows_identity_holds_for_the_mean_velocity_of_a_gaussian_flow():
  x, t, c, d, w = jumps()
  v = mean_velocity(x, t, c, 0 * d, w)
  y = objectives.identity_target(mean_velocity, v, v, x, t, c, d, w)
  np.testing.assert_allclose(y, mean_velocity(x, t, c, d, w), rtol=1e-4, atol=1e-5)


def test_meanflows_identity_of_a_linear_flow_is_its_speed():
  x, t, c, d, w = jumps()
  speed = jnp.full_like(x, 0.7)
  y = objectives.identity_target(lambda *_: speed, speed, speed, x, t, c, d, w)
  np.testing.assert_allclose(y, speed)


@pytest.mark.parametrize("split", [0.1, 0.25, 0.5])
def test_two_steps_of_any_split_are_the_jump_of_a_gaussian_flow(split):
  x, t, c, d, w = jumps()
  first = paths.as_step_size(paths.split(d, split)[0])
  s_first = mean_velocity(x, t, c, first, w)
  y = objectives.consistency_target(s_first, mean_velocity, x, t, c, d, w, split=split)
  np.testing.assert_allclose(y, mean_velocity(x, t, c, d, w), rtol=1e-4, atol=2e-4)


def test_a_small_first_step_pulls_as_meanflows_identity_does():
  """(target - s) / split goes to the identity's target - s, linearly in the split."""
  x, t, c, d, w = jumps()
  v, s = wavy(x, t, c, 0 * d, w), wavy(x, t, c, d, w)
  pull = objectives.identity_target(wavy, v, v, x, t, c, d, w) - s

  def error(split):
    y = objectives.consistency_target(v, wavy, x, t, c, d, w, split=split)
    return float(jnp.abs((y - s) / split - pull).max())

  assert error(0.004) < 0.02 * float(jnp.abs(pull).max())
  np.testing.assert_allclose(error(0.008) / error(0.004), 2, rtol=0.1)


def test_samples_of_a_gaussian_flow_are_where_the_flow_ends():
  x0 = jax.random.normal(jax.random.key(1), (64, 1, 1, 1))
  c, w, end = jnp.zeros(64, int), jnp.full(64, 2.0), MEAN + DEVIATION * x0
  for steps in (1, 2, 4):
    x1 = sampling.sample(mean_velocity, x0, c, w, paths.parse_schedule(steps))
    np.testing.assert_allclose(x1, end, atol=1e-5)
  # Euler's steps of the velocity, whatever w is: both passes are of one distribution.
  euler = guidance.two_pass(mean_velocity, null_class=NULL, t_interval=0.3)
  errors = []
  for steps in (32, 64, 128):
    x1 = sampling.sample(euler, x0, c, w, paths.parse_schedule(steps))
    errors.append(float(jnp.abs(x1 - end).max()))
  assert errors[2] < 0.02
  np.testing.assert_allclose(errors[0] / errors[2], 4, rtol=0.2)


def draw(n=40_000, key=0, progress=1.0, **changes):
  """(conditions of n rows, their rows by loss) of iSM with other values."""
  cfg = dataclasses.replace(ISM.objective, **changes)
  conditions = objectives.draw_conditions(
    jax.random.key(key), jnp.arange(n) % 10, cfg, NULL, progress
  )
  return jax.device_get(conditions), objectives.deal_rows(n, cfg.shares)


def test_logit_normal_times_have_their_law_and_a_share_on_the_grid():
  conditions, rows = draw(times="logit_normal", times_mean=0.4, times_deviation=0.8)
  t = conditions.t[np.concatenate([rows.velocity, rows.guidance])]
  logits = scipy.special.logit(t)
  assert abs(logits.mean() - 0.4) < 0.02
  assert abs(logits.std() - 0.8) < 0.02
  conditions, _ = draw(times="logit_normal", grid_share=0.25, jumps="continuous")
  on_grid = (conditions.t * 128 % 1 == 0) & (conditions.d * 128 % 1 == 0)
  assert abs(on_grid.mean() - 0.25) < 0.01


def test_continuous_jumps_are_between_two_times():
  conditions, rows = draw(times="uniform", jumps="continuous")
  t, d = (a[rows.consistency] for a in (conditions.t, conditions.d))
  assert d.min() >= 1 / 128
  assert (t + d).max() <= 1
  assert abs(d.mean() - 1 / 3) < 0.01
  assert np.all(conditions.d[rows.velocity] == 0)


@pytest.mark.parametrize("rollout", [False, True])
def test_jumps_have_their_probabilities_and_any_start(rollout):
  weights = (1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 3.0)
  conditions, rows = draw(200_000, jump_probabilities=weights, rollout=rollout)
  jumps = conditions.d[rows.consistency]
  d, counts = np.unique(jumps, return_counts=True)
  np.testing.assert_array_equal(d, [1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
  np.testing.assert_allclose(counts / counts.sum(), np.array([1, 1, 1, 1, 1, 3]) / 8, atol=0.02)
  starts = conditions.t[rows.consistency][jumps == 1 / 8]
  np.testing.assert_allclose(np.bincount((8 * starts).astype(int)) / len(starts), 1 / 8, atol=0.02)


def test_a_log_uniform_w_has_its_law_and_a_ramp_its_end():
  conditions, rows = draw(w_drawn="log_uniform")
  w = conditions.w[rows.guidance]
  np.testing.assert_allclose(
    np.quantile(np.log1p(w) / np.log1p(3.5), [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02
  )
  for progress, most in ((0.0, 0.0), (0.1, 1.75), (0.2, 3.5), (0.9, 3.5)):
    conditions, rows = draw(progress=progress, w_ramp=0.2)
    assert conditions.w[rows.guidance].max() == pytest.approx(most)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"jump_probabilities": (1.0,) * 6 + (3.0,)},
    {"times": "logit_normal"},
    {"rollout": True},
  ],
)
def test_the_curriculum_weighs_short_jumps_more_at_first_and_has_mean_one(changes):
  continuous = {"jumps": "continuous"} if "times" in changes else {}
  cfg = dataclasses.replace(ISM.objective, curriculum=0.5, **changes, **continuous)
  conditions, rows = draw(**changes, **continuous)
  d = jnp.asarray(conditions.d[rows.consistency])
  for progress in (0.0, 0.2):
    weights = objectives.curriculum_weight(d, progress, cfg)
    np.testing.assert_allclose(weights.mean(), 1, atol=0.02)
  assert float(objectives.curriculum_weight(jnp.ones(1), 0.0, cfg)[0]) == 0
  np.testing.assert_array_equal(objectives.curriculum_weight(d, 0.5, cfg), 1)


def test_the_curriculum_weighs_the_loss_and_leaves_what_is_reported():
  cfg = dataclasses.replace(ISM.objective, curriculum=1.0, alpha=0.0, beta=0.0)
  conditions, rows = draw(64)
  x0, x1 = jax.random.normal(jax.random.key(3), (2, 64, 4, 4, 1))
  settings = (wavy, wavy, x0, x1, conditions, cfg, ISM.wavelet, NULL, 64)
  early, parts = objectives.losses(*settings, progress=0.25)
  late, same = objectives.losses(*settings, progress=1.0)
  assert float(parts["consistency"]) == float(same["consistency"]) == float(late)
  weights = objectives.curriculum_weight(jnp.asarray(conditions.d[rows.consistency]), 0.25, cfg)
  x_t = paths.interpolate(x0, x1, conditions.t)
  y = objectives.regression_targets(wavy, wavy, x0, x1, x_t, conditions, cfg, NULL)
  error = (wavy(x_t, *conditions) - y)[rows.consistency]
  expected = np.mean(weights * wavelets.distance(error, ISM.wavelet, "consistency"))
  np.testing.assert_allclose(early, expected, rtol=1e-5)


def test_a_rollout_goes_on_where_the_networks_own_jump_ends_with_its_gradient():
  cfg = dataclasses.replace(ISM.objective, rollout=True)
  conditions, rows = draw(512, rollout=True)
  x_t = jax.random.normal(jax.random.key(4), (512, 2, 2, 1))
  network = lambda scale: lambda *inputs: scale * wavy(*inputs)
  followed = objectives.follow_jumps(network(0.7), x_t, conditions, cfg.shares)
  expected, slope, unjoined = np.array(x_t), np.zeros(x_t.shape), 0
  for a, b in zip(rows.consistency[0::2], rows.consistency[1::2], strict=True):
    assert conditions.d[b] == conditions.d[a]
    if conditions.d[a] == 1:
      unjoined += 1
      continue
    of = lambda values, i: np.array([values[i]])
    row = [of(values, a) for values in conditions]
    assert conditions.t[b] == conditions.t[a] + conditions.d[a] <= 1 - conditions.d[b]
    for name in ("c", "w"):
      assert getattr(conditions, name)[a] == getattr(conditions, name)[b]
    slope[b] = conditions.d[a] * np.asarray(wavy(x_t[a : a + 1], *row))[0]
    expected[b] = x_t[a] + 0.7 * slope[b]
  assert 0 < unjoined < len(rows.consistency) / 4
  np.testing.assert_allclose(followed, expected, rtol=1e-5, atol=1e-6)
  end = lambda scale: objectives.follow_jumps(network(scale), x_t, conditions, cfg.shares)
  np.testing.assert_allclose(jax.jacfwd(end)(0.7), slope, rtol=1e-4, atol=1e-5)


def test_a_scaled_network_and_its_errors_are_those_of_w():
  config = tiny_config()
  config.objective.w_scaled = True
  exp = experiment.parse(config)
  conditions, _ = draw(64)
  x0, x1 = jax.random.normal(jax.random.key(5), (2, 64, 8, 8, 1))
  params = jax.tree.map(lambda a: a + 0.02, exp.network().init(jax.random.key(0), x0, *conditions))
  scaled = exp.network().apply(params, x0, *conditions)
  plain = ISM.network().apply(params, x0, *conditions)
  np.testing.assert_allclose(scaled, plain * paths.expand(1 + conditions.w, plain), rtol=1e-5)
  l2 = dataclasses.replace(ISM.wavelet, form="l2")
  settings = (x0, x1, conditions, None, exp.objective, l2, 64)
  _, parts = objectives.regression_losses(lambda x, *_: 0 * x, *settings)
  rows = objectives.deal_rows(64, exp.objective.shares).guidance
  squares = np.mean(np.square(x1[rows]), axis=(1, 2, 3)) / (1 + conditions.w[rows]) ** 2
  np.testing.assert_allclose(parts["guidance"], squares.mean(), rtol=1e-5)


def test_a_network_that_is_given_the_interval_learns_guidance_from_its_start_on():
  config = tiny_config()
  config.objective.t_interval_max = 0.5
  exp = experiment.parse(config)
  conditions, _ = draw(4_000, t_interval_max=0.5)
  start = conditions.w[:, 1]
  assert start.min() >= 0
  assert 0.49 < start.max() <= 0.5
  assert abs(start.mean() - 0.25) < 0.01
  few = objectives.Conditions(*(jnp.asarray(a[:64]) for a in conditions))
  x0, x1 = jax.random.normal(jax.random.key(6), (2, 64, 8, 8, 1))
  x_t = paths.interpolate(x0, x1, few.t)

  def label(x, t, c, d, w):  # at w = 0, and the row's own start, which it tells
    s = jnp.where(c == NULL, 0.0, 3.0 + w[:, 1]) + 100 * w[:, 0]
    return jnp.broadcast_to(paths.expand(s, x), x.shape)

  y = objectives.regression_targets(label, label, x0, x1, x_t, few, exp.objective, NULL)
  is_on = few.t >= few.w[:, 1]
  guiding = jnp.where(is_on, few.w[:, 0], 0.0) * (3.0 + few.w[:, 1])
  expected = (x1 - x0) + paths.expand(guiding, x1)
  guided = objectives.deal_rows(64, exp.objective.shares).guidance
  assert 0 < is_on[guided].sum() < len(guided)
  np.testing.assert_allclose(y[guided], expected[guided], rtol=1e-5, atol=1e-5)
  # At one start the network is one without that input.
  params = random_params(exp.network(), exp.image_shape)
  plain, without = model.at_interval(exp.network(), params, 0.25)
  w = jnp.stack([few.w[:, 0], jnp.full(64, 0.25)], axis=-1)
  actual = plain.apply({"params": without}, x_t, few.t, few.c, few.d, few.w[:, 0])
  expected = exp.network().apply({"params": params}, x_t, few.t, few.c, few.d, w)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_packet_at_full_depth_is_the_walsh_hadamard_transform(key):
  x = jax.random.normal(key, (3, 8, 8, 2))
  bands = wavelets.packet(x, "haar", 3)
  assert bands.shape == (3, 64, 2)
  h = scipy.linalg.hadamard(8) / np.sqrt(8)
  expected = np.einsum("ij,bjkc,lk->bilc", h, np.asarray(x), h).reshape(3, 64, 2)
  sort = lambda a: np.sort(np.abs(np.asarray(a)), axis=1)  # the order and signs of bands differ
  np.testing.assert_allclose(sort(bands), sort(expected), atol=1e-5)
  cfg = dataclasses.replace(ISM.wavelet, tree="packet")
  norms = np.sqrt(np.mean(expected**2, axis=-1) + cfg.epsilon).mean(axis=1)
  np.testing.assert_allclose(wavelets.distance(x, cfg, "consistency"), norms, rtol=1e-5)


def test_an_adaptive_distance_weighs_each_gradient_by_its_square(key):
  e = jax.random.normal(key, (5, 4, 4, 1))
  cfg = dataclasses.replace(ISM.wavelet, form="adaptive", losses=wavelets.LOSSES)
  squares = np.sum(np.square(e), axis=(1, 2, 3))
  distance = lambda e: wavelets.distance(e, cfg, "consistency")
  np.testing.assert_allclose(distance(e), squares / (squares + 1e-3), rtol=1e-5)
  slope = jax.grad(lambda e: distance(e).sum())(e)
  np.testing.assert_allclose(slope, 2 * e / paths.expand(squares + 1e-3, e), rtol=1e-5)


IDENTITY = {"target": "identity", "times": "uniform", "jumps": "continuous"}


@pytest.mark.parametrize(
  ("section", "changes", "message"),
  [
    ("objective", {"guidance": "two_pass"}, "second share to 0"),
    ("objective", {"guidance": "two_pass", "shares": (1, 0, 1)}, r"set shares to \(1, 0, 0\)"),
    ("objective", {"jumps": "continuous"}, "set times to uniform or logit_normal"),
    ("objective", {"jump_probabilities": (1.0, 2.0)}, "give 7 weights"),
    ("objective", {"jump_probabilities": (0.0,) * 7}, "not all 0"),
    ("objective", {"jump_probabilities": (0.0,) * 6 + (1.0,), "curriculum": 1.0}, "jumps of 1"),
    ("objective", {"split": 0.25}, "jumps='continuous'"),
    ("objective", {"split": 0.75}, r"\[1e-4, 0.5\]"),
    ("objective", {"target": "identity"}, "set jumps='continuous'"),
    ("objective", IDENTITY, "model.attention='xla'"),
    ("objective", IDENTITY | {"clip": 4.0}, "set clip to 0"),
    ("objective", IDENTITY | {"split": 0.25}, "set split to 0.5"),
    ("objective", IDENTITY | {"rollout": True}, "jumps on the grid"),
    ("objective", IDENTITY | {"jump_probabilities": (1.0,) * 7}, "set grid_share"),
    ("objective", {"tangent": "network"}, "set tangent='path'"),
    ("objective", {"grid_share": 0.5}, "all rows are on the grid"),
    ("objective", {"rollout": True, "shares": (1, 1, 0)}, "set rollout to False"),
    ("objective", {"curriculum": 1.0, "shares": (1, 1, 0)}, "consistency rows, .* set it to 0"),
    *[
      ("objective", {"guidance": "fixed_finest", "shares": (3, 0, 1)} | change, "is of intrinsic")
      for change in (
        *({"w_scaled": True}, {"w_drawn": "log_uniform"}, {"w_ramp": 0.5}),
        *({"guided_velocity": "network"}, {"t_interval_max": 0.5}, {"target": "identity"}),
      )
    ],
    ("objective", {"t_interval_max": 0.2}, "t_interval=0.3 is beyond those that are drawn"),
    ("objective", {"curriculum": 1.5}, r"\[0, 1\]"),
    ("wavelet", {"form": "adaptive"}, "form='norm', or wavelet.losses=.*target='identity'"),
    ("wavelet", {"form": "adaptive", "losses": wavelets.LOSSES}, "targets have no variance"),
    ("wavelet", {"tree": "packet", "form": "weighted"}, "tree='pyramid'"),
    ("wavelet", {"tree": "packet", "form": "l2"}, "tree='pyramid'"),
  ],
)
def test_values_that_mean_nothing_are_refused(section, changes, message):
  config = tiny_config()
  config[section].update(changes)
  with pytest.raises(ValueError, match=message):
    experiment.parse(config)


def test_a_rollout_needs_its_rows_in_one_piece():
  config = tiny_config()
  config.objective.rollout = True
  experiment.check_devices(experiment.parse(config), 8)
  config.batch_size = 32
  with pytest.raises(ValueError, match="the nearest is 64"):
    experiment.check_devices(experiment.parse(config), 8)

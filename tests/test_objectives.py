"""The losses against NumPy, on velocity functions written by hand."""

import dataclasses

from examples import tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import experiment, objectives, paths, wavelets

NULL = 10
ISM = experiment.parse(tiny_config("ism"))
SM = experiment.parse(tiny_config("sm"))


def toy(scale):
  """A velocity function that depends on all its inputs, in NumPy or JAX."""

  def velocity(x, t, c, d, w, xp=jnp):
    e = lambda a: xp.reshape(a, (-1, 1, 1, 1))
    return scale * xp.sin(x + e(t) + 2 * e(d) + 0.3 * e(w)) + 0.1 * e(c) - e(t * d)

  return velocity


def draw(n, cfg, seed=0):
  """x0, x1 (JAX), c and the conditions of n rows (NumPy)."""
  keys = jax.random.split(jax.random.key(seed), 3)
  x0, x1 = jax.random.normal(keys[0], (2, n, 4, 4, 1))
  c = jnp.arange(n) % 10
  conditions = objectives.draw_conditions(keys[1], c, cfg, NULL)
  return x0, x1, *jax.device_get((c, conditions))


def test_every_row_of_a_batch_has_one_loss_at_its_share():
  rows = objectives.deal_rows(64, (2, 1, 1))
  assert [len(r) for r in rows] == [32, 16, 16]
  np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(64))


def test_a_rows_loss_does_not_depend_on_how_the_batch_is_cut():
  whole = objectives.deal_rows(64, (6, 1, 1))
  for pieces in (2, 4, 8):
    n = 64 // pieces
    cut = objectives.deal_rows(n, (6, 1, 1))
    for of_whole, of_piece in zip(whole, cut, strict=True):
      joined = np.concatenate([of_piece + i * n for i in range(pieces)])
      np.testing.assert_array_equal(joined, of_whole)


def test_rows_that_do_not_divide_name_the_nearest_number_that_does():
  with pytest.raises(ValueError, match="nearest is 8"):
    objectives.deal_rows(7, (2, 1, 1))


def test_conditions_follow_the_grids_and_shares():
  n = 40_000
  cfg = ISM.objective
  _, _, c, conditions = draw(n, cfg)
  velocity, guidance, consistency = objectives.deal_rows(n, cfg.shares)
  assert np.all(conditions.d[velocity] == 0) and np.all(conditions.d[guidance] == 0)
  assert np.all(conditions.d[consistency] >= 1 / 64)
  assert np.all(conditions.w[velocity] == 0)
  for r in (guidance, consistency):
    values, counts = np.unique(conditions.w[r], return_counts=True)
    np.testing.assert_allclose(values, np.arange(0, 3.75, 0.25))
    assert abs(counts / len(r) - 1 / 15).max() < 0.01
  # Label dropout: 10 % of the velocity rows, and none of the others.
  assert abs((conditions.c[velocity] == NULL).mean() - 0.1) < 0.01
  assert np.all((conditions.c == c)[np.concatenate([guidance, consistency])])
  for r in (velocity, guidance):
    np.testing.assert_array_equal(np.unique(conditions.t[r]), np.arange(128) / 128)
  assert np.all(conditions.t[consistency] % conditions.d[consistency] == 0)
  uniform = draw(n, dataclasses.replace(cfg, times="uniform"))[3].t[velocity]
  assert len(np.unique(uniform)) > 1000 and 0.49 < uniform.mean() < 0.51


def test_guidance_target_adds_w_times_the_difference_outside_the_interval():
  rng = np.random.default_rng(0)
  v, s_c, s_0 = rng.normal(size=(3, 4, 2, 2, 1)).astype(np.float32)
  w, t = np.array([0.0, 1.0, 2.5, 2.5]), np.array([0.5, 0.3, 0.9, 0.29])
  target = objectives.guidance_target(v, s_c, s_0, jnp.asarray(w), jnp.asarray(t), 0.3)
  expected = v + np.array([0, 1, 2.5, 0]).reshape(-1, 1, 1, 1) * (s_c - s_0)
  np.testing.assert_allclose(target, expected, rtol=1e-5)


def test_a_linear_flow_is_its_own_two_step_target():
  """Where the velocity is a constant along the path, two steps are one."""
  x = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
  speed = jax.random.normal(jax.random.key(1), (3, 4, 4, 1))
  velocity = lambda *_: speed
  t, d, one = jnp.array([0.0, 0.25, 0.5]), jnp.array([1.0, 1 / 64, 0.5]), jnp.ones(3)
  s = velocity(x, t, one, d, one)
  np.testing.assert_allclose(
    objectives.consistency_target(s, velocity, x, t, one, d, one), speed, rtol=1e-6
  )


def test_the_two_step_target_of_a_growing_flow_is_its_closed_form():
  """x' = a x: two Euler steps of h multiply x by (1 + a h)^2."""
  a, x = 1.7, jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
  velocity = lambda x, t, c, d, w: a * x
  d = jnp.array([1 / 64, 1 / 32, 1 / 2, 1])
  h = np.array([1 / 128, 1 / 64, 1 / 4, 1 / 2]).reshape(-1, 1, 1, 1)
  t = zero = jnp.zeros(4)
  target = objectives.consistency_target(a * x, velocity, x, t, zero, d, zero)
  np.testing.assert_allclose(target, x * ((1 + a * h) ** 2 - 1) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize("parameters", ["online", "target"])
@pytest.mark.parametrize(
  ("clip", "guided_velocity"), [(0.0, "path"), (0.7, "path"), (0.0, "network")]
)
def test_ism_targets_are_their_equations_in_numpy(parameters, clip, guided_velocity):
  cfg = dataclasses.replace(
    ISM.objective,
    guidance_parameters=parameters,
    clip=clip,
    guided_velocity=guided_velocity,
  )
  online, ema = toy(1.0), toy(0.6)
  x0, x1, c, conditions = draw(64, cfg)
  x_t = paths.interpolate(x0, x1, conditions.t)
  y = objectives.regression_targets(online, ema, x0, x1, x_t, conditions, cfg, NULL)
  e = lambda a: a.reshape(-1, 1, 1, 1)
  x_t, expected = np.asarray(x_t), np.array(x1 - x0)
  _velocity, guidance, consistency = objectives.deal_rows(64, cfg.shares)
  guide = online if parameters == "online" else ema
  for i in guidance:
    row = lambda a, i=i: a[i : i + 1]
    zero = np.zeros(1)
    s_c = guide(row(x_t), row(conditions.t), row(c), zero, zero, np)
    s_0 = guide(row(x_t), row(conditions.t), np.array([NULL]), zero, zero, np)
    if guided_velocity == "network":
      expected[i] = s_c[0]
    if conditions.t[i] >= 0.3:
      expected[i] += (conditions.w[i] * (s_c - s_0))[0]
  for i in consistency:
    t, w, label, x = (a[i : i + 1] for a in (conditions.t, conditions.w, c, x_t))
    half = conditions.d[i : i + 1] / 2
    d = np.where(half < 1 / 64, 0, half)  # the finest step has d = 0
    s1 = ema(x, t, label, d, w, np)
    x2 = x + e(half) * s1
    if clip:
      x2 = np.clip(x2, -clip, clip)
    s2 = ema(x2, t + half, label, d, w, np)
    expected[i] = ((s1 + s2) / 2)[0]
    if clip:
      expected[i] = np.clip(expected[i], -clip, clip)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def sm_loss_in_numpy(velocity, ema, x0, x1, c, conditions, rows, every_level):
  """Shortcut Models, Frans et al. 2024, transcribed: one mean over all rows of squared errors.

  dt_base = log2(1/dt) counts levels as SM does; the finest, 7, is what this project calls d = 0.
  """
  scale, errors, x0, x1 = 1.5, [], np.asarray(x0), np.asarray(x1)
  as_d = lambda dt_base: 0.0 if dt_base == 7 else 2.0**-dt_base
  ask = lambda f, x, t, label, dt_base: f(
    x[None], np.array([t]), np.array([label]), np.array([as_d(dt_base)]), np.zeros(1), np
  )[0]
  for i in range(len(c)):
    t, label = float(conditions.t[i]), conditions.c[i]
    x_t = (1 - t) * x0[i] + t * x1[i]
    if i in rows.velocity:
      dt_base, target = 7, x1[i] - x0[i]
    else:
      dt_base = round(-np.log2(conditions.d[i]))
      half_base, dt = dt_base + 1, 2.0 ** -(dt_base + 1)

      def bootstrap(x, t, label=label, half_base=half_base):
        v = ask(ema, x, t, label, half_base)
        if half_base == 7 or every_level:
          v_uncond = ask(ema, x, t, NULL, half_base)
          v = v_uncond + scale * (v - v_uncond)
        return v

      v1 = bootstrap(x_t, t)
      v2 = bootstrap(np.clip(x_t + dt * v1, -4, 4), t + dt)
      target = np.clip((v1 + v2) / 2, -4, 4)
    errors.append(np.mean((ask(velocity, x_t, t, label, dt_base) - target) ** 2))
  return np.mean(errors)


@pytest.mark.parametrize("variant", ["sm", "sm_compounding"])
def test_all_switches_off_is_shortcut_models(variant):
  exp = experiment.parse(tiny_config(variant))
  cfg = exp.objective
  x0, x1, c, conditions = draw(512, cfg, seed=3)
  online, ema = toy(1.0), toy(2.5)  # large enough that the clipping at 4 matters
  loss, _ = objectives.losses(online, ema, x0, x1, conditions, cfg, exp.wavelet, NULL, 512)
  rows = objectives.deal_rows(512, cfg.shares)
  expected = sm_loss_in_numpy(online, ema, x0, x1, c, conditions, rows, variant == "sm_compounding")
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  # In sm only the velocity rows train the null class; compounding needs it at every d.
  assert np.any(conditions.c[rows.consistency] == NULL) == (variant == "sm_compounding")


def test_each_loss_is_a_mean_over_its_rows_times_its_weight():
  cfg = dataclasses.replace(ISM.objective, alpha=2.0, beta=3.0, gamma=5.0)
  x0, x1, _, conditions = draw(64, cfg)
  args = (toy(1.0), toy(0.6), x0, x1, conditions)
  loss, parts = objectives.losses(*args, cfg, ISM.wavelet, NULL, 64)
  np.testing.assert_allclose(
    loss, 2 * parts["velocity"] + 3 * parts["guidance"] + 5 * parts["consistency"], rtol=1e-6
  )
  x_t = paths.interpolate(x0, x1, conditions.t)
  e = toy(1.0)(x_t, *conditions) - (x1 - x0)
  velocity = objectives.deal_rows(64, cfg.shares).velocity
  np.testing.assert_allclose(parts["velocity"], np.mean(np.asarray(e)[velocity] ** 2), rtol=1e-5)


def test_no_gradient_flows_through_a_target():
  x0, x1, _, conditions = draw(64, ISM.objective)
  x_t = paths.interpolate(x0, x1, conditions.t)

  def total(scale):
    y = objectives.regression_targets(
      toy(scale), toy(scale), x0, x1, x_t, conditions, ISM.objective, NULL
    )
    return jnp.sum(y**2)

  assert jax.grad(total)(1.0) == 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"guidance": "cfg"}, "known are intrinsic"),
    ({"shares": (0, 1, 1)}, "at least 1"),
    ({"guidance": "fixed_finest"}, "set the second share to 0"),
    ({"w_max": -1.0}, r"objective.w_max=-1.0: give a number in \[0, 100\]"),
    ({"w_max": 3.6}, "multiple of w_spacing"),
    ({"t_interval": 1.5}, "t_interval=1.5"),
    ({"clip": -4.0}, "clip=-4.0"),
    ({"times": "logit"}, "known are grid, uniform"),
  ],
)
def test_values_that_mean_nothing_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(ISM.objective, **change)


def test_the_consistency_loss_is_the_mean_of_its_jumps(key):
  """Sums and counts by d, against a loop over the rows."""
  cfg = ISM.objective
  x0, x1 = jax.random.normal(key, (2, 256, 8, 8, 1))
  c = jnp.arange(256) % NULL
  conditions = objectives.draw_conditions(jax.random.key(1), c, cfg, NULL)
  velocity = lambda x, t, c, d, w: x * paths.expand(t + d, x)
  rest = (cfg, ISM.wavelet, NULL, 256)
  _, parts = objectives.losses(velocity, velocity, x0, x1, conditions, *rest)
  rows = objectives.deal_rows(256, cfg.shares).consistency
  x_t = paths.interpolate(x0, x1, conditions.t)
  y = objectives.regression_targets(velocity, velocity, x0, x1, x_t, conditions, cfg, NULL)
  e = velocity(x_t, conditions.t, c, conditions.d, conditions.w) - y
  distances = np.asarray(wavelets.distance(e[rows], ISM.wavelet, "consistency"))
  sums, counts = np.zeros(7), np.zeros(7)
  for row, distance in zip(rows, distances, strict=True):
    k = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1].index(float(conditions.d[row]))
    sums[k] += distance
    counts[k] += 1
  assert counts.min() > 0
  np.testing.assert_allclose(parts["jumps"], [sums, counts], rtol=1e-5)
  np.testing.assert_allclose(parts["consistency"], sums.sum() / 64, rtol=1e-5)

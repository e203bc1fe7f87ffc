import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import guidance, paths
from ism_jax.metrics import diagnosis

NULL = 3


def network(jump_scale, t_interval):
  """Constant velocities per class; a jump at t >= t_interval carries the CFG scale jump_scale(d).

  Its fine steps (d = 0) are unguided: class k moves at k + 1, no class at 0.
  """

  def velocity(x, t, c, d, w):
    s_cond = jnp.where(c == NULL, 0.0, c + 1.0)
    # The part of the jump from t to t + d that lies behind the interval.
    inside = jnp.clip((t + d - jnp.maximum(t, t_interval)) / jnp.maximum(d, 1e-6), 0, 1)
    scale = jnp.where(d == 0, 1.0, 1 + (jump_scale(d) - 1) * inside)
    return jnp.broadcast_to(paths.expand(s_cond * scale, x), x.shape)

  return velocity


@pytest.mark.parametrize("t_interval", [0.0, 0.25])
@pytest.mark.parametrize("d", [1 / 64, 1 / 8, 1 / 2])
def test_the_scale_that_a_jump_was_built_with_is_found(key, d, t_interval):
  x0, x1 = jax.random.normal(key, (2, 16, 2, 2, 1))
  c = jnp.arange(16) % NULL
  compounds = lambda d: 1.5 ** paths.level(d)
  scale, residual = diagnosis.effective_scale(
    network(compounds, t_interval),
    x0,
    x1,
    c,
    jax.random.key(1),
    d=d,
    w=0.5,
    null_class=NULL,
    t_interval=t_interval,
  )
  np.testing.assert_allclose(scale, 1.5 ** (np.log2(d) + 7), rtol=0.01)
  assert residual < 1e-4


@pytest.mark.parametrize("speed", [0.0, np.nan])
def test_a_network_without_a_jump_has_no_effective_guidance(key, speed):
  x0, x1 = jax.random.normal(key, (2, 4, 2, 2, 1))
  still = lambda x, t, c, d, w: jnp.full_like(x, speed)
  setting = {"d": 1 / 64, "w": 0.5, "null_class": NULL, "t_interval": 0.0}
  with pytest.raises(FloatingPointError, match=r"jump of 0\.015625 at w=0\.5 has no effective"):
    diagnosis.effective_scale(still, x0, x1, jnp.zeros(4, int), key, **setting)


def test_a_rollout_is_the_sum_of_its_fine_steps(key):
  """x' = a x in 4 steps of 1/128, by hand."""
  x = jax.random.normal(key, (2, 2, 2, 1))
  guided = guidance.fixed(
    lambda x, t, c, d, w: 0.5 * x, null_class=NULL, t_interval=0.0, every_level=False
  )
  zero = jnp.zeros(2)
  mean = diagnosis.rollout(guided, x, zero, zero.astype(int), zero, 4)
  expected = x * ((1 + 0.5 / 128) ** 4 - 1) * 32
  np.testing.assert_allclose(mean, expected, rtol=1e-4)


def test_the_deviation_from_the_chord_is_that_of_the_exact_path(key):
  """x' = 1.5 x has x_t = x_0 exp(1.5 t); constant velocities have straight paths."""
  x0 = jax.random.normal(key, (8, 2, 2, 1))
  c, w = jnp.zeros(8, int), jnp.zeros(8)
  grows = lambda x, t, c, d, w: 1.5 * x
  t = np.linspace(0, 1, 10_001)
  bend = np.exp(1.5 * t) - (1 - t + t * np.exp(1.5))
  expected = np.mean(np.square(x0)) * np.mean(np.square(bend))
  np.testing.assert_allclose(diagnosis.deviation_from_chord(grows, x0, c, w), expected, rtol=0.03)
  straight = diagnosis.deviation_from_chord(lambda x, *_: jnp.ones_like(x), x0, c, w)
  np.testing.assert_allclose(straight, 0, atol=1e-10)


def test_paths_that_bend_only_for_some_w_are_distinguished(key):
  x0 = jax.random.normal(key, (8, 2, 2, 1))
  bends = lambda x, t, c, d, w: paths.expand(w * t, x)
  deviation = lambda w: diagnosis.deviation_from_chord(bends, x0, jnp.zeros(8, int), jnp.full(8, w))
  # x_t - chord = w (t^2 - t) / 2, whose mean square is w^2 / 120.
  np.testing.assert_allclose(deviation(2.0), 4 / 120, rtol=0.03)
  np.testing.assert_allclose(deviation(0.0), 0, atol=1e-10)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import compounding, guidance, paths

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
  scale, residual = compounding.effective_scale(
      network(compounds, t_interval), x0, x1, c, jax.random.key(1),
      d=d, w=0.5, null_class=NULL, t_interval=t_interval,
  )  # fmt: skip
  np.testing.assert_allclose(scale, 1.5 ** (np.log2(d) + 7), rtol=0.01)
  assert residual < 1e-4


def test_a_rollout_is_the_sum_of_its_fine_steps(key):
  """x' = a x in 4 steps of 1/128, by hand."""
  x = jax.random.normal(key, (2, 2, 2, 1))
  guided = guidance.fixed(
    lambda x, t, c, d, w: 0.5 * x, null_class=NULL, t_interval=0.0, every_level=False
  )
  zero = jnp.zeros(2)
  mean = compounding.rollout(guided, x, zero, zero.astype(int), zero, 4)
  expected = x * ((1 + 0.5 / 128) ** 4 - 1) * 32
  np.testing.assert_allclose(mean, expected, rtol=1e-4)

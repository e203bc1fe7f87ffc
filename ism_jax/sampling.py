"""The few-step sampler: any dyadic schedule, any guidance, one network call per step.

x_{t+d} = x_t + d s(x_t, t, c, d, w) from x_0 ~ N(0, I) at t = 0 to x_1 at t = 1.
"""

import itertools

import jax
import jax.numpy as jnp

from ism_jax import guidance, paths


def sample(velocity, x0, c, w, schedule):
  """E14: x_{t+d} = x_t + d s(x_t, t, c, d, w) along the schedule, from noise to samples [B, ...].

  Args:
    velocity: velocity(x_t, t, c, d, w).
    x0: [B, ...] noise.
    c: [B] classes.
    w: [B] guidance, one for each sample.
    schedule: (t, d) pairs, as `paths.parse_schedule` returns.
  """

  def step(x_t, t_and_d):
    t, d = (jnp.full(c.shape, a) for a in t_and_d)
    return paths.advance(x_t, velocity(x_t, t, c, d, w), d), None

  times_and_sizes = tuple(jnp.array(column, jnp.float32) for column in zip(*schedule, strict=True))
  return jax.lax.scan(step, x0, times_and_sizes)[0]


def sample_fixed(velocity, x0, c, w, schedule, *, t_interval: float, null_class: int):
  """`sample` for a network with fixed guidance: w guides its finest steps, in two passes each.

  The longer steps have learnt theirs in training and ignore w.
  """
  guided = guidance.fixed(velocity, null_class=null_class, t_interval=t_interval, every_level=False)
  x = x0
  for finest, steps in itertools.groupby(schedule, lambda step: step[1] == 0):
    x = sample(guided if finest else velocity, x, c, w, tuple(steps))
  return x


def draw_noise(key, indices, shape):
  """Noise [N, *shape] of the samples numbered `indices` [N]: each depends only on its number."""
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)

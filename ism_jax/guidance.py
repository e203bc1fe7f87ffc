"""Classifier-free guidance, as a network input (iSM) and as a fixed scale in the target (SM).

w = 0 means no guidance; the usual classifier-free-guidance scale is 1 + w. A velocity function is
called as `velocity(x_t, t, c, d, w)`, with t, c, d, w of shape [B].
"""

import jax.numpy as jnp

from ism_jax import paths


def parts(w):
  """(w [B], the start of its interval [B]) of w [B, 2]."""
  return w[:, 0], w[:, 1]


def interval_weight(w, t, t_interval):
  """w where t >= t_interval, else 0: interval guidance spares the noisy side (iSM, Sec. 4)."""
  return jnp.where(t >= t_interval, w, 0.0)


def fixed(velocity, *, null_class: int, t_interval: float, every_level: bool):
  """E15: s_uncond + (1 + w) (s_cond - s_uncond), the fixed guidance of the Shortcut Models (SM).

  It guides the targets of the baseline in training, and its finest steps when it is sampled. Steps
  of the finest level are guided, the others only where `every_level`. (SM guides only the finest:
  the coarser steps have learnt it already, and guiding them again would compound.)

  Returns:
    A velocity function that guides `velocity` with its argument w. `velocity` itself is called at
    w = 0: a network with fixed guidance has no input w.
  """

  def guided(x_t, t, c, d, w):
    twice = lambda a: jnp.concatenate([a, a])
    c_and_null = jnp.concatenate([c, jnp.full_like(c, null_class)])
    s = velocity(twice(x_t), twice(t), c_and_null, twice(d), jnp.zeros_like(twice(w)))
    s_cond, s_uncond = jnp.split(s, 2)
    w = interval_weight(w, t, t_interval)
    w = w if every_level else jnp.where(d == 0, w, 0.0)
    return s_uncond + paths.expand(1 + w, s_cond) * (s_cond - s_uncond)

  return guided


def two_pass(velocity, *, null_class: int, t_interval: float):
  """A velocity function that guides every step by E15, in two passes, as usual for flow matching.

  The network has learnt instantaneous velocities only, so that each step, however long, is one of
  Euler's: `velocity` is called at d = 0.
  """
  instantaneous = lambda x_t, t, c, d, w: velocity(x_t, t, c, jnp.zeros_like(d), w)
  return fixed(instantaneous, null_class=null_class, t_interval=t_interval, every_level=True)

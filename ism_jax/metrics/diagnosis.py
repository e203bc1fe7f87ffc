"""What a trained network does: the guidance its jumps carry, and how straight its paths are.

With a fixed guidance inside the target at every level, a jump over N fine steps carries the
guidance once per level: a classifier-free-guidance (CFG) scale of (1 + w)^(log2 N) (iSM, Sec. 3).
The effective scale of a jump is measured here as the CFG scale whose rollout in steps of 1/128 best
matches it. Paths are straight where one step goes as far as many: what optimal transport is for.

Axes: B batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from ism_jax import guidance, paths

SCALES = (0.25, 64.0)  # the CFG scales that are searched


def _fine_steps(velocity, x_t, t, c, w, steps: int):
  """The end of `steps` steps of 1/128 from x_t, t [B], and the states [steps, B, ...] passed."""
  zero = jnp.zeros_like(t)

  def step(x, i):
    return paths.advance(x, velocity(x, t + i / paths.FINEST, c, zero, w), zero), x

  return jax.lax.scan(step, x_t, jnp.arange(steps))


def rollout(guided, x_t, t, c, w, steps: int):
  """The mean velocity [B, ...] of `steps` steps of 1/128 from x_t, t [B], guided by w [B]."""
  x, _ = _fine_steps(guided, x_t, t, c, w, steps)
  return (x - x_t) * paths.FINEST / steps


def effective_scale(velocity, x0, x1, c, key, *, d, w, null_class, t_interval):
  """The CFG scale 1 + g whose fine rollout best matches the network's jump d, in mean square.

  Args:
    velocity: velocity(x_t, t, c, d, w).
    x0, x1, c: noise and data [B, ...], classes [B].
    key: of the start times, which are multiples of d.
    d: the jump, 1/64 ... 1.
    w: guidance, the network's input for the jump.
    null_class: label of "no class".
    t_interval: of the network's training: the rollout is guided where training was.
  Returns:
    (1 + g, relative residual of the match). A scale at an end of `SCALES` is not matched at all.
  Raises:
    FloatingPointError: the jump, or its rollout at every scale, is zero or not finite.
  """
  n = len(c)
  jump, guided_by = jnp.full(n, d), jnp.full(n, w)
  t = paths.draw_start(key, jump)
  x_t = paths.interpolate(x0, x1, t)
  target = jax.jit(velocity)(x_t, t, c, jump, guided_by)
  guided = guidance.fixed(velocity, null_class=null_class, t_interval=t_interval, every_level=False)

  @jax.jit
  def mismatch(log_scale):
    g = jnp.full(n, jnp.exp(log_scale) - 1)
    fine = rollout(guided, x_t, t, c, g, round(d * paths.FINEST))
    return jnp.mean(jnp.square(fine - target)) / jnp.mean(jnp.square(target))

  # A rollout at a far too large scale diverges: bracket the minimum on a grid first.
  grid = np.linspace(*np.log(SCALES), 17)
  values = np.nan_to_num([float(mismatch(s)) for s in grid], nan=np.inf)
  i = int(np.argmin(values))
  bounds = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
  best = scipy.optimize.minimize_scalar(
    lambda s: float(mismatch(s)), bounds=bounds, method="bounded", options={"xatol": 1e-3}
  )
  if not np.isfinite(best.fun):
    raise FloatingPointError(
      f"a jump of {d:g} at w={w:g} has no effective guidance: it, or its rollout in steps of "
      "1/128, is zero or not finite. The network has diverged, or was not trained: use another "
      "checkpoint."
    )
  return float(np.exp(best.x)), float(best.fun)


def deviation_from_chord(velocity, x0, c, w):
  """Mean square distance of the 128-step paths from x0 [B, ...] to the chords of their ends.

  mean_{t, B, dims} (x_t - ((1 - t) x_0 + t x_1))^2 over t = 1/128, ..., 127/128: 0 for straight
  paths at constant speed, of velocity(x_t, t, c, d, w) at d = 0, classes c [B] and guidance w [B].
  """
  x1, x_t = _fine_steps(velocity, x0, jnp.zeros(len(c)), c, w, paths.FINEST)
  times = jnp.arange(paths.FINEST) / paths.FINEST
  chords = jax.vmap(lambda t: (1 - t) * x0 + t * x1)(times)
  return jnp.mean(jnp.square(x_t - chords)[1:])

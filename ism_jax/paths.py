"""The straight path between noise and data, and the dyadic grid of steps on it.

Conventions (iSM, Sec. 3): x0 is noise, x1 is data, and time runs from noise (t=0) to data (t=1).
Times are made and moved in this module only. A step of size d moves x_t to
x_t + d * s(x_t, t, c, d, w).

Step sizes are dyadic: 1/128, 1/64, ..., 1/2, 1. The network never sees d = 1/128: it sees d = 0,
the instantaneous velocity, which stands for the finest step (the Shortcut Models code ties the two
in the same way). So `length(d)` is the distance that a step travels, and d is the network's input.
Steps of length l start at multiples of l.

The code of the Shortcut Models' authors has x_t = (1 - (1 - 1e-5) t) x0 + t x1 and v = x1 -
(1 - 1e-5) x0. The paths here end at the data exactly, for all variants, `sm` too.

Axes: B batch, H/W image size, C channels.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp

FINEST = 128  # steps of the finest schedule
LEVELS = FINEST.bit_length()  # 8 step sizes: d in {0, 1/64, 1/32, ..., 1}
JUMPS = tuple(2.0**k / FINEST for k in range(1, LEVELS))  # 1/64, 1/32, ..., 1


def expand(a, like):
  """[B] -> [B, 1, ..., 1] with as many axes as `like`."""
  return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def interpolate(x0, x1, t):
  """E1: x_t = (1 - t) x0 + t x1, for x0, x1 [B, ...] and t [B]."""
  t = expand(t, x1)
  return (1 - t) * x0 + t * x1


def velocity(x0, x1):
  """E2: v = x1 - x0, the time derivative of x_t."""
  return x1 - x0


def step_size(level):
  """E3: the network input d of a level: 0 for level 0 (a step of 1/128), else 2^level / 128."""
  level = jnp.asarray(level, jnp.float32)
  return jnp.where(level == 0, 0.0, jnp.exp2(level) / FINEST)


def length(d):
  """Distance in t that a step travels: d itself, and 1/128 for d = 0."""
  return jnp.where(d == 0, 1.0 / FINEST, d)


def level(d):
  """Level of a step size, float: 0 for d = 0, else log2(128 d)."""
  return jnp.log2(length(d) * FINEST)


def split(d, share):
  """The lengths of the two steps that a jump d is made of, the first `share` of it."""
  first = share * d
  return first, d - first


def as_step_size(distance):
  """The step size d of a step of this length: 0 up to 1/128, the instantaneous velocity."""
  return jnp.where(distance * FINEST > 1, distance, 0.0)


def travel(x_t, s, distance):
  """x_t + distance s, for distances [B]."""
  return x_t + expand(distance, x_t) * s


def advance(x_t, s, d):
  """E4: x_{t+d} = x_t + d s, for d [B] (d = 0 travels 1/128)."""
  return travel(x_t, s, length(d))


def draw_jump(key, shape, probabilities=()):
  """Step sizes d in {1/64, ..., 1}, uniform over the levels (open in the paper; as in SM).

  Args:
    probabilities: of the seven sizes, as weights that need not add up to 1; () is uniform.
  """
  if probabilities:
    levels = 1 + jax.random.categorical(key, jnp.log(jnp.array(probabilities)), shape=shape)
  else:
    levels = jax.random.randint(key, shape, 1, LEVELS)
  return step_size(levels)


def draw_start(key, d):
  """Start times of steps d: uniform over the multiples of `length(d)` in [0, 1)."""
  starts = jnp.round(1 / length(d)).astype(jnp.int32)
  return jax.random.randint(key, d.shape, 0, starts) * length(d)


def draw_times(key, shape, mean: float, deviation: float):
  """Times in (0, 1) whose logit is normal, with this mean and standard deviation (SD 3)."""
  return jax.nn.sigmoid(mean + deviation * jax.random.normal(key, shape))


def between(first, second):
  """(t, d) of the jumps between two times [B]: d is never below 1/128, and t + d <= 1."""
  d = jnp.maximum(jnp.abs(first - second), 1.0 / FINEST)
  return jnp.minimum(jnp.minimum(first, second), 1 - d), d


def parse_schedule(steps) -> tuple[tuple[float, float], ...]:
  """The steps of a sampling schedule as (t, d) pairs, d = 0 for a step of 1/128.

  Args:
    steps: a number of equal steps (1, 2, 4, ..., 128), or explicit step lengths such as
      "1/2,1/4,1/4", each dyadic, each starting at a multiple of itself, together 1.
  Raises:
    ValueError: where the schedule leaves the grid that training covers.
  """
  text = str(steps).strip()
  try:
    if "e" in text.lower():  # 1e999999999 would be computed
      raise ValueError
    if "," in text or "/" in text:
      lengths = [Fraction(part) for part in text.split(",")]
    else:
      lengths = [Fraction(1, int(text))] * min(int(text), FINEST)
  except (ValueError, ZeroDivisionError):
    raise ValueError(
      f"steps={steps!r} is no schedule: give a count (1, 2, 4, ..., {FINEST}) or step lengths "
      "such as 1/2,1/4,1/4."
    ) from None
  dyadic = {Fraction(1, 2**k) for k in range(LEVELS)}
  schedule, t = [], Fraction(0)
  for step in lengths:
    if step not in dyadic:
      raise ValueError(
        f"steps={steps!r} has a step of {step}, which is off the trained grid: give 1, 2, 4, "
        f"..., {FINEST} equal steps, or step lengths of 1, 1/2, 1/4, ..., 1/{FINEST}."
      )
    if t % step:
      raise ValueError(
        f"steps={steps!r} starts a step of {step} at t={t}; training has steps of {step} start "
        f"at multiples of {step} only. Reorder the steps."
      )
    schedule.append((float(t), 0.0 if step == Fraction(1, FINEST) else float(step)))
    t += step
  if t != 1:
    raise ValueError(f"steps={steps!r} adds up to {t}: give step lengths that add up to 1.")
  return tuple(schedule)

"""The three losses of iSM, and the Shortcut Models (SM) baseline, as one regression per example.

L = alpha L_velocity + beta L_guidance + gamma L_consistency (iSM, Sec. 4). The losses differ only
in each example's (t, d, c, w) and target, so the rows of one batch are dealt to them in a fixed
pattern and share one network call for the gradient; targets come from calls without gradient. Each
loss is the mean over its rows of the *global* batch, so neither the number of devices nor of
micro-batches changes it.

A velocity function is called as `velocity(x_t, t, c, d, w)`; all but x_t are [B].

Axes: B batch, H/W image size, C channels.
"""

import dataclasses
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax import guidance, paths, ranges, wavelets

GUIDANCES = ("intrinsic", "fixed_finest", "fixed_every_level")
PARAMETERS = ("online", "target")
TIMES = ("grid", "uniform")
Share = Annotated[int, "[0, 1000]"]
Weight = Annotated[float, "[0, 1e4]"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The losses.

  Attributes:
    shares: rows of velocity, guidance and consistency in each sum(shares) rows of the batch; (2, 1,
      1) is 1/2, 1/4, 1/4. Open in the paper.
    alpha: weight of the velocity loss (1 in the paper, as the other two).
    beta: weight of the guidance loss.
    gamma: weight of the consistency loss.
    guidance: "intrinsic": w is a network input (iSM). "fixed_finest": SM; guidance of `fixed_w` in
      only the finest step of the consistency target. "fixed_every_level": the same at every level,
      the compounding that iSM's Sec. 3 describes.
    fixed_w: w of the two fixed forms.
    w_max: the largest w that is drawn.
    w_spacing: w is drawn from 0, w_spacing, ..., w_max.
    t_interval: guidance is off for t < t_interval, the noisy side; 0 is no interval.
    guidance_parameters: whose conditional-unconditional difference guides: "online", or "target"
      (the fast EMA). Open in the paper.
    label_dropout: share of the velocity rows that train the null class (of the consistency rows
      too where fixed guidance needs a null class at every level).
    times: t of the velocity and guidance rows: "grid", multiples of 1/128 (SM), or "uniform" on
      [0, 1). Open in the paper.
    clip: bound on |x_{t+d}| and on the consistency target, as SM's code has at 4; 0 is none.
  """

  shares: tuple[Share, Share, Share]
  alpha: Weight
  beta: Weight
  gamma: Weight
  guidance: Annotated[str, GUIDANCES] = dataclasses.field(metadata={"fixed": True})
  fixed_w: ranges.Guidance = dataclasses.field(metadata={"fixed": True})
  w_max: ranges.Guidance
  w_spacing: Annotated[float, "[0.001, 100]"]
  t_interval: Annotated[float, "[0, 1]"]
  guidance_parameters: Annotated[str, PARAMETERS]
  label_dropout: Annotated[float, "[0, 1]"]
  times: Annotated[str, TIMES]
  clip: Annotated[float, "[0, 1e6]"]

  def __post_init__(self):
    ranges.check_fields(self, "objective")
    if self.shares[0] < 1:
      raise ValueError(
        f"objective.shares={self.shares}: give rows of velocity (at least 1), guidance and "
        "consistency, such as (2, 1, 1)."
      )
    if not any(share and weight for share, weight in zip(self.shares, self.weights, strict=True)):
      raise ValueError(
        f"objective.alpha={self.alpha}, beta={self.beta}, gamma={self.gamma} with "
        f"shares={self.shares}: nothing is learnt; give a loss that has rows a positive weight."
      )
    if not self.intrinsic and self.shares[1]:
      raise ValueError(
        f"objective.shares={self.shares} gives rows to the guidance loss, which "
        f"guidance={self.guidance!r} does not have: set the second share to 0."
      )
    steps = self.w_max / self.w_spacing
    if not math.isclose(steps, round(steps), abs_tol=1e-6):
      raise ValueError(
        f"objective.w_max={self.w_max} is not a multiple of w_spacing={self.w_spacing}: set it to "
        f"{max(1, round(steps)) * self.w_spacing:g}."
      )

  @property
  def intrinsic(self) -> bool:
    """Whether w is a network input."""
    return self.guidance == "intrinsic"

  @property
  def weights(self) -> tuple[float, float, float]:
    """Of the velocity, guidance and consistency loss."""
    return self.alpha, self.beta, self.gamma


class Rows(NamedTuple):
  """Which rows of a batch belong to which loss: arrays of row numbers."""

  velocity: np.ndarray
  guidance: np.ndarray
  consistency: np.ndarray


def deal_rows(n: int, shares: tuple[int, int, int]) -> Rows:
  """Deals n rows to the three losses, in a pattern that repeats every sum(shares) rows.

  Every run of whole periods holds each loss at its share, and a row's loss does not depend on how
  many devices and micro-batches there are.

  Raises:
    ValueError: if n is not a multiple of the period.
  """
  loss_of_row = number_losses(n, shares)
  return Rows(*(np.flatnonzero(loss_of_row == loss) for loss in range(3)))


def number_losses(n: int, shares: tuple[int, int, int]) -> np.ndarray:
  """[n] of 0, 1, 2: which of the three losses each row has; see `deal_rows`."""
  period = sum(shares)
  if n % period:
    near = max(period, round(n / period) * period)
    raise ValueError(
      f"{n} rows do not split into shares {shares}: they need a multiple of {period}; the nearest"
      f" is {near}."
    )
  return np.repeat(np.arange(3), shares)[np.arange(n) % period]


class Conditions(NamedTuple):
  """What each row is trained for: all [B].

  They are the inputs of the network, but for the w of fixed guidance: it shapes targets only.
  """

  t: jax.Array
  c: jax.Array
  d: jax.Array
  w: jax.Array


def draw_conditions(key, c, cfg: ObjectiveConfig, null_class: int) -> Conditions:
  """Draws (t, c, d, w) for a global batch with labels c [B], row by row for the row's loss.

  Velocity rows: d = 0, w = 0, c dropped at random. Guidance rows: d = 0, any w. Consistency rows:
  a jump d in {1/64, ..., 1} from a multiple of d, any w, or `fixed_w` where guidance is fixed.
  """
  n = c.shape[0]
  rows = deal_rows(n, cfg.shares)
  is_velocity = np.isin(np.arange(n), rows.velocity)
  is_consistency = np.isin(np.arange(n), rows.consistency)
  key_t, key_jump, key_start, key_w, key_drop = jax.random.split(key, 5)
  if cfg.times == "grid":
    t = paths.draw_start(key_t, jnp.zeros(n))
  else:
    t = jax.random.uniform(key_t, (n,))
  jump = paths.draw_jump(key_jump, (n,))
  t = jnp.where(is_consistency, paths.draw_start(key_start, jump), t)
  d = jnp.where(is_consistency, jump, 0.0)
  if cfg.intrinsic:
    count = round(cfg.w_max / cfg.w_spacing) + 1
    drawn = cfg.w_spacing * jax.random.randint(key_w, (n,), 0, count).astype(jnp.float32)
    w = jnp.where(is_velocity, 0.0, drawn)
  else:
    w = jnp.where(is_consistency, cfg.fixed_w, jnp.zeros(n))
  may_drop = is_velocity | (is_consistency & (cfg.guidance == "fixed_every_level"))
  drop = jax.random.bernoulli(key_drop, cfg.label_dropout, (n,)) & may_drop
  return Conditions(t, jnp.where(drop, null_class, c), d, w)


def guidance_target(v, s_cond, s_uncond, w, t, t_interval):
  """E6: v + w (s_cond - s_uncond), but v where t < t_interval (iSM, intrinsic guidance).

  Args:
    v: [B, H, W, C] velocity of the path.
    s_cond: [B, H, W, C] the network's velocity for the label, at d = 0, w = 0.
    s_uncond: [B, H, W, C] the same for the null class.
    w: [B] guidance.
    t: [B] times.
    t_interval: the time from which guidance is on.
  """
  w = guidance.interval_weight(w, t, t_interval)
  return v + paths.expand(w, v) * (s_cond - s_uncond)


def consistency_target(s_first, velocity, x_t, t, c, d, w, clip=0.0):
  """E7: the mean velocity of two d-steps, which one 2d-step must predict (iSM, self-consistency).

  (s(x_t, t, c, d, w) + s(x_{t+d}, t + d, c, d, w)) / 2.

  Args:
    s_first: [B, H, W, C], velocity(x_t, t, c, d, w): an argument since its call can be shared.
    velocity: the velocity function of the second step.
    x_t: [B, H, W, C] state at time t.
    t: [B], with t + 2 length(d) <= 1.
    c: [B] classes.
    d: [B] size of each of the two steps.
    w: [B] guidance of both.
    clip: bound on |x_{t+d}| and on the target, 0 for none.
  """
  x_next = paths.advance(x_t, s_first, d)
  if clip:
    x_next = jnp.clip(x_next, -clip, clip)
  s_second = velocity(x_next, t + paths.length(d), c, d, w)
  target = (s_first + s_second) / 2
  return jnp.clip(target, -clip, clip) if clip else target


def in_one_call(velocity, *inputs):
  """The velocities of several lists of rows (x_t, t, c, d, w), in one call, or none for no rows."""
  sizes = [len(x_t) for x_t, *_ in inputs]
  if not sum(sizes):
    return [x_t for x_t, *_ in inputs]
  s = velocity(*map(jnp.concatenate, zip(*inputs, strict=True)))
  return jnp.split(s, np.cumsum(sizes)[:-1])


def regression_targets(s_online, s_ema, x0, x1, x_t, conditions, cfg, null_class):
  """What the network must predict for each row, [B, H, W, C]; gradients are stopped.

  E5: v for the velocity rows. E6 for the guidance rows, E7 for the consistency rows.

  x_t [B, H, W, C] are the states on the paths from x0 to x1; the others are as `losses` has them.
  """
  rows = deal_rows(len(x_t), cfg.shares)
  x_g, guided = x_t[rows.guidance], Conditions(*(a[rows.guidance] for a in conditions))
  x_c, jump = x_t[rows.consistency], Conditions(*(a[rows.consistency] for a in conditions))
  zero, null = jnp.zeros(len(x_g)), jnp.full(len(x_g), null_class)
  cond = (x_g, guided.t, guided.c, zero, zero)
  uncond = (x_g, guided.t, null, zero, zero)
  half_jump = (x_c, *jump._replace(d=paths.halve(jump.d)))
  s_target = s_ema
  if not cfg.intrinsic:
    every_level = cfg.guidance == "fixed_every_level"
    s_target = guidance.fixed(
      s_ema, null_class=null_class, t_interval=cfg.t_interval, every_level=every_level
    )
  if cfg.guidance_parameters == "online":
    s_cond, s_uncond = in_one_call(s_online, cond, uncond)
    (s_first,) = in_one_call(s_target, half_jump)
  else:
    s_cond, s_uncond, s_first = in_one_call(s_target, cond, uncond, half_jump)
  v = paths.velocity(x0, x1)
  v_guided = guidance_target(v[rows.guidance], s_cond, s_uncond, guided.w, guided.t, cfg.t_interval)
  y = v.at[rows.guidance].set(v_guided)
  if rows.consistency.size:
    two_steps = consistency_target(s_first, s_target, *half_jump, clip=cfg.clip)
    y = y.at[rows.consistency].set(two_steps)
  return jax.lax.stop_gradient(y)


def losses(
  s_online, s_ema, x0, x1, conditions, cfg, wavelet_cfg, null_class, batch_size, weights=None
):
  """`regression_losses` (E8) of whole periods of rows (see `deal_rows`), with their targets.

  Args:
    s_online: velocity function; only its last call carries a gradient.
    s_ema: velocity function of the target EMA.
    x0: [B, H, W, C] noise.
    x1: [B, H, W, C] images.
    conditions: of each row. Labels of guidance rows are never dropped.
    cfg: the ObjectiveConfig.
    wavelet_cfg: the WaveletConfig of their distances.
    null_class: label of "no class".
    batch_size, weights: as for `regression_losses`, and so are the results.
  """
  x_t = paths.interpolate(x0, x1, conditions.t)
  y = regression_targets(s_online, s_ema, x0, x1, x_t, conditions, cfg, null_class)
  settings = (cfg, wavelet_cfg, batch_size, weights)
  return regression_losses(s_online, x_t, y, conditions, None, *settings)


def regression_losses(
  s_online, x_t, y, conditions, loss_of_row, cfg, wavelet_cfg, batch_size, weights=None
):
  """E8: alpha L_velocity + beta L_guidance + gamma L_consistency, of these rows.

  Each loss is the mean distance (E9) between prediction and target over its rows; what is returned
  is the share of these rows in the loss of the global batch.

  Args:
    s_online: velocity function.
    x_t: [B, H, W, C] states.
    y: [B, H, W, C] targets.
    conditions: of each row.
    loss_of_row: [B] of 0, 1, 2, the loss of each row, for any rows of a batch; None for rows that
      `deal_rows` deals.
    cfg: the ObjectiveConfig.
    wavelet_cfg: the WaveletConfig of their distances.
    batch_size: rows of the global batch. The sum of the results over all devices and micro-batches
      is the loss of the global batch.
    weights: (alpha, beta, gamma), scalars or an array [3]; None for those of `cfg`.
  Returns:
    (loss, {"velocity": .., "guidance": .., "consistency": .., "jumps": ..}): scalars, and for each
    d of `paths.JUMPS` the sum of the consistency distances and their number, [2, 7]. (The other
    two losses have d = 0 only.)
  """
  weights = cfg.weights if weights is None else weights
  # A network with fixed guidance has no input w: see `guidance.fixed`.
  w = conditions.w if cfg.intrinsic else jnp.zeros_like(conditions.w)
  error = s_online(x_t, *conditions._replace(w=w)) - y
  total, parts = 0.0, {}
  for loss, (name, share, weight) in enumerate(zip(Rows._fields, cfg.shares, weights, strict=True)):
    if not share:
      continue
    rows = deal_rows(len(x_t), cfg.shares)[loss] if loss_of_row is None else slice(None)
    distances = wavelets.distance(error[rows], wavelet_cfg, name)
    if loss_of_row is not None:
      distances = jnp.where(loss_of_row == loss, distances, 0.0)
    parts[name] = jnp.sum(distances) / (batch_size * share // sum(cfg.shares))
    total += weight * parts[name]
    if name == "consistency":
      # Rows of the other losses have d = 0, which is no jump.
      is_jump = conditions.d[rows] == jnp.array(paths.JUMPS)[:, None]
      parts["jumps"] = jnp.stack([is_jump @ distances, is_jump.sum(1)])
  return total, parts
